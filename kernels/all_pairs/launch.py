"""The host side of all pairs in Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from rewardfuse.kernels.all_pairs.triton import BLOCK, backward_kernel, forward_kernel
from rewardfuse.kernels.lists.launch import Lists
from torch import Tensor


class _Problem(NamedTuple):
    """The tensors of one call (absent ones None), as they are saved for backward, and its numbers."""

    scores: Tensor
    labels: Tensor
    lengths: Tensor | None
    mask: Tensor | None
    margin: Tensor | None
    weight: Tensor | None
    normalizer: Tensor | None
    numbers: tuple[float, ...]
    reduction: int

    def lists(self) -> Lists:
        tensors = (self.scores, None, self.lengths, self.mask, self.weight, self.normalizer)
        return Lists(*tensors, self.numbers, self.reduction)

    def arguments(self, *grad_output: Tensor) -> dict[str, object]:
        """What both kernels take; backward also the gradient of the loss."""
        per_item = {"scores": self.scores, "labels": self.labels, "mask": self.mask}
        per_list = {"weight": self.weight, "lengths": self.lengths}
        per_list |= dict(zip(("grad_output",), grad_output, strict=False))
        lists = self.lists()
        label = tl.int64
        if self.labels.is_floating_point():
            label = tl.float64 if torch.float64 in (self.labels.dtype, lists.accumulated) else tl.float32
        return lists.arguments(per_item, per_list) | {
            "margin": self.scores if self.margin is None else self.margin,
            "HAS_MARGIN": self.margin is not None,
            "LABEL": label,
        }


class _AllPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        problem = _Problem(*arguments)
        lists = problem.lists()
        pairs = torch.empty(lists.shape.numel(), dtype=torch.float64, device=problem.scores.device)
        terms = 16 if lists.accumulated is torch.float64 else 7
        taken = problem.arguments() | {"pairs": pairs, "TERMS": terms}
        loss, list_loss, denominator = lists.forward(forward_kernel, lists.tile(BLOCK, plain=False), taken)
        ctx.save_for_backward(*problem[:7], list_loss, denominator, pairs)
        ctx.options = problem[7:]
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():
            raise NotImplementedError("all_pairs_loss: a second derivative (create_graph=True) is not implemented")
        *tensors, list_loss, denominator, pairs = ctx.saved_tensors
        problem = _Problem(*tensors, *ctx.options)
        lists = problem.lists()
        taken = problem.arguments(grad_loss) | {"list_loss": list_loss, "denominator": denominator, "pairs": pairs}
        return lists.backward(backward_kernel, lists.tile(BLOCK, plain=False), taken), *[None] * 8


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
    """The loss; arguments as every backend takes them."""
    numbers = tuple(map(float, (weight_value, normalizer_value, margin_value)))
    return _AllPairs.apply(scores, labels, lengths, mask, margin, weight, normalizer, numbers, reduction)
