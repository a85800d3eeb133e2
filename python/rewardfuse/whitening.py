"""Whitening of what counts."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardfuse.ops import _checks

_EPSILON = 1e-8


def masked_whiten(values: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    r"""Values with variance 1, and mean 0 unless ``shift_mean`` is False, over the places where the mask is True.

    .. math:: y = \frac{x - μ}{\sqrt{σ^2 + 10^{-8}}} \; (+ μ)

    with the mean :math:`μ` and the unbiased variance :math:`σ^2` (n − 1) over all valid places of the tensor.

    Args:
        values: any shape; float16, bfloat16, float32 or float64.
        mask: boolean, the shape of ``values``; where False the result is 0, whatever stands there. None: everywhere.
        shift_mean: False adds the mean again.

    Returns:
        The shape of ``values``; float32, float64 for float64. Of a single valid value the variance is taken as 0; of
        none the result is 0.

    Mean and variance are computed in float64; gradients flow through both. Nothing waits for a GPU. Written in torch's
    own operations on every backend.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that it cannot have.
        ValueError: the mask has another shape or device.

    Source: Huang et al. 2024, "The N+ implementation details of RLHF with PPO", detail on reward whitening.

    >>> import torch, rewardfuse
    >>> rewardfuse.masked_whiten(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False]))
    tensor([-0.7071,  0.7071,  0.0000])
    """
    _checks.check_tensors(values=values)
    _checks.check_rewards("values", values)
    _checks.check_options(mask)
    _checks.check_mask(mask, "values", values)
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    dtype = torch.float64 if values.dtype is torch.float64 else torch.float32
    count = mask.sum()
    selected = torch.where(mask, values, 0).double()
    mean = selected.sum() / count.clamp(min=1)
    centered = torch.where(mask, selected - mean, 0)
    variance = centered.square().sum() / (count - 1).clamp(min=1)
    whitened = centered * (variance + _EPSILON).rsqrt()
    return (whitened if shift_mean else torch.where(mask, whitened + mean, 0)).to(dtype)
