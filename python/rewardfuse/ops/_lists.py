"""Lists on the Python side: which items are there, and the checks of the Python backends, worded as
csrc/autograd/lists.cpp words them for the native one."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardfuse.ops import _checks

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_integers(name: str, tensor: Tensor) -> None:
    """A tensor of an integer dtype."""
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected a tensor of an integer dtype, got {tensor.dtype}")


def check_per_list(name: str, tensor: Tensor | None, shape: torch.Size, scores: Tensor, scalar: bool) -> None:
    """None, a tensor with one value a list, or, where `scalar` allows it, a 0-d tensor."""
    if tensor is None:
        return
    if tensor.shape != shape and not (scalar and tensor.dim() == 0):
        kinds = "a number, a 0-d tensor or one value a list" if scalar else "one value a list"
        raise ValueError(f"{name}: expected {kinds}, {list(shape)}, got {list(tensor.shape)}")
    _checks.check_device(name, tensor, "scores", scores)


def list_shape(scores: Tensor, cu_seqlens: Tensor | None) -> torch.Size:
    """``[*]``: the lists' own shape. Raises where scores cannot hold lists."""
    _checks.check_rewards("scores", scores)
    if cu_seqlens is None:
        if scores.dim() == 0:
            raise ValueError("scores: expected a tensor [*, N], got a 0-d tensor")
        return scores.shape[:-1]
    if scores.dim() != 1:
        raise ValueError(f"scores: expected packed lists, [total], got shape {list(scores.shape)}")
    check_integers("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected [lists + 1] bounds, got shape {list(cu_seqlens.shape)}")
    _checks.check_device("cu_seqlens", cu_seqlens, "scores", scores)
    return torch.Size([cu_seqlens.shape[0] - 1])


def check_items(scores: Tensor, shape: torch.Size, lengths: Tensor | None, mask: Tensor | None) -> None:
    """Which items of a list are there."""
    if lengths is not None and mask is not None:
        raise ValueError("lengths: expected without mask, which says the same")
    if lengths is not None:
        check_integers("lengths", lengths)
        check_per_list("lengths", lengths, shape, scores, scalar=False)
    _checks.check_mask(mask, "scores", scores)


def check_weight(weight: Tensor | None, shape: torch.Size, scores: Tensor) -> None:
    """The weight of a list."""
    if weight is not None:
        check_real("weight", weight)
    check_per_list("weight", weight, shape, scores, scalar=True)


def check_by_position(name: str, tensor: Tensor | None, scores: Tensor) -> None:
    """None, or real numbers ``[N]`` or in the shape of the scores."""
    if tensor is None:
        return
    check_real(name, tensor)
    if tensor.shape not in (scores.shape, scores.shape[-1:]):
        raise ValueError(
            f"{name}: expected one value a position, [{scores.shape[-1]}], or the shape of scores, "
            f"{list(scores.shape)}, got {list(tensor.shape)}"
        )
    _checks.check_device(name, tensor, "scores", scores)


def check_real(name: str, tensor: Tensor) -> None:
    """A tensor of real numbers."""
    if not tensor.is_floating_point() and tensor.dtype not in (*_INTEGERS, torch.bool):
        raise TypeError(f"{name}: expected a tensor of a real dtype, got {tensor.dtype}")


def check_lengths_values(lengths: Tensor | None, size: int) -> None:
    """Raises for the first length out of range. Waits for the device."""
    if lengths is None:
        return
    lengths = lengths.flatten().long()  # a narrow integer would be compared with a wrapped size
    bad = (lengths < 0) | (lengths > size)
    if bad.any():
        index = int(bad.nonzero()[0])
        raise ValueError(f"lengths: expected from 0 to {size}, got {int(lengths[index])} at list {index}")


def check_bounds_values(cu_seqlens: Tensor | None, total: int) -> None:
    """Raises for bounds that do not run from 0 to the number of scores. Waits for the device."""
    if cu_seqlens is None:
        return
    bounds = cu_seqlens.long()
    if int(bounds[0]) != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {int(bounds[0])}")
    falling = bounds.diff() < 0
    if falling.any():
        index = int(falling.nonzero()[0])
        raise ValueError(f"cu_seqlens: expected not to decrease, got {int(bounds[index + 1])} at {index + 1}")
    if int(bounds[-1]) != total:
        raise ValueError(f"cu_seqlens: expected to end at the number of scores, {total}, got {int(bounds[-1])}")


def check_top_k_values(top_k: Tensor | None) -> None:
    """Raises for the first number of stages below 1. Waits for the device."""
    if top_k is not None and (top_k < 1).any():
        index = int((top_k < 1).flatten().nonzero()[0])
        raise ValueError(f"top_k: expected at least 1, got {int(top_k.flatten()[index])} at list {index}")


def check_order_values(order: Tensor | None, valid: Tensor) -> None:
    """Raises for the first list ``[*, N]`` whose order is no permutation of its valid items. Waits for the device."""
    if order is None:
        return
    size, count = valid.shape[-1], valid.sum(-1, keepdim=True)
    there = torch.arange(size, device=valid.device) < count
    order = order.long()
    inside = (order >= 0) & (order < size)
    seen = torch.zeros(*valid.shape[:-1], size + 1, dtype=torch.bool, device=valid.device)
    seen = seen.scatter(-1, torch.where(there & inside, order, size), True)[..., :size]
    bad = ((there & ~inside).any(-1) | (seen != valid).any(-1)).flatten()
    if bad.any():
        index = int(bad.nonzero()[0])
        entries = order.reshape(-1, size)[index][: int(count.flatten()[index])].tolist()
        came = str(entries) if len(entries) <= 16 else f"{str(entries[:16])[:-1]}, …]"
        raise ValueError(f"order: expected each valid item's index once, best first, got {came} at list {index}")


def valid_items(shape: torch.Size, device: torch.device, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """Boolean ``[*, N]``: the first ``lengths`` items of a list, those where ``mask`` is True, or all."""
    if mask is not None:
        return mask
    if lengths is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    return torch.arange(shape[-1], device=device) < lengths.unsqueeze(-1)


def pad_index(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Where the items of packed lists stand, ``[lists, longest]`` (0 beyond a list's end), and the lists' lengths."""
    lengths = cu_seqlens.diff()
    longest = total if cu_seqlens.is_meta or lengths.numel() == 0 else max(0, min(total, int(lengths.max())))
    index = cu_seqlens[:-1, None] + torch.arange(longest, device=cu_seqlens.device)
    return index.clamp(0, max(total - 1, 0)), lengths


def spread_lists(value: Tensor | float, shape: torch.Size, like: Tensor) -> Tensor:
    """A number or tensor once a list, ``[*]``, in the accumulation type of the scores."""
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return torch.as_tensor(value, dtype=dtype, device=like.device).expand(shape)
