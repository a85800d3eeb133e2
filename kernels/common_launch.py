"""What every Triton launch needs from the host: device, numbers, grid and scratch."""

from __future__ import annotations

import contextlib
import ctypes
import math
import secrets
from collections.abc import Sequence

import torch
import triton
from rewardfuse.kernels.pairwise.triton import SUMS
from torch import Tensor


def as_float32_sums(numbers: Sequence[float]) -> tuple[float, ...]:
    """Each number rounded to float32, then what the rounding lost."""
    high = [ctypes.c_float(x).value for x in numbers]
    low = [ctypes.c_float(x - h).value if math.isfinite(h) else 0.0 for x, h in zip(numbers, high, strict=True)]
    return (*high, *low)


def on_device_of(like: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()


def programs(like: Tensor, blocks: int) -> int:
    """How many programs share so many blocks of work."""
    processors = torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 1
    return max(1, min(blocks, 8 * processors))


def grid(like: Tensor, blocks: int) -> tuple[tuple[int], dict[str, object]]:
    """Grid of a launch whose programs' sums meet, and the scratch for that; it is shared with no other launch."""
    count = programs(like, blocks)
    scratch = torch.empty(count * (1 + SUMS.value), dtype=torch.int64, device=like.device)
    return (count,), {
        "flags": scratch[:count],
        "partials": scratch[count:].view(torch.float64),
        # An int64 to Triton whatever its value, and odd: it compiles another kernel for multiples of 16.
        "nonce": (1 << 62) + secrets.randbits(61) | 1,
        "PROGRAMS": triton.next_power_of_2(count),
    }
