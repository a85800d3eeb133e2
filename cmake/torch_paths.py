"""Prints what CMake needs of the installed torch: version; CUDA version or NONE; include folder; library folder."""

import os
import sys

# The build runs from the repository root, whose folders must not shadow installed packages.
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != os.getcwd()]

import torch  # noqa: E402 — after the path is cleaned

root = os.path.dirname(torch.__file__)
print(
    torch.__version__, torch.version.cuda or "NONE", os.path.join(root, "include"), os.path.join(root, "lib"), sep=";"
)
