"""What device code is held to where there is no GPU: it compiles for three generations, without spills or a stack."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SOURCES = sorted(ROOT.glob("kernels/*/cuda.cu"))
HOST_SOURCES = sorted(ROOT.glob("csrc/autograd/*.cpp"))
INCLUDES = [f"-I{ROOT / folder}" for folder in ("csrc", "kernels")]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def resources(text):
    """(kernel, stack bytes, spilled bytes) of every kernel in ptxas's report."""
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    return [(name, int(stack), int(a) + int(b)) for name, stack, a, b in re.findall(pattern, text, re.S)]


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.parent.name)
def test_cuda_kernels_spill_or_do_not_compile(source, architecture, tmp_path):
    command = ["nvcc", "-std=c++20", "-cubin", f"-arch={architecture}", "-Xptxas", "-v", *INCLUDES, str(source)]
    result = subprocess.run([*command, "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = resources(result.stderr)
    assert len(kernels) == result.stderr.count("Compiling entry function") > 0
    assert [k for k in kernels if k[1] or k[2]] == []


@pytest.fixture(scope="module")
def host_compiler(tmp_path_factory):
    """The command that checks a host source of a CUDA build, and torch's headers, most of the work, compiled once."""
    torch_include = pathlib.Path(torch.__file__).parent / "include"
    dry_run = subprocess.run(["nvcc", "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    cuda_include = pathlib.Path(re.search(r"TOP=(\S+)", dry_run).group(1)) / "include"
    command = ["c++", "-std=c++20", "-DREWARDFUSE_WITH_CUDA=1", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    command += ["-DREWARDFUSE_X86_64", *INCLUDES, f"-isystem{torch_include}"]
    command += [f"-isystem{torch_include / 'torch/csrc/api/include'}", f"-isystem{cuda_include}"]
    header = tmp_path_factory.mktemp("headers") / "torch_headers.h"
    header.write_text("#include <ATen/ATen.h>\n#include <torch/csrc/autograd/custom_function.h>\n")
    subprocess.run([*command, "-x", "c++-header", str(header), "-o", f"{header}.gch"], check=True)
    return [*command, "-fsyntax-only", "-Winvalid-pch"], ["-include", str(header)]


@needs_nvcc
@pytest.mark.parametrize("source", HOST_SOURCES, ids=lambda p: p.stem)
def test_host_code_of_a_cuda_build_does_not_compile(source, host_compiler):
    command, headers = host_compiler
    if source.stem.endswith("_cuda"):  # a CPU build does not show what these forget to include
        headers = []
    result = subprocess.run([*command, *headers, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


AHEAD_OF_TIME = """
import sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
sys.path.insert(0, {tests!r})
from {module} import CASES

for number, (name, kernel, signature, constants, options) in enumerate(CASES):
    for capability in (90, (80, 100)[number // 2 % 2]):  # forward and backward stand together
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with open(f"{folder}/{{name}}.{{capability}}.cubin", "wb") as file:
            file.write(compiled.asm["cubin"])
"""


@pytest.mark.parametrize("module", ["triton_cases", "triton_list_cases", "triton_kl_cases"])
def test_triton_kernels_spill_or_do_not_compile(module, tmp_path):
    """Every variant for sm_90, and in turns for sm_80 and sm_100."""
    triton = pytest.importorskip("triton")
    code = AHEAD_OF_TIME.format(module=module, tests=str(ROOT / "tests"), folder=str(tmp_path))
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    cubins = sorted(tmp_path.glob("*.cubin"))
    assert len(cubins) >= 2 * 14
    for capability in (80, 90, 100):
        assert len([cubin for cubin in cubins if cubin.name.endswith(f".{capability}.cubin")]) >= 6
    cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for cubin in cubins:
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
        stack, local = (int(re.search(rf"{word}:(\d+)", usage.stdout).group(1)) for word in ("STACK", "LOCAL"))
        assert (stack, local) == (0, 0), f"{cubin.name}: {usage.stdout}"
