"""Builds the CUDA kernels for the CPU (cuda_runtime.h) and calls them on memory that is fenced in: an access outside of
an argument, or a write to an input, fails the call."""

import concurrent.futures
import ctypes
import fcntl
import math
import mmap
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import torch

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = ("-std=c++20", "-O1", "-w", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-U_FORTIFY_SOURCE")
# Without a runtime library: a violation traps, which the emulation reports. A GPU faults on unaligned accesses.
CHECKS = ("-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error")
DTYPES = ("float32", "float64", "float16", "bfloat16", "bool", "uint8", "int8", "int16", "int32", "int64")
CODES = {getattr(torch, name): code for code, name in enumerate(DTYPES)}  # DType in csrc/common/operand.h
NONCE = 0x5EED


def missing():
    """Why kernels cannot be emulated here; None where they can."""
    if not sys.platform.startswith("linux"):
        return "the emulation of CUDA needs Linux's contexts and signals"
    return None if COMPILER else "there is no C++ compiler"


def translate(folder):
    """Copies the kernels' sources, with launches as calls of the emulation. Returns the .cu files."""
    for source in ROOT.glob("kernels/*/*.cu*"):
        text = source.read_text()
        text = re.sub(r"(\w+)<<<(.+?), 0, stream>>>\(", r"::simt::launch(\1, \2, ", text)
        if "<<<" in text:
            raise ValueError(f"{source}: expected launches of the form kernel<<<blocks, threads, 0, stream>>>(…)")
        copy = folder / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
    return sorted(folder.glob("kernels/*/*.cu"), key=lambda path: path.stat().st_size, reverse=True)


def compile_all(folder):
    """Compiles the kernels and the driver, two files at a time, into ``folder / "simt.so"``."""
    sources = [*translate(folder), HERE / "driver.cpp", HERE / "probes.cpp"]
    includes = [f"-I{path}" for path in (HERE, folder / "kernels", ROOT / "kernels", ROOT / "csrc")]
    objects = [str(folder / f"{source.parent.name}_{source.stem}.o") for source in sources]

    def run(*arguments):
        result = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(arguments)}\n{result.stderr[-5000:]}")

    def build(source, to):
        run(*FLAGS, *CHECKS, *includes, "-x", "c++", "-c", str(source), "-o", to)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(build, sources, objects))
    run("-shared", *objects, "-o", str(folder / "simt.part"))
    (folder / "simt.part").rename(folder / "simt.so")


def build_once(folder):
    """The emulator; built by the first who asks in a run of tests, whose temporary folder this is."""
    if folder.name.startswith("popen-"):  # one of several workers'
        folder = folder.parent
    folder = folder / "simt"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "simt.so").exists():
            compile_all(folder)
    return Emulator(folder / "simt.so")


class Fenced:
    """Memory of exactly so many items: before its first or, `at_end`, behind its last one begins a page that nobody may
    touch, and beyond the other end one follows within a page. New memory reads as NaN or -1."""

    def __init__(self, shape, dtype, at_end):
        count, self.dtype = math.prod(shape), dtype
        size = count * dtype.itemsize
        self.inside = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, self.inside + 2 * mmap.PAGESIZE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + mmap.PAGESIZE
        offset = self.inside - size if at_end else 0
        self.pointer = self.start + offset
        self.pages = pages
        everything = torch.frombuffer(pages, dtype=torch.uint8)
        everything.fill_(255)
        self.tensor = everything[mmap.PAGESIZE + offset :][:size].view(dtype).view(shape)
        for fence in (self.start - mmap.PAGESIZE, self.start + self.inside):
            protect(fence, mmap.PAGESIZE, 0)

    def forbid_writing(self):
        """From here on, a write fails."""
        if self.inside:
            protect(self.start, self.inside, mmap.PROT_READ)


def protect(address, size, protection):
    """mprotect(2)."""
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection):
        raise OSError(ctypes.get_errno(), "mprotect failed")


class Strided(NamedTuple):
    """A tensor over a plane; see Operand in csrc/common/operand.h."""

    tensor: torch.Tensor
    outer: int = 0
    inner: int = 0


class Emulator:
    """Calls kernels. `blocks` is the size of a grid, `at_end` the side of memory that ends at a fence."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.simt_run.restype = ctypes.c_char_p
        numbers = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_double]
        self.library.simt_set.argtypes = [ctypes.c_char_p, ctypes.c_void_p, *numbers]
        self.blocks, self.at_end = 1, True

    def empty(self, shape, dtype):
        """Memory for a kernel to write to."""
        return Fenced(tuple(shape), dtype, self.at_end)

    def scratch(self, sums):
        """What a launch that adds up so many numbers over its grid is given, not initialized."""
        partials, flags = self.empty((self.blocks, sums), torch.float64), self.empty((self.blocks,), torch.int64)
        return {"blocks": self.blocks, "partials": partials, "flags": flags, "nonce": NONCE}

    def run(self, kernel, **arguments):
        """Calls a kernel with numbers, Strided tensors to read, Fenced memory to write, or None. Raises RuntimeError
        for what the emulation found."""
        kept = []
        for name, value in arguments.items():
            if isinstance(value, Strided):
                kept.append(self._copied(value.tensor))
                self._set(name, kept[-1], value.outer, value.inner)
            elif isinstance(value, Fenced):
                self._set(name, value)
            elif value is not None:
                self.library.simt_set(name.encode(), None, 0, 0, 0, float(value))
        error = self.library.simt_run(kernel.encode())
        if error:
            raise RuntimeError(f"{kernel}: {error.decode()}")

    def _set(self, name, memory, outer=0, inner=0):
        self.library.simt_set(name.encode(), memory.pointer, CODES[memory.dtype], outer, inner, 0.0)

    def _copied(self, tensor):
        """The stretch of memory that a tensor covers, with the gaps between its items."""
        tensor = tensor.detach()
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
        memory = self.empty((span,), tensor.dtype)
        memory.tensor.copy_(tensor.as_strided((span,), (1,)))
        memory.forbid_writing()
        return memory
