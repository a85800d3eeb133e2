"""The host side of the Triton ops on lists: memory layout and arguments of a launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from rewardfuse.kernels import common_launch
from rewardfuse.kernels.pairwise.triton import NONE
from torch import Tensor


class Tile(NamedTuple):
    """What a program takes at a time: so many lists, so many items of each."""

    rows: int
    block: int
    num_warps: int
    maxnreg: int  #: registers a thread at most; left to itself, ptxas settles on fewer and uses a stack

    @classmethod
    def of(cls, block: int, plain: bool, wide: bool) -> Tile:
        """Two to four items a thread: four only where a kernel reads little else than scores (`plain`), or has but one
        list at a time; with float64 (`wide`) always two."""
        rows = max(1, (512 if plain else 256) // block)
        registers = 255 if wide else 128 if plain else 168
        return cls(rows, block, 8 if wide and rows * block == 512 else 4, registers)

    def constants(self) -> dict[str, int]:
        """What a kernel is told of it."""
        return {"ROWS": self.rows, "BLOCK": self.block}

    def options(self) -> dict[str, int]:
        """What the compiler is told of it."""
        return {"num_warps": self.num_warps, "maxnreg": self.maxnreg}


class Lists(NamedTuple):
    """What every op on lists is given; absent tensors None, `numbers` weight and normalizer (0: none)."""

    scores: Tensor
    cu_seqlens: Tensor | None
    lengths: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    normalizer: Tensor | None
    numbers: tuple[float, ...]
    reduction: int

    @property
    def shape(self) -> torch.Size:
        """Of the lists."""
        return self.scores.shape[:-1] if self.cu_seqlens is None else self.cu_seqlens[1:].shape

    @property
    def accumulated(self) -> torch.dtype:
        """The type that the maths is done in."""
        return torch.float64 if self.scores.dtype is torch.float64 else torch.float32

    def tile(self, largest: int, plain: bool) -> Tile:
        """A tile that fits the lists' length, where packed the mean length; at most `largest` items of a list."""
        count = self.shape.numel()
        items = self.scores.shape[-1] if self.cu_seqlens is None else triton.cdiv(self.scores.numel(), max(count, 1))
        block = min(max(2, triton.next_power_of_2(items)), largest)
        tile = Tile.of(block, plain, self.accumulated is torch.float64)
        if self.scores.is_cuda:
            return tile
        return tile._replace(rows=min(tile.rows, triton.next_power_of_2(max(count, 1))))  # interpreted item by item

    def per_item(self, tensor: Tensor | None) -> tuple[Tensor, int, int]:
        """A tensor ``[*, N]``, ``[N]`` or, packed, ``[total]``, and its strides from list to list and item to item."""
        if tensor is None:
            return self.scores, 0, 0
        if self.cu_seqlens is not None:
            return tensor, 0, tensor.stride(0)
        lists = tensor.expand(self.scores.shape).reshape(self.shape.numel(), self.scores.shape[-1])
        return lists, lists.stride(0), lists.stride(1)

    def per_list(self, tensor: Tensor | None) -> tuple[Tensor, int]:
        """A tensor ``[*]`` or ``[]``, and its stride from list to list."""
        if tensor is None:
            return self.scores, 0
        lists = tensor.expand(self.shape).reshape(self.shape.numel())
        return lists, lists.stride(0)

    def arguments(
        self, items: dict[str, Tensor | None], lists: dict[str, Tensor | None], extra: tuple[int, ...] = ()
    ) -> dict[str, object]:
        """What every kernel takes: tensors by item, of which two strides each, then tensors by list, of which one."""
        by_item = [self.per_item(tensor) for tensor in items.values()]
        by_list = [self.per_list(tensor) for tensor in lists.values()]
        tensors = dict(zip((*items, *lists), (laid[0] for laid in (*by_item, *by_list)), strict=True))
        strides = tuple(stride for laid in (*by_item, *by_list) for stride in laid[1:])
        normalizer = self.scores if self.normalizer is None else self.normalizer
        return {
            **tensors,
            "normalizer": normalizer,
            "strides": strides + extra,
            "numbers": common_launch.as_float32_sums((*self.numbers, *[0.0] * (7 - len(self.numbers)))),
            "count": self.shape.numel(),
            "size": self.scores.shape[-1],
            "HAS_LENGTHS": self.lengths is not None,
            "HAS_MASK": self.mask is not None,
            "HAS_WEIGHT": self.weight is not None,
            "HAS_NORMALIZER": self.normalizer is not None,
            "REDUCTION": self.reduction,
            "ACC": tl.float64 if self.accumulated is torch.float64 else tl.float32,
        }

    def forward(self, kernel: object, tile: Tile, arguments: dict[str, object]) -> tuple[Tensor, Tensor, Tensor]:
        """Launches a forward kernel; (loss, loss of each list ``[lists]``, denominator ``[]``)."""
        device = self.scores.device
        list_loss = torch.empty(self.shape.numel(), dtype=self.accumulated, device=device)
        loss = torch.empty(self.shape if self.reduction == NONE.value else (), dtype=self.accumulated, device=device)
        denominator = torch.empty((), dtype=torch.float64, device=device)
        outputs = {"loss": loss, "list_loss": list_loss, "denominator": denominator}
        grid, scratch = common_launch.grid(self.scores, triton.cdiv(self.shape.numel(), tile.rows))
        with common_launch.on_device_of(self.scores):
            kernel[grid](**arguments, **outputs, **scratch, **tile.constants(), **tile.options())
        return loss, list_loss, denominator

    def backward(self, kernel: object, tile: Tile, arguments: dict[str, object]) -> Tensor:
        """Launches a backward kernel; the gradient of the scores."""
        make = torch.empty if self.shape.numel() else torch.zeros
        gradient = make(self.scores.shape, dtype=self.scores.dtype, device=self.scores.device)
        programs = common_launch.programs(self.scores, triton.cdiv(self.shape.numel(), tile.rows))
        with common_launch.on_device_of(self.scores):
            kernel[(programs,)](**arguments, gradient=gradient, **tile.constants(), **tile.options())
        return gradient
