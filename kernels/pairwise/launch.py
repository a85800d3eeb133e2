"""The host side of the Triton ops on pairs: memory layout, arguments and launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from rewardfuse.kernels import common_launch
from rewardfuse.kernels.pairwise.triton import BLOCK, MEAN, NONE, WARPS, backward_kernel, forward_kernel
from torch import Tensor


class Layout(NamedTuple):
    """Tensors of one shape over a plane of two strided dimensions; see csrc/common/dispatch.h."""

    items: int
    inner: int
    strides: list[tuple[int, int]]
    tensors: list[Tensor | None]


def lay(shape: torch.Size, *tensors: Tensor | None) -> Layout:
    """Collapses the shape to (outer, inner) for all tensors at once; makes them contiguous where that cannot be."""
    if shape.numel() == 0:
        return Layout(0, 1, [(0, 0)] * len(tensors), list(tensors))
    groups: list[list[int]] = []  # of dimensions, innermost first
    full = [t for t in tensors if t is not None and t.dim() > 0]
    for d in reversed([d for d in range(len(shape)) if shape[d] != 1]):
        merges = groups and all(t.stride(d) == t.stride(groups[-1][-1]) * shape[groups[-1][-1]] for t in full)
        if merges:
            groups[-1].append(d)
        else:
            groups.append([d])
    if len(groups) > 2:
        return lay(shape, *(t if t is None or t.dim() == 0 else t.contiguous() for t in tensors))
    inner = shape[min(groups[0]) :].numel() if groups else 1

    def strides(t: Tensor | None) -> tuple[int, int]:
        if t is None or t.dim() == 0:
            return 0, 0
        inner_stride = t.stride(groups[0][0]) if groups else 0
        return (t.stride(groups[1][0]) if len(groups) == 2 else 0), inner_stride

    return Layout(shape.numel(), max(inner, 1), [strides(t) for t in tensors], list(tensors))


class Pairs(NamedTuple):
    """The tensors of a pair op (absent ones None) and, in `numbers`: what stands for p, weight, q where there is no
    tensor, the normalizer (0: none) and the model's three options, or six."""

    a: Tensor
    b: Tensor
    p: Tensor | None
    q: Tensor | None
    weight: Tensor | None
    mask: Tensor | None
    normalizer: Tensor | None
    numbers: tuple[float, ...]
    reduction: int

    def counts(self) -> bool:
        """Whether the mean's denominator is known only to the kernel that reads the mask."""
        absent = self.normalizer is None and self.numbers[3] == 0
        return self.reduction == MEAN.value and self.mask is not None and absent

    def arguments(self, *extra: Tensor) -> tuple[dict[str, object], dict[str, object]]:
        """What both kernels take: tensors and sizes; compile-time constants."""
        layout = lay(self.a.shape, self.a, self.b, self.p, self.q, self.weight, self.mask, *extra)
        names = ("a", "b", "p", "q", "weight", "mask", "grad_output")
        wide = self.a.dtype is torch.float64
        tensors: dict[str, object] = {
            name: self.a if tensor is None else tensor for name, tensor in zip(names, layout.tensors, strict=False)
        }
        tensors["normalizer"] = self.a if self.normalizer is None else self.normalizer
        tensors["strides"] = tuple(stride for pair in layout.strides for stride in pair)
        tensors["numbers"] = common_launch.as_float32_sums(self.numbers)
        tensors |= {"items": layout.items, "inner": layout.inner}
        constants = {
            "HAS_P": self.p is not None,
            "HAS_Q": self.q is not None,
            "HAS_WEIGHT": self.weight is not None,
            "HAS_MASK": self.mask is not None,
            "HAS_NORMALIZER": self.normalizer is not None,
            "COUNTS": self.counts(),
            "REDUCTION": self.reduction,
            "ACC": tl.float64 if wide else tl.float32,
            "TERMS": 16 if wide else 7,
            "BLOCK": BLOCK,
        }
        return tensors, constants


def forward(pairs: Pairs, loss_function: object, return_stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, stats ``[5]`` or ``[0]``, denominator ``[]``)."""
    dtype = torch.float64 if pairs.a.dtype is torch.float64 else torch.float32
    none = pairs.reduction == NONE.value
    loss = torch.empty(pairs.a.shape if none else (), dtype=dtype, device=pairs.a.device)
    stats = torch.empty(5 if return_stats else 0, dtype=dtype, device=pairs.a.device)
    denominator = torch.empty((), dtype=torch.float64, device=pairs.a.device)
    tensors, constants = pairs.arguments()
    grid, scratch = common_launch.grid(pairs.a, triton.cdiv(tensors["items"], BLOCK))
    outputs = {"loss": loss, "stats": stats, "denominator": denominator}
    with common_launch.on_device_of(pairs.a):
        forward_kernel[grid](
            **tensors, **outputs, **constants, **scratch, LOSS=loss_function, STATS=return_stats, num_warps=WARPS
        )
    return loss, stats, denominator


def backward(
    pairs: Pairs, gradient_function: object, grad_output: Tensor, denominator: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a, b and p; None where not needed."""

    def empty(like: Tensor | None, need: bool) -> Tensor | None:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device) if need else None

    gradients = tuple(empty(t, need) for t, need in zip((pairs.a, pairs.b, pairs.p), needs, strict=True))
    tensors, constants = pairs.arguments(grad_output)
    grid, scratch = common_launch.grid(pairs.a, triton.cdiv(tensors["items"], BLOCK))
    outputs = {
        name: pairs.a if gradient is None else gradient
        for name, gradient in zip(("grad_a", "grad_b", "grad_p"), gradients, strict=True)
    }
    flags = {"NEED_A": needs[0], "NEED_B": needs[1], "NEED_P": needs[2]}
    flags["SUM_P"] = bool(needs[2]) and pairs.p.dim() == 0
    with common_launch.on_device_of(pairs.a):
        backward_kernel[grid](
            **tensors,
            **outputs,
            **constants,
            **scratch,
            **flags,
            denominator=denominator,
            GRADIENT=gradient_function,
            num_warps=WARPS,
        )
    return gradients
