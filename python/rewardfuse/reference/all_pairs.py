"""All ordered pairs of a list in plain torch; arguments as backends take them, formula in ops/all_pairs.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rewardfuse.ops._lists import spread_lists, valid_items
from rewardfuse.ops._reduction import reduce


class _MeanOverPairs(torch.autograd.Function):
    """Mean loss over each list's pairs, ``[*]``, and how many there are. One distance between the two items' places
    at a time, so that memory stays O(K); the gradient is formed along with the loss."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, labels: Tensor, valid: Tensor, margin: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        size = scores.shape[-1]
        total = scores.new_zeros(scores.shape[:-1], dtype=torch.float64)
        gradient = torch.zeros_like(scores)
        pairs = torch.zeros_like(total)
        for distance in range(1, size):
            first, second = slice(0, size - distance), slice(distance, size)
            sign = torch.sign(labels[..., first] - labels[..., second]).to(scores.dtype)
            is_pair = valid[..., first] & valid[..., second] & (sign != 0)
            gap = (labels[..., first] - labels[..., second]).abs().to(scores.dtype)
            z = sign * (scores[..., first] - scores[..., second]) - margin * gap
            zero = torch.zeros_like(z)
            total += torch.where(is_pair, -logsigmoid(z), zero).sum(-1, dtype=torch.float64)
            slope = torch.where(is_pair, -sign * torch.sigmoid(-z), zero)
            gradient[..., first] += slope
            gradient[..., second] -= slope
            pairs += is_pair.sum(-1)
        mean = (total / pairs.clamp(min=1)).to(scores.dtype)
        ctx.save_for_backward(gradient, pairs.clamp(min=1).to(scores.dtype))
        ctx.mark_non_differentiable(pairs)
        return mean, pairs

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise NotImplementedError("all_pairs_loss: a second derivative (create_graph=True) is not implemented")
        gradient, pairs = ctx.saved_tensors
        scale = (grad_mean / pairs).unsqueeze(-1)
        return torch.where(gradient == 0, gradient, scale * gradient), None, None, None


def all_pairs_loss(
    scores: Tensor,
    labels: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    margin: Tensor | None,
    weight: Tensor | None,
    normalizer: Tensor | None,
    margin_value: float,
    weight_value: float,
    normalizer_value: float,
    reduction: int,
) -> Tensor:
    """The loss."""
    valid = valid_items(scores.shape, scores.device, lengths, mask)
    weight = spread_lists(weight_value if weight is None else weight, scores.shape[:-1], scores)
    counted = valid & (weight != 0).unsqueeze(-1)
    labels = labels.double()
    lengths = None if lengths is None else lengths.long()
    values = torch.where(counted, scores.to(weight.dtype), torch.zeros((), dtype=weight.dtype, device=scores.device))
    means, _ = _MeanOverPairs.apply(values, labels, counted, margin_value if margin is None else margin)
    has_pair = _has_pair(labels, valid)
    bad = (counted & ~labels.isfinite()).any(-1)
    if lengths is not None:
        bad = bad | (lengths < 0) | (lengths > scores.shape[-1])
    means = means * torch.where(bad, torch.nan, 1.0)  # and so is the gradient
    losses = torch.where(weight != 0, weight * means, torch.zeros_like(means))
    return reduce(losses, has_pair, reduction, normalizer, normalizer_value)


def _has_pair(labels: Tensor, valid: Tensor) -> Tensor:
    """Whether two valid items differ in label, ``[*]``; one whose label is NaN has no pair."""
    if labels.shape[-1] == 0:
        return torch.zeros(labels.shape[:-1], dtype=torch.bool, device=labels.device)
    known = valid & (labels == labels)
    return torch.where(known, labels, -torch.inf).amax(-1) > torch.where(known, labels, torch.inf).amin(-1)
