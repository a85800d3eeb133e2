"""What the reference ops on lists share: which items of a list are there, and packed lists as padded ones."""

from __future__ import annotations

import torch
from torch import Tensor


def valid_items(shape: torch.Size, device: torch.device, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """Boolean ``[*, N]``: the first ``lengths`` items of a list, those where ``mask`` is true, or all."""
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
