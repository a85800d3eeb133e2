"""Comparisons with ties in Triton: maths as in math.h, kernels as in pairwise/triton.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rewardfuse.kernels.pairwise import launch as pairwise
from rewardfuse.kernels.pairwise.triton import exp_nonpositive, log1p_unit
from torch import Tensor


@triton.jit
def _known(outcome):
    return (outcome == 0) | (outcome == 0.5) | (outcome == 1)


@triton.jit
def _softplus(x, TERMS: tl.constexpr):
    return log1p_unit(exp_nonpositive(-tl.abs(x)), TERMS) + tl.where(x > 0, x, 0.0)


@triton.jit
def _sigmoid(x):
    e = exp_nonpositive(-tl.abs(x))
    likely = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * likely, likely)


@triton.jit
def _one_minus_exp(x, TERMS: tl.constexpr):
    """1 − e^{−x} for x ≥ 0: by its series up to log 2, where the difference would cancel."""
    small = tl.where(x < 0.75, x, 0.0)
    series = tl.zeros_like(x) + 1.0
    for k in tl.static_range(TERMS + 3, 1, -1):
        series = 1.0 - series * small / k
    return tl.where(x < 0.75, small * series, 1.0 - exp_nonpositive(-x))


@triton.jit
def _minus_log_one_minus_exp(x, TERMS: tl.constexpr):
    e = exp_nonpositive(-x)
    far = e <= 0.5
    e = tl.where(far, e, 0.0)
    return tl.where(far, log1p_unit(e / (1.0 - e), TERMS), -tl.log(_one_minus_exp(x, TERMS)))


@triton.jit
def _rao_kupper_loss(first, second, log_tie, outcome, o0, o1, o2, TERMS: tl.constexpr):
    d = (first * 0.5 - second * 0.5) * 2.0
    above = log_tie + d
    below = log_tie - d
    tie = _softplus(-above, TERMS) + _softplus(-below, TERMS) + _minus_log_one_minus_exp(log_tie * 2.0, TERMS)
    decided = _softplus(tl.where(outcome == 1, below, above), TERMS)
    good = _known(outcome) & (log_tie >= 0)
    return tl.where(good, tl.where(outcome == 0.5, tie, decided), float("nan"))


@triton.jit
def _rao_kupper_gradient(first, second, log_tie, outcome, o0, o1, o2, TERMS: tl.constexpr):
    d = (first * 0.5 - second * 0.5) * 2.0
    above = log_tie + d
    below = log_tie - d
    win = _sigmoid(below)
    loss = _sigmoid(above)
    not_above = _sigmoid(-above)
    not_below = _sigmoid(-below)
    tie = -not_above - not_below - 2.0 * exp_nonpositive(log_tie * -2.0) / _one_minus_exp(log_tie * 2.0, TERMS)
    d_first = tl.where(outcome == 1, -win, tl.where(outcome == 0, loss, not_below - not_above))
    d_log_tie = tl.where(outcome == 1, win, tl.where(outcome == 0, loss, tie))
    good = _known(outcome) & (log_tie >= 0)
    d_first = tl.where(good, d_first, float("nan"))
    return d_first, -d_first, tl.where(good, d_log_tie, float("nan"))


@triton.jit
def _davidson_weights(half, log_tie):
    largest = tl.maximum(tl.abs(half), log_tie)
    return (
        largest,
        exp_nonpositive(half - largest),
        exp_nonpositive(-half - largest),
        exp_nonpositive(log_tie - largest),
    )


@triton.jit
def _davidson_loss(first, second, log_tie, outcome, o0, o1, o2, TERMS: tl.constexpr):
    half = first * 0.5 - second * 0.5
    largest, w_first, w_second, w_tie = _davidson_weights(half, log_tie)
    seen = tl.where(outcome == 1, half, tl.where(outcome == 0, -half, log_tie))
    # log of 1 + x, x the two smaller weights, 0 ≤ x ≤ 2.
    x = tl.where(largest == log_tie, w_first + w_second, w_tie + tl.where(half > 0, w_second, w_first))
    over = x > 1
    tail = log1p_unit(tl.where(over, (x - 1.0) * 0.5, x), TERMS)
    tail = tl.where(over, tail + 0.69314718055994530942, tail)
    return tl.where(_known(outcome), (largest - seen) + tail, float("nan"))


@triton.jit
def _davidson_gradient(first, second, log_tie, outcome, o0, o1, o2, TERMS: tl.constexpr):
    half = first * 0.5 - second * 0.5
    _, w_first, w_second, w_tie = _davidson_weights(half, log_tie)
    scale = 1.0 / (w_first + w_second + w_tie)
    first_wins = w_first * scale
    second_wins = w_second * scale
    tie = w_tie * scale
    d_u_first = tl.where(outcome == 1, -(second_wins + tie), first_wins)
    d_u_second = tl.where(outcome == 0, -(first_wins + tie), second_wins)
    d_log_tie = tl.where(outcome == 0.5, -(first_wins + second_wins), tie)
    d_first = tl.where(_known(outcome), (d_u_first - d_u_second) * 0.5, float("nan"))
    return d_first, -d_first, tl.where(_known(outcome), d_log_tie, float("nan"))


_LOSSES = (_rao_kupper_loss, _davidson_loss)
_GRADIENTS = (_rao_kupper_gradient, _davidson_gradient)


class _BradleyTerryTie(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, second, log_tie, outcome, mask, weight, normalizer, numbers, model, reduction):
        pairs = pairwise.Pairs(first, second, log_tie, outcome, weight, mask, normalizer, numbers, reduction)
        loss, _, denominator = pairwise.forward(pairs, _LOSSES[model], False)
        ctx.save_for_backward(first, second, log_tie, outcome, mask, weight, normalizer, denominator)
        ctx.numbers, ctx.model, ctx.reduction = numbers, model, reduction
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "bradley_terry_tie_loss: a second derivative (create_graph=True) is not implemented"
            )
        first, second, log_tie, outcome, mask, weight, normalizer, denominator = ctx.saved_tensors
        pairs = pairwise.Pairs(first, second, log_tie, outcome, weight, mask, normalizer, ctx.numbers, ctx.reduction)
        needs = ctx.needs_input_grad[:3]
        return (*pairwise.backward(pairs, _GRADIENTS[ctx.model], grad_loss, denominator, needs), *[None] * 7)


def bradley_terry_tie_loss(
    first: Tensor,
    second: Tensor,
    outcome: Tensor | None,
    log_tie: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    normalizer: Tensor | None,
    outcome_value: float,
    log_tie_value: float,
    weight_value: float,
    normalizer_value: float,
    model: int,
    reduction: int,
) -> Tensor:
    """The loss; arguments as every backend takes them."""
    numbers = tuple(map(float, (log_tie_value, weight_value, outcome_value, normalizer_value, 0, 0, 0)))
    tensors = (first, second, log_tie, outcome, mask, weight, normalizer)
    return _BradleyTerryTie.apply(*tensors, numbers, model, reduction)
