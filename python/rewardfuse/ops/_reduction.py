"""Reductions, written once for every reference op."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardfuse.ops._checks import REDUCTIONS


def reduce(values: Tensor, valid: Tensor, reduction: int, normalizer: Tensor | None, normalizer_value: float) -> Tensor:
    """Losses per pair or list, ``[*]``, to what was asked for. Sums run in float64, as the kernels do."""
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
