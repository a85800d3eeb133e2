"""Several processes that do one job (``torchrun``, ``accelerate launch``): who they are, and errors that all raise.

A process that stops while the others wait for it would leave them waiting, half an hour by default. So whatever may
fail in one of them alone before the work begins, or between its parts, runs under :func:`together`. A process that
fails within a training step ends, and with it the connection that the others wait on.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed

JOIN_CHUNK = 4096  # items of a list that processes exchange at once
PARTING_SECONDS = 0.2


class OtherProcessError(ValueError):
    """Another process of this job failed; says which, and why."""


def count() -> int:
    """How many processes do this job; 1 where no launcher says otherwise."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def on_cpu(use_cpu: bool = False) -> bool:
    """Whether this job computes on the CPU: by wish, without an accelerator, or with one that several processes cannot
    share (accelerate would take them for strangers that do one job each)."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return use_cpu or accelerator is None or (count() > 1 and accelerator.type == "mps")


def connect(use_cpu: bool = False) -> None:
    """Let the processes of this job find each other, as ``accelerate`` does it; nothing where there is only one."""
    if count() > 1 and not torch.distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=on_cpu(use_cpu))


@contextlib.contextmanager
def connected(use_cpu: bool = False) -> Iterator[None]:
    """:func:`connect`, and part in order at the end, since a process that just ends may abort, or another one with it.

    Another one waits for its last message. And gloo's threads hold the tensors of the last exchange for a moment: where
    one of them lets go while Python shuts down, it waits for the interpreter and is killed ("terminate called without
    an active exception", in 9 of 12 runs of three exchanges and nothing else with torch 2.13). So they get that moment.
    """
    before = torch.distributed.is_initialized()
    connect(use_cpu)
    own = torch.distributed.is_initialized() and not before
    try:
        yield
        if own:
            gather(None)
    finally:
        if own:
            time.sleep(PARTING_SECONDS)
    if own:
        torch.distributed.destroy_process_group()
        _forget()


def _forget() -> None:
    """accelerate remembers its state for the life of the process; the next job is to find the others anew."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def device(use_cpu: bool = False) -> torch.device:
    """Where this process computes: its own accelerator, or the CPU."""
    if on_cpu(use_cpu):
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.accelerator.set_device_index(index)
    return torch.device(torch.accelerator.current_accelerator().type, index)


def gather(value: Any) -> list[Any]:
    """The ``value`` of every process, in order; every process must call it, after :func:`connect`."""
    if count() == 1:
        return [value]
    values = [None] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def share(items: Sequence[Any]) -> Sequence[Any]:
    """The part of ``items`` that this process works on; the parts follow one another in the order of the processes."""
    bounds = [len(items) * number // count() for number in (rank(), rank() + 1)]
    return items if count() == 1 else items[bounds[0] : bounds[1]]


def join(mine: list[Any]) -> list[Any]:
    """Every process's list, end to end, in every process; a few items at a time, since they travel by the devices."""
    if count() == 1:
        return mine
    parts: list[list[Any]] = [[] for _ in range(count())]
    for start in range(0, max(gather(len(mine))), JOIN_CHUNK):
        for part, more in zip(parts, gather(mine[start : start + JOIN_CHUNK]), strict=True):
            part += more
    return [item for part in parts for item in part]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What fails within in one process fails in all of them; every process must come here, after :func:`connect`.

    Raises:
        OtherProcessError: this process was well, and another one was not.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    reasons = gather(None if failure is None else (" ".join(str(failure).split()) or type(failure).__name__))
    if failure is not None:
        raise failure
    for number, reason in enumerate(reasons):
        if reason is not None:
            raise OtherProcessError(f"process {number} failed: {reason}")


def check_same(values: Mapping[str, Any]) -> None:
    """Refuse processes that were started for different work: ``values`` (options, digests of data) must agree.

    Raises:
        ValueError: in every process; names the first values that differ, and where.
    """
    mine = {name: json.dumps(value, sort_keys=True, default=str) for name, value in values.items()}
    everyone = gather(mine)
    first = everyone[0]
    for number, other in enumerate(everyone):
        differing = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if differing:
            texts = [f"{name} ({first.get(name)} and {other.get(name)})" for name in differing]
            raise ValueError(f"processes 0 and {number} were given different options or data: {', '.join(texts)}")
