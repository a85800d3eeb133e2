"""What the reference ops on pairs share: selection of the pairs that count, and reductions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rewardfuse.ops._checks import REDUCTIONS


class Pairs(NamedTuple):
    """Values in the accumulation type, ``[*]``, 0 where a pair does not count: NaN there meets no arithmetic."""

    a: Tensor
    b: Tensor
    p: Tensor
    q: Tensor
    weight: Tensor
    valid: Tensor  #: mask true
    counted: Tensor  #: and weight not 0


def select_pairs(
    a: Tensor, b: Tensor, p: Tensor | float, q: Tensor | float, weight: Tensor | float, mask: Tensor | None
) -> Pairs:
    """Pairs ready for arithmetic; p, q and weight are numbers, 0-d or ``[*]``."""
    dtype = torch.float64 if a.dtype is torch.float64 else torch.float32

    def spread(value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=a.device).expand(a.shape)

    weight = spread(weight)
    valid = torch.ones_like(a, dtype=torch.bool) if mask is None else mask
    counted = valid & (weight != 0)
    zero = torch.zeros((), dtype=dtype, device=a.device)

    def select(value: Tensor | float) -> Tensor:
        return torch.where(counted, spread(value), zero)

    return Pairs(select(a), select(b), select(p), select(q), select(weight), valid, counted)


def reduce(values: Tensor, valid: Tensor, reduction: int, normalizer: Tensor | None, normalizer_value: float) -> Tensor:
    """Per-pair losses ``[*]`` to what was asked for. Sums run in float64, as the kernels' do across registers."""
    if reduction == REDUCTIONS["none"]:
        return values
    total = values.sum(dtype=torch.float64)
    if reduction == REDUCTIONS["mean"]:
        if normalizer is not None:
            total = total / normalizer
        elif normalizer_value != 0:
            total = total / normalizer_value
        else:
            total = total / valid.sum().clamp(min=1)
    return total.to(values.dtype)
