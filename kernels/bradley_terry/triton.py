"""Bradley–Terry in Triton: maths as in math.h, kernels as in pairwise/triton.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rewardfuse.kernels.pairwise import launch as pairwise
from rewardfuse.kernels.pairwise.triton import exp_nonpositive, log1p_unit
from torch import Tensor

from rewardfuse import reference


@triton.jit
def _loss(chosen, rejected, margin, target, smoothing, beta, center, TERMS: tl.constexpr):
    z = (chosen * 0.5 - rejected * 0.5) * (2.0 * beta) - margin
    t = target * (1.0 - 2.0 * smoothing) + smoothing
    against = tl.where(z < 0, t, 1.0 - t)
    loss = log1p_unit(exp_nonpositive(-tl.abs(z)), TERMS) + tl.where(against == 0, 0.0, against * tl.abs(z))
    half_sum = chosen * 0.5 + rejected * 0.5
    loss += tl.where(center == 0, 0.0, (half_sum * (4.0 * center)) * half_sum)
    return tl.where((target >= 0) & (target <= 1), loss, float("nan"))


@triton.jit
def _gradient(chosen, rejected, margin, target, smoothing, beta, center, TERMS: tl.constexpr):
    z = (chosen * 0.5 - rejected * 0.5) * (2.0 * beta) - margin
    t = target * (1.0 - 2.0 * smoothing) + smoothing
    t = tl.where((target >= 0) & (target <= 1), t, float("nan"))
    e = exp_nonpositive(-tl.abs(z))
    likely = 1.0 / (1.0 + e)
    unlikely = e * likely
    d_z = (1.0 - t) * tl.where(z < 0, unlikely, likely) - t * tl.where(z < 0, likely, unlikely)
    d_center = tl.where(center == 0, 0.0, (chosen * 0.5 + rejected * 0.5) * (4.0 * center))
    return d_z * beta + d_center, d_center - d_z * beta, -d_z


class _BradleyTerry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen, rejected, margin, mask, weight, target, normalizer, numbers, reduction, return_stats):
        pairs = pairwise.Pairs(chosen, rejected, margin, target, weight, mask, normalizer, numbers, reduction)
        loss, stats, denominator = pairwise.forward(pairs, _loss, return_stats)
        ctx.save_for_backward(chosen, rejected, margin, mask, weight, target, normalizer, denominator)
        ctx.numbers, ctx.reduction = numbers, reduction
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, grad_loss, _):
        chosen, rejected, margin, mask, weight, target, normalizer, denominator = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: the plain-torch loss can be differentiated again
            gradients = _differentiable_gradients(ctx, grad_loss, needs)
        else:
            pairs = pairwise.Pairs(
                chosen, rejected, margin, target, weight, mask, normalizer, ctx.numbers, ctx.reduction
            )
            gradients = pairwise.backward(pairs, _gradient, grad_loss, denominator, needs)
        return (*gradients, *[None] * 7)


def _differentiable_gradients(ctx, grad_loss: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    # Differentiated at aliases: a saved input may itself be a function of another.
    saved = [t if t is None else t.view_as(t) for t in ctx.saved_tensors[:-1]]
    chosen, rejected, margin = saved[:3]
    margin_value, weight_value, target_value, normalizer_value, *options = ctx.numbers
    values = (margin_value, weight_value, target_value, normalizer_value, *options)
    loss, _ = reference.bradley_terry_loss(*saved, *values, ctx.reduction, False)
    wanted = [t for t, need in zip((chosen, rejected, margin), needs, strict=True) if need]
    gradients = iter(torch.autograd.grad(loss, wanted, grad_loss, create_graph=True))
    return [next(gradients) if need else None for need in needs]


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    target: Tensor | None,
    normalizer: Tensor | None,
    margin_value: float,
    weight_value: float,
    target_value: float,
    normalizer_value: float,
    label_smoothing: float,
    beta: float,
    center_rewards_coefficient: float,
    reduction: int,
    return_stats: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, stats ``[5]`` or ``[0]``); arguments as every backend takes them."""
    numbers = (margin_value, weight_value, target_value, normalizer_value)
    numbers = tuple(map(float, (*numbers, label_smoothing, beta, center_rewards_coefficient)))
    tensors = (chosen, rejected, margin, mask, weight, target, normalizer)
    return _BradleyTerry.apply(*tensors, numbers, reduction, return_stats)
