"""KL estimators in plain torch; arguments as backends take them, formulas in ops/approx_kl.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

K1, K2, K3, ABS = range(4)
#: k3's exponent is held here.
SATURATION = 80.0


def approx_kl(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    importance_weight: Tensor | None,
    mask: Tensor | None,
    importance_weight_value: float,
    estimator: int,
    gradient_estimator: int,
    input_low: float,
    input_high: float,
    output_low: float,
    output_high: float,
) -> Tensor:
    """The estimate at each token, ``[*]``."""
    dtype = torch.float64 if logprobs.dtype is torch.float64 else torch.float32
    weight = importance_weight_value if importance_weight is None else importance_weight
    weight = torch.as_tensor(weight, dtype=dtype, device=logprobs.device)
    x = select(mask, logprobs).to(dtype) - select(mask, ref_logprobs.detach()).to(dtype)
    weight = select(mask, weight.expand(x.shape))
    value = _clamp(weight * _estimate(_clamp(x, input_low, input_high), estimator), output_low, output_high)
    if gradient_estimator >= 0:
        constant = _clamp(x.detach(), input_low, input_high)
        value = _clamp(weight * _estimate(constant, estimator), output_low, output_high)
        value = _WithGradientOf.apply(value, weight.detach() * _estimate(x, gradient_estimator))
    return select(mask, value)


class _WithGradientOf(torch.autograd.Function):
    """The first argument, whose gradient goes to the second as well."""

    @staticmethod
    def forward(ctx, value: Tensor, other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def select(mask: Tensor | None, values: Tensor) -> Tensor:
    """Values where the mask is True, 0 elsewhere."""
    return values if mask is None else torch.where(mask, values, 0)


def _clamp(x: Tensor, low: float, high: float) -> Tensor:
    """As torch.clamp, but a NaN passes its gradient on too: it is nowhere outside."""
    if low > -math.inf:
        x = torch.where(x < low, low, x)
    return torch.where(x > high, high, x) if high < math.inf else x


def _estimate(x: Tensor, estimator: int) -> Tensor:
    if estimator == K1:
        return x
    if estimator == K2:
        return x * (x / 2)
    if estimator == ABS:
        return x.abs()
    x = _clamp(x, -SATURATION, math.inf)
    near = x.abs() <= 1
    small = torch.where(near, x, 0)
    far = torch.where(near, 2, x)
    return torch.where(near, _series(small), torch.expm1(-far) + far)


def _series(x: Tensor) -> Tensor:
    """e^{−x} − 1 + x = x² Σ (−x)^n / (n + 2)! for |x| ≤ 1, to the last bits."""
    terms = 18 if x.dtype is torch.float64 else 10
    total = torch.zeros_like(x)
    for n in reversed(range(terms)):
        total = 1 / math.factorial(n + 2) - x * total
    return x * x * total
