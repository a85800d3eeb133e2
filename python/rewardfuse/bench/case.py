"""What a benchmark case is made of: who takes part, what is timed of it, and what is to be reached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewardfuse.bench.clocks import Step

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
NOTHING: Mapping[str, Any] = {}


class Contestant(NamedTuple):
    """One way to compute what a case computes."""

    name: str
    forward: Callable[[], Any]  #: the 0-d loss with its graph; where nothing goes backward, any result
    scope: Callable[[], AbstractContextManager] = contextlib.nullcontext  #: what must hold while it runs
    outputs: Callable[[], Sequence[Tensor]] | None = None  #: all that it computes, the loss first; None: the loss alone
    apart: bool = False  #: its backward is also timed alone, over and over through one kept graph


class Memory(NamedTuple):
    """What a step may hold at its worst moment."""

    kept_bytes: int  #: results, gradients and their accumulators, which do not count in a share
    whole: Mapping[str, int]  #: bytes that the rest is a share of, by name
    reach: float | None = None  #: that share
    reach_peers: Mapping[str, float] = NOTHING  #: peer to the share of its peak, where everything counts


class Aim(NamedTuple):
    """What is measured of a direction besides the contestants' times, and what is to be reached."""

    reach: Mapping[str, float] = NOTHING  #: peer, or step in `beside`, to the share of its time
    copy_bytes: int = 0  #: that must move at least; a copy that moves as many is timed too. 0: no copy
    reach_bandwidth: float | None = None  #: share of that copy's bandwidth
    beside: Mapping[str, Step] = NOTHING  #: steps to time that compute something else, e.g. matrix products alone
    memory: Memory | None = None  #: on a GPU peaks are measured without it too


@dataclass(frozen=True)
class Case:
    """One row of the comparison. The first contestant is ours; the rest are its peers."""

    name: str
    device: torch.device
    items: int
    dtype: torch.dtype
    threads: int | None  #: torch's threads on CPU
    leaves: Sequence[Tensor]  #: what the backward pass fills the gradients of; none where nothing goes backward
    contestants: Sequence[Contestant]
    left_out: dict[str, str]  #: contestant to the reason why it does not take part
    aims: Mapping[str, Aim] = field(default_factory=lambda: {FORWARD: Aim(), BOTH: Aim()})  #: by direction
    reach_launches: int | None = None  #: GPU launches in forward + backward, torch's fill of the first gradient aside
    tolerance: float = 1e-5  #: how far contestants may differ, relative to the largest value
    gradient_tolerance: float | None = None  #: the same of gradients; None: the same
    #: after a backward pass, the gradients to compare; None: those of the leaves
    gradients: Callable[[], Sequence[Tensor]] | None = None
