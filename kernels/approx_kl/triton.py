"""KL estimates in Triton: maths as in math.h, kernels as in pairwise/triton.py.

With x = logprob − ref_logprob: k1 = x, k2 = x²/2, k3 = e^{−x} − 1 + x, abs = |x|; formulas in ops/approx_kl.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rewardfuse.kernels.pairwise import launch as pairwise
from rewardfuse.kernels.pairwise.triton import NONE
from torch import Tensor

K1, K2, K3, ABS = (tl.constexpr(code) for code in range(4))
SATURATION = tl.constexpr(80.0)  # k3's exponent is held here


@triton.jit
def _exp(x):
    """e^x to a few ulp for any x up to 80: in float32 what x · log2 e rounds off would come to 3e-6 there."""
    x = tl.where(x < -100, -100.0, x)  # beside 1 as good as 0
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - n * 0.693359375) + n * 2.1219444005469057e-4  # the first product is exact
    return tl.exp2(n) * tl.exp(rest)


@triton.jit
def _k3(x, TERMS: tl.constexpr):
    """By its series up to |x| = 1, where the difference would cancel."""
    x = tl.where(x < -SATURATION, -SATURATION, x)
    near = tl.abs(x) <= 1
    small = tl.where(near, x, 0.0)
    series = tl.zeros_like(x) + 1.0
    for k in tl.static_range(TERMS + 4, 2, -1):
        series = 1.0 - series * (small * (1.0 / k))
    far = tl.where(near, 1.0, x)
    return tl.where(near, (0.5 * small * small) * series, (_exp(-far) - 1.0) + far)


@triton.jit
def estimate(x, estimator, TERMS: tl.constexpr):
    """The estimator's value; `estimator` is a number, since an estimate is far cheaper than reading its logprobs."""
    value = x
    if estimator == K2:
        value = x * (x * 0.5)
    if estimator == K3:
        value = _k3(x, TERMS)
    if estimator == ABS:
        value = tl.abs(x)
    return value


@triton.jit
def slope(x, estimator, TERMS: tl.constexpr):
    """The estimator's derivative."""
    value = tl.zeros_like(x) + 1.0
    if estimator == K2:
        value = x
    if estimator == K3:
        near = tl.abs(x) <= 1
        far = tl.where(near, 1.0, x)
        value = tl.where(near, x - _k3(x, TERMS), 1.0 - _exp(tl.where(far < -SATURATION, 0.0, -far)))
    if estimator == ABS:
        value = (x > 0).to(x.dtype) - (x < 0).to(x.dtype)
    return value


@triton.jit
def _held(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _outside(x, low, high):
    return (x < low) | (x > high)  # a NaN is not


@triton.jit
def clamped(a, b, weight, estimator, input_low, input_high, output_low, output_high, TERMS: tl.constexpr):
    """The estimate as it is returned."""
    value = weight * estimate(_held(a - b, input_low, input_high), estimator, TERMS)
    return _held(value, output_low, output_high)


@triton.jit
def derivative(a, b, weight, estimator, through, input_low, input_high, output_low, output_high, TERMS: tl.constexpr):
    """(d/d a, d/d weight) of the estimate; `through` is the estimator that gives the first, −1 for the value's own."""
    x = a - b
    of_value = estimate(_held(x, input_low, input_high), estimator, TERMS)
    beyond = _outside(weight * of_value, output_low, output_high)
    d_a = weight * slope(x, tl.where(through < 0, estimator, through), TERMS)
    own = tl.zeros_like(x) + through < 0
    stopped = own & (beyond | _outside(x, input_low, input_high))
    return tl.where(stopped, 0.0, d_a), tl.where(beyond, 0.0, of_value)


@triton.jit
def _value(a, b, weight, _, estimator, through, o2, o3, o4, o5, TERMS: tl.constexpr):
    return clamped(a, b, weight, estimator, o2, o3, o4, o5, TERMS)


@triton.jit
def _gradient(a, b, weight, _, estimator, through, o2, o3, o4, o5, TERMS: tl.constexpr):
    d_a, d_weight = derivative(a, b, weight, estimator, through, o2, o3, o4, o5, TERMS)
    return d_a, -d_a, d_weight


class _ApproxKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, ref_logprobs, weight, mask, numbers):
        pairs = pairwise.Pairs(logprobs, ref_logprobs, weight, None, None, mask, None, numbers, NONE.value)
        value, _, denominator = pairwise.forward(pairs, _value, return_stats=False)
        ctx.save_for_backward(logprobs, ref_logprobs, weight, mask, denominator)
        ctx.numbers = numbers
        return value

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise NotImplementedError("approx_kl: a second derivative (create_graph=True) is not implemented")
        logprobs, ref_logprobs, weight, mask, denominator = ctx.saved_tensors
        pairs = pairwise.Pairs(logprobs, ref_logprobs, weight, None, None, mask, None, ctx.numbers, NONE.value)
        needs = (ctx.needs_input_grad[0], False, ctx.needs_input_grad[2])
        of_logprobs, _, of_weight = pairwise.backward(pairs, _gradient, grad, denominator, needs)
        return of_logprobs, None, of_weight, None, None


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
    """The estimate at each token, ``[*]``; arguments as every backend takes them."""
    options = (estimator, gradient_estimator, input_low, input_high, output_low, output_high)
    numbers = tuple(map(float, (importance_weight_value, 1.0, 0.0, 0.0, *options)))  # no other weight, no observation
    return _ApproxKL.apply(logprobs, ref_logprobs, importance_weight, mask, numbers)
