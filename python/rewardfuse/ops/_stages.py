"""The call of a backend's Plackett–Luce: stages of choice with weights by position. What ops/plackett_luce.py makes of
its arguments ends here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewardfuse import _backend
from rewardfuse.ops import _checks, _lists


class Stages:
    """The arguments of one call, and the call of the backend with them."""

    def __init__(
        self,
        scores: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        top_k: Tensor | int | None,
        position_weight: Tensor | None,
        weight: Tensor | float | None,
        normalizer: Tensor | float | None,
        reduction: str,
    ) -> None:
        self.scores, self.lengths, self.mask, self.position_weight = scores, lengths, mask, position_weight
        self.cu_seqlens: Tensor | None = None
        self.item_weight: Tensor | None = None
        self.top_k, self.top_k_value = stage_count(top_k)
        self.weight, self.weight_value = _checks.tensor_or_number("weight", weight, 1.0)
        self.normalizer, self.normalizer_value = _checks.normalizer_or_none(normalizer)
        self.reduction = _checks.reduction_code(reduction)

    def list_shape(self) -> torch.Size:
        """``[*]``, or ``[lists]`` where packed."""
        return self.scores.shape[:-1] if self.cu_seqlens is None else self.cu_seqlens[1:].shape

    def arguments(self, scores: Tensor, order: Tensor | None) -> tuple[Any, ...]:
        """What a backend takes."""
        return (
            scores,
            order,
            self.cu_seqlens,
            self.lengths,
            self.mask,
            self.top_k,
            self.position_weight,
            self.item_weight,
            self.weight,
            self.normalizer,
            self.top_k_value,
            self.weight_value,
            self.normalizer_value,
            self.reduction,
        )

    def check(self) -> None:
        """Raises for what a backend would refuse."""
        _check(*self.arguments(self.scores, None))

    def loss(self, order: Tensor | None = None, scores: Tensor | None = None) -> Tensor:
        """The backend's loss; `scores` in place of the call's own where given."""
        scores = self.scores if scores is None else scores
        arguments = self.arguments(scores, order)
        namespace = _backend.namespace_for(scores)
        if not _backend.is_native(namespace):
            _check(*arguments)
        elif _backend.checks_enabled() and not torch.compiler.is_compiling():
            _check_values(*arguments[:6])
            _checks.check_normalizer_value(self.normalizer)
        return namespace.plackett_luce_loss(*arguments)


def stage_count(top_k: Any) -> tuple[Tensor | None, int]:
    """The number of stages as kernels take it, where the number 0 stands for all of them."""
    if top_k is None:
        return None, 0
    if isinstance(top_k, Tensor):
        _lists.check_integers("top_k", top_k)
        return top_k, 0
    if isinstance(top_k, bool) or not isinstance(top_k, (int, torch.SymInt)):
        raise TypeError(f"top_k: expected an int or a tensor of an integer dtype, got {type(top_k).__name__}")
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    return None, min(top_k, 2**62) if isinstance(top_k, int) else top_k


def _check(
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
) -> None:
    """What csrc/autograd/plackett_luce.cpp checks, in its order."""
    _checks.check_constants(position_weight=position_weight, weight=weight, normalizer=normalizer)
    shape = _lists.list_shape(scores, cu_seqlens)
    _lists.check_items(scores, shape, lengths, mask)
    if order is not None:
        _lists.check_integers("order", order)
        _checks.check_like("order", order, "scores", scores)
    _lists.check_per_list("top_k", top_k, shape, scores, scalar=False)
    _lists.check_by_position("position_weight", position_weight, scores)
    _lists.check_by_position("item_weight", item_weight, scores)
    _lists.check_weight(weight, shape, scores)
    _checks.check_normalizer(normalizer, normalizer_value, reduction, "scores", scores)
    if _checks.values_are_checked(scores):
        _check_values(scores, order, cu_seqlens, lengths, mask, top_k)


def _check_values(
    scores: Tensor,
    order: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    top_k: Tensor | None,
) -> None:
    _lists.check_lengths_values(lengths, scores.shape[-1])
    _lists.check_bounds_values(cu_seqlens, scores.numel())
    _lists.check_top_k_values(top_k)
    if order is None or scores.numel() == 0:
        return
    if cu_seqlens is not None:
        index, lengths = _lists.pad_index(cu_seqlens.long(), scores.numel())
        order, mask = order[index], None
        scores = scores[index]
    valid = _lists.valid_items(scores.shape, scores.device, lengths, mask)
    _lists.check_order_values(order, valid)
