"""`make gpu-check`: what only a GPU can show. Tests, compute-sanitizer on every CUDA kernel, benchmarks.

Every step runs, whatever became of the one before; the exit code is 0 where all passed, 1 where one did not, and 2
where there is no GPU. Needs no network. Results go to benchmarks/results/<gpu>.json and .png.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SANITIZER_TOOLS = ("memcheck", "racecheck")


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer: on PATH, or in the CUDA toolkit, whose bin folder often is not."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        homes.append(str(Path(nvcc).resolve().parent.parent))
    folders = [folder for home in homes if home for folder in (f"{home}/bin", f"{home}/compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run(title: str, command: list[str], **environment: str) -> str:
    """Run one step in the repository's root and say how it went: "passed" or why not."""
    print(f"\n== {title}: {' '.join(command)}", flush=True)
    started = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode
    seconds = f"{time.monotonic() - started:.0f} s"
    return f"passed ({seconds})" if code == 0 else f"FAILED with exit code {code} ({seconds})"


def sanitize(tool: str, sanitizer: str | None) -> str:
    """One compute-sanitizer tool on every CUDA kernel of ours."""
    if sanitizer is None:
        return "FAILED: compute-sanitizer is neither on PATH nor in CUDA_HOME (it comes with the CUDA toolkit)"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
    # Torch's caching allocator hands out parts of large blocks, inside which an access out of bounds goes unseen.
    return run(tool, [*command, sys.executable, "benchmarks/sanitize.py"], PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def main() -> int:
    """Run the steps and summarize them."""
    if not torch.cuda.is_available():
        print(f"gpu-check: needs a GPU, and torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    sanitizer = find_sanitizer()
    outcomes = {"tests": run("tests", [sys.executable, "-m", "pytest", "-q"])}
    for tool in SANITIZER_TOOLS:
        outcomes[tool] = sanitize(tool, sanitizer)
    command = "import sys; from rewardfuse import cli; sys.exit(cli.main())"
    bench = [sys.executable, "-c", command, "bench", "--device", "cuda", "--output_dir", str(RESULTS)]
    outcomes["benchmarks"] = run("benchmarks", bench)
    print(f"\n== gpu-check on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for title, outcome in outcomes.items():
        print(f"  {title:<12} {outcome}")
    return 0 if all(outcome.startswith("passed") for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
