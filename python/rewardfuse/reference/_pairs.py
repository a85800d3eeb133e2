"""What the reference ops on pairs share: selection of the pairs that count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
