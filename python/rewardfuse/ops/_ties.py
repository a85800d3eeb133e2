"""The Plackett–Luce loss of items sorted by rank, some of which may be tied."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardfuse.ops import _checks, _rankings
from rewardfuse.ops._reduction import reduce
from rewardfuse.ops._stages import Stages


def tied_loss(call: Stages, items: _rankings.Sorted, limit: Tensor | int, ties: str, lists: Tensor | None) -> Tensor:
    """The loss of items sorted by rank; `limit` is top_k by place, `lists` the list of each place where packed."""
    scores = call.scores
    dtype = torch.float64 if scores.dtype is torch.float64 else torch.float32
    looks = _checks.values_are_checked(scores) and scores.device.type == "cpu"
    if looks and not items.has_ties():
        return call.loss(order=items.order)
    groups = _rankings.groups_of(items)
    weights = _rankings.tie_weights(groups, items.valid, call.position_weight, limit, ties == "breslow", dtype)
    call.position_weight, call.item_weight = weights
    call.top_k, call.top_k_value = None, 0
    return call.loss(order=items.order) if ties == "breslow" else _efron_loss(call, items, groups, lists, dtype)


def _efron_loss(
    call: Stages, items: _rankings.Sorted, groups: _rankings.Groups, lists: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Stages of the groups' means, and what exchanging scores for means leaves over: Σ v·(s' − s).

    All in float64: means of scores that lie far apart would lose digits.
    """
    call.check()
    wide, device = torch.float64, call.scores.device
    weight = torch.as_tensor(call.weight_value if call.weight is None else call.weight, dtype=wide, device=device)
    weight = weight.expand(call.list_shape())
    counted = items.valid & ((weight.unsqueeze(-1) if lists is None else weight[lists]) != 0)
    ranked = torch.where(counted, call.scores.to(wide).gather(-1, items.at), 0)
    ranked = ranked - ranked.detach().gather(-1, groups.start - groups.first)  # of no effect on the likelihood
    means = _rankings.tie_mean(ranked, groups)
    left = torch.where(call.item_weight == 0, 0, call.item_weight * (means - ranked))
    if lists is None:
        left, there = left.sum(-1), items.valid.any(-1)
    else:
        sizes = call.cu_seqlens.diff()
        left, there = torch.segment_reduce(left, "sum", lengths=sizes, unsafe=True, initial=0), sizes > 0
    if call.mask is not None:
        call.mask, call.lengths = None, call.mask.sum(-1)  # what is there now stands in front
    reduction = (call.reduction, call.normalizer, call.normalizer_value)
    call.reduction, call.normalizer, call.normalizer_value = _checks.REDUCTIONS["none"], None, 0.0
    losses = call.loss(scores=means) + torch.where(weight != 0, weight * left, 0)
    return reduce(losses, there, *reduction).to(dtype)
