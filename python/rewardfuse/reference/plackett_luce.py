"""Plackett–Luce in plain torch; arguments as backends take them, formula in ops/plackett_luce.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewardfuse.ops._lists import pad_index, spread_lists, valid_items
from rewardfuse.ops._reduction import reduce


def plackett_luce_loss(
    scores: Tensor,
    order: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    top_k: Tensor | None,
    position_weight: Tensor | None,
    item_weight: Tensor | None,
    weight: Tensor | None,
    normalizer: Tensor | None,
    top_k_value: int,
    weight_value: float,
    normalizer_value: float,
    reduction: int,
) -> Tensor:
    """Σ over stages of u·L − v·s, where u is `position_weight` and v is `item_weight` (u where absent).

    Both are ``[N]`` or ``[*, N]`` by position in the ranking, or ``[total]`` for packed lists; `top_k_value` 0 is none.
    """
    if cu_seqlens is not None:
        index, lengths = pad_index(cu_seqlens.long(), scores.numel())
        inside = (cu_seqlens[:-1] >= 0) & (cu_seqlens[1:] <= scores.numel()) & (lengths >= 0)
        if index.shape[-1] == 0:
            index = index.new_zeros(index.shape)
        scores, order, position_weight, item_weight = (
            t if t is None else t[index] for t in (scores, order, position_weight, item_weight)
        )
    shape, size = scores.shape[:-1], scores.shape[-1]
    lengths = None if lengths is None else lengths.long()
    valid = valid_items(scores.shape, scores.device, lengths, mask)
    count = lengths if lengths is not None else valid.sum(-1)
    if cu_seqlens is None:
        inside = (count >= 0) & (count <= size)
    stage = torch.arange(size, device=scores.device)
    there = stage < count.unsqueeze(-1)
    if order is not None:
        inside = inside & _permutes(order, there, valid)
    elif mask is not None:
        order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
    weight = spread_lists(weight_value if weight is None else weight, shape, scores)
    counted = there & (weight != 0).unsqueeze(-1)

    ranked = scores if order is None else scores.gather(-1, order.long().clamp(0, max(size - 1, 0)))
    nll = _likelihood(ranked.to(weight.dtype), counted, position_weight, item_weight, top_k, top_k_value)
    inside = inside if top_k is None else inside & (top_k >= 1)
    known = inside & ~torch.where(counted, ranked, 0).isnan().any(-1)
    nll = nll * torch.where(known, 1.0, torch.nan)  # and so is the gradient
    losses = torch.where(weight != 0, weight * nll, torch.zeros_like(nll))
    losses = _Once.apply(losses)
    return reduce(losses, (count > 0) | ~inside, reduction, normalizer, normalizer_value)


class _Once(torch.autograd.Function):
    """The same values. logcumsumexp's second derivative is NaN where a weight is 0, so none is given."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor) -> Tensor:
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError("plackett_luce_loss: a second derivative (create_graph=True) is not implemented")
        return gradient


def _permutes(order: Tensor, there: Tensor, valid: Tensor) -> Tensor:
    """Whether the first entries of each list's order name every valid item once, ``[*]``."""
    size = order.shape[-1]
    index = torch.where(there & (order >= 0) & (order < size), order.long(), size)
    seen = torch.zeros(*order.shape[:-1], size + 1, dtype=torch.bool, device=order.device).scatter(-1, index, True)
    return (seen[..., :size] == valid).all(-1)


def _likelihood(
    scores: Tensor,
    counted: Tensor,
    position_weight: Tensor | None,
    item_weight: Tensor | None,
    top_k: Tensor | None,
    top_k_value: int,
) -> Tensor:
    """Negative log-likelihood of each list, ``[*]``; scores ``[*, N]`` best first."""
    size = scores.shape[-1]
    if size == 0:
        return scores.sum(-1)
    zero = torch.zeros((), dtype=scores.dtype, device=scores.device)
    # Far below every score, but finite: logcumsumexp's gradient is NaN at −inf.
    nothing = torch.full_like(zero, torch.finfo(scores.dtype).min / 4)
    highest = torch.where(counted, scores, nothing).detach().amax(-1, keepdim=True)
    scores = scores - highest  # of no effect on the likelihood, but logcumsumexp's gradient would lose log 2 at 1e9
    suffix = torch.where(counted & (scores > nothing), scores, nothing).flip(-1).logcumsumexp(-1).flip(-1)
    place = torch.arange(size, device=scores.device)
    limit = top_k_value or size if top_k is None else top_k.unsqueeze(-1)
    stages = counted & (place < limit)
    if position_weight is None and item_weight is None:
        terms = suffix - scores
    else:
        weight = torch.where(stages, 1 if position_weight is None else position_weight.to(scores.dtype), zero)
        observed, stages = stages, stages & (weight != 0)
        terms = weight * (suffix - scores)
    if item_weight is not None:
        item = torch.where(observed, item_weight.to(scores.dtype), zero)
        stages = stages | (item != 0)
        terms = weight * suffix - item * scores
    return torch.where(stages, terms, zero).sum(-1, dtype=torch.float64).to(scores.dtype)
