"""The host side of Plackett–Luce in Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from rewardfuse.kernels.lists.launch import Lists, Tile
from rewardfuse.kernels.plackett_luce.triton import backward_kernel, forward_kernel
from torch import Tensor

CHUNK = 512  # longer lists are taken in pieces of so many items


class _Problem(NamedTuple):
    """The tensors of one call (absent ones None), as they are saved for backward, and its numbers."""

    scores: Tensor
    order: Tensor | None
    cu_seqlens: Tensor | None
    lengths: Tensor | None
    mask: Tensor | None
    top_k: Tensor | None
    position_weight: Tensor | None
    item_weight: Tensor | None
    weight: Tensor | None
    normalizer: Tensor | None
    top_k_value: int
    numbers: tuple[float, ...]
    reduction: int

    def lists(self) -> Lists:
        return Lists(
            self.scores,
            self.cu_seqlens,
            self.lengths,
            self.mask,
            self.weight,
            self.normalizer,
            self.numbers,
            self.reduction,
        )

    def tile(self) -> Tile:
        extra = (self.order, self.cu_seqlens, self.mask, self.position_weight, self.item_weight)
        return self.lists().tile(CHUNK, plain=all(tensor is None for tensor in extra))

    def arguments(self, tile: Tile, *gradient: Tensor) -> dict[str, object]:
        """What both kernels take; backward also the gradient of the loss."""
        lists = self.lists()
        size, packed = self.scores.shape[-1], self.cu_seqlens is not None
        per_item = {
            "scores": self.scores,
            "order": self.order,
            "mask": self.mask,
            "u": self.position_weight,
            "v": self.item_weight,
        }
        per_list = {"weight": self.weight, "lengths": self.lengths, "top_k": self.top_k}
        per_list |= dict(zip(("grad_output",), gradient, strict=False))
        shared = lists.arguments(per_item, per_list, (0 if packed else size,) if gradient else ())
        return shared | {
            "cu_seqlens": self.cu_seqlens if packed else self.scores,
            "slots": 1 if packed else triton.cdiv(size, tile.block),
            "limit": min(self.top_k_value or size, size),
            "PACKED": packed,
            "HAS_ORDER": self.order is not None,
            "HAS_TOP_K": self.top_k is not None,
            "HAS_U": self.position_weight is not None,
            "HAS_V": self.item_weight is not None,
            "CHUNKED": size > tile.block,
            "LOWEST": torch.finfo(lists.accumulated).min,
        }

    def saved_states(self, tile: Tile) -> int:
        """How many chunks may leave a state behind."""
        size, lists = self.scores.shape[-1], self.lists().shape.numel()
        if size <= tile.block:
            return 0
        return lists * triton.cdiv(size, tile.block) if self.cu_seqlens is None else size // tile.block + lists


class _PlackettLuce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        problem = _Problem(*arguments)
        lists = problem.lists()
        tile = problem.tile()
        states = 2 * problem.saved_states(tile)
        saved = torch.empty(states, dtype=lists.accumulated, device=problem.scores.device)
        loss, list_loss, denominator = lists.forward(forward_kernel, tile, problem.arguments(tile) | {"saved": saved})
        ctx.save_for_backward(*problem[:10], list_loss, denominator, saved)
        ctx.options = problem[10:]
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():
            raise NotImplementedError("plackett_luce_loss: a second derivative (create_graph=True) is not implemented")
        *tensors, list_loss, denominator, saved = ctx.saved_tensors
        problem = _Problem(*tensors, *ctx.options)
        lists = problem.lists()
        tile = problem.tile()
        arguments = problem.arguments(tile, grad_loss)
        arguments |= {"list_loss": list_loss, "denominator": denominator, "saved": saved}
        return lists.backward(backward_kernel, tile, arguments), *[None] * 12


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
    """The loss; arguments as every backend takes them."""
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.long().contiguous()
    if mask is not None:
        lengths = mask.sum(-1)
        if item_weight is not None and order is None:  # the kernel looks for a list's first item at its first place
            order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
    tensors = (scores, order, cu_seqlens, lengths, mask, top_k, position_weight, item_weight, weight, normalizer)
    return _PlackettLuce.apply(*tensors, top_k_value, (float(weight_value), float(normalizer_value)), reduction)
