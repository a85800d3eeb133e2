"""Ranks, with ties or without, as what the kernels take: an order, and weights by position.

A group of tied items enters the likelihood Σ u·L − v·s through two weights by position: v is the group's mean position
weight w̄ (Breslow and Efron alike); Breslow's u is the group's whole weight m·w̄ at its first place and 0 at the rest,
since all its stages share the first one's denominator. Efron's denominators R − (j/m)·G are those of ordinary stages
once each score of the group is replaced by log(G/m): then u = v = w̄.

Everything here runs on the device without waiting for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sorted(NamedTuple):
    """Items sorted by rank; padded ``[*, N]`` with places counted within a list, or packed ``[total]`` with places
    counted over all lists."""

    order: Tensor  #: int64; index within the list of the item at each place
    at: Tensor  #: int64; the same as an index into ranks and scores
    begins: Tensor  #: bool; a list or another rank begins here
    valid: Tensor  #: bool; an item stands here
    origin: Tensor | int  #: int64; place where the list begins

    def has_ties(self) -> bool:
        """Whether two items of a list have one rank. Waits for the device."""
        return bool((self.valid & ~self.begins).any())


class Groups(NamedTuple):
    """How sorted items tie, by place."""

    start: Tensor  #: int64; place where the tied group of this place begins
    size: Tensor  #: int64; how many items the group has
    first: Tensor  #: int64; `start` counted within the list


def sort_padded(ranks: Tensor, valid: Tensor) -> Sorted:
    """Padded lists sorted; ranks and validity ``[*, N]``."""
    keys, order = torch.where(valid, ranks.double(), torch.inf).sort(dim=-1, stable=True)
    place = torch.arange(ranks.shape[-1], device=ranks.device)
    begins = (place == 0) | (keys != keys.roll(1, -1))
    return Sorted(order, order, begins, place < valid.sum(-1, keepdim=True), 0)


def sort_packed(ranks: Tensor, cu_seqlens: Tensor, lists: Tensor) -> Sorted:
    """Packed lists sorted; ranks ``[total]``, the list of each item ``[total]``."""
    by_rank = ranks.double().argsort(stable=True)
    at = by_rank[lists[by_rank].argsort(stable=True)]
    keys, place, origin = ranks[at], torch.arange(ranks.numel(), device=ranks.device), cu_seqlens[lists]
    begins = (place == origin) | (keys != keys.roll(1))
    return Sorted(at - origin, at, begins, torch.ones_like(begins), origin)


def groups_of(items: Sorted) -> Groups:
    """The tied groups of sorted items; alone is a group of one."""
    start, size = _runs(items.begins, torch.arange(items.begins.shape[-1], device=items.begins.device))
    return Groups(start, size, start - items.origin)


def list_of_item(cu_seqlens: Tensor, total: int) -> Tensor:
    """The list that each packed item belongs to, int64 ``[total]``."""
    place = torch.arange(total, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True).clamp(max=max(cu_seqlens.numel() - 2, 0))


def _runs(begins: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Start and length of the run around each place, from where runs begin."""
    count = begins.shape[-1]
    if count == 0:
        return begins.long(), begins.long()
    start = torch.where(begins, place, 0).cummax(-1).values
    after = torch.nn.functional.pad(torch.where(begins, place, count)[..., 1:], (0, 1), value=count)
    end = after.flip(-1).cummin(-1).values.flip(-1)
    return start, end - start


def tie_weights(
    groups: Groups,
    valid: Tensor,
    position_weight: Tensor | None,
    limit: Tensor | int,
    breslow: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(u, v) by place; `position_weight` ``[N]`` or by place; `limit`: top_k by place, where below 1 gives NaN."""
    observed = valid & (groups.first < limit)
    if position_weight is None:
        mean = torch.ones_like(groups.size, dtype=dtype)
    else:
        weights = torch.where(observed, position_weight.double(), 0.0)
        mean = (_over_groups(weights.expand(groups.size.shape), groups.start, groups.size, "sum") / groups.size).to(
            dtype
        )
    item_weight = torch.where(observed, mean, 0)
    if isinstance(limit, Tensor):
        item_weight = torch.where(limit < 1, torch.nan, item_weight)
    if not breslow:
        return item_weight, item_weight
    place = torch.arange(groups.start.shape[-1], device=groups.start.device)
    return torch.where(groups.start == place, item_weight * groups.size, 0), item_weight


class _TieMean(torch.autograd.Function):
    """s'_i = log(1/m Σ_group e^s), by place. The sums are segment reductions, which unlike scattered additions give
    the same bits every time; the gradient is the group's share, e^{s_i}/G · Σ_group (the gradients)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, start: Tensor, size: Tensor) -> Tensor:
        highest = _over_groups(scores, start, size, "max")
        share = torch.exp(scores - highest)
        total = _over_groups(share, start, size, "sum")
        ctx.save_for_backward(share / total, start, size)
        return torch.where(size == 1, scores, highest + torch.log(total / size))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise NotImplementedError("plackett_luce_loss: a second derivative (create_graph=True) is not implemented")
        share, start, size = ctx.saved_tensors
        return share * _over_groups(gradient.contiguous(), start, size, "sum"), None, None


def _over_groups(values: Tensor, start: Tensor, size: Tensor, reduce: str) -> Tensor:
    """The reduction over each place's group. Groups lie end to end, so places that begin none are segments of length
    0."""
    if values.numel() == 0:
        return values
    place = torch.arange(values.shape[-1], device=values.device)
    lengths = torch.where(start == place, size, 0)
    return (
        torch.segment_reduce(
            values.flatten(),
            reduce,
            lengths=lengths.flatten(),
            unsafe=True,
            initial=-torch.inf if reduce == "max" else 0,
        )
        .view(values.shape)
        .gather(-1, start)
    )


def tie_mean(scores: Tensor, groups: Groups) -> Tensor:
    """log of the mean of e^s over each place's tied group, differentiable; scores by place."""
    return _TieMean.apply(scores.contiguous(), groups.start, groups.size)
