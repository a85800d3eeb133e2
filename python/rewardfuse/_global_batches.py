"""Which records each process trains on, so that any number of processes takes the steps of one."""

import itertools
from collections.abc import Iterator, Sized
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler

PLACEHOLDER = "placeholder"


class GlobalBatches:
    """Batches of one epoch for ``processes`` processes: batch i belongs to process ``i % processes``.

    An optimizer step takes the next ``batch_size · accumulation · processes`` records of a shuffled order that depends
    on ``seed`` and epoch alone. Its batches hold ``batch_size`` records; in the last step of an epoch, where fewer are
    left, they are spread evenly, and where there are fewer records than batches a process gets a placeholder: a batch
    of one record, given as ``-1 - index``, that counts for nothing. So all processes have the same number of batches
    (else they would wait for each other), and no record is taken twice in an epoch, as accelerate's own sharding does
    to fill up.

    For use as a ``batch_sampler`` that accelerate shards.
    """

    def __init__(self, dataset: Sized, batch_size: int, accumulation: int, processes: int, seed: int):
        self.sampler = SeedableRandomSampler(dataset, data_seed=seed)  # accelerate sets its epoch
        self.records, self.size, self.processes = len(dataset), batch_size, processes
        self.step_records = batch_size * accumulation * processes

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(self.records, self.step_records)
        return full * (self.step_records // self.size) + (len(self._split(list(range(rest)))) if rest else 0)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for start in range(0, self.records, self.step_records):
            yield from self._split(order[start : start + self.step_records])

    def _split(self, records: list[int]) -> list[list[int]]:
        batches = -(-len(records) // self.size)
        if batches % self.processes == 0 or self.processes == 1:
            return [records[start : start + self.size] for start in range(0, len(records), self.size)]
        batches += -batches % self.processes
        bounds = [len(records) * number // batches for number in range(batches + 1)]
        parts = [records[low:high] for low, high in itertools.pairwise(bounds)]
        return [part or [-1 - records[0]] for part in parts]


class WithPlaceholders(torch.utils.data.Dataset):
    """A data set whose item ``-1 - i`` is item i, marked as a placeholder."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= 0:
            return self.dataset[index]
        return {**self.dataset[-1 - index], PLACEHOLDER: True}


class PlaceholderCollator:
    """Wraps a collator: the batch of a placeholder has the key ``placeholder``."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(items)
        return {**batch, PLACEHOLDER: torch.ones(())} if PLACEHOLDER in items[0] else batch


def nothing(outputs: torch.Tensor, log_tie: torch.Tensor | None) -> torch.Tensor:
    """0, with gradients of 0 to all that made ``outputs``: the loss of a placeholder, in which every process takes
    part all the same."""
    zero = 0.0 * outputs.nan_to_num().sum()
    return zero if log_tie is None else zero + 0.0 * log_tie
