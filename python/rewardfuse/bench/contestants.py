"""Who takes part in a comparison: every backend that serves the device, plain torch, and torch.compile of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rewardfuse
from rewardfuse import _backend
from rewardfuse.bench.clocks import torch_threads
from rewardfuse.bench.measure import Contestant


class Settings(NamedTuple):
    """What the command line asked for."""

    device: torch.device
    threads: int | None = None  #: for every CPU case in place of the case's own
    quick: bool = False
    rounds: int = 50


def contestants(
    device: torch.device,
    threads: int | None,
    ours: Callable[..., Any],
    line: Callable[..., Any],
    tensors: Sequence[Tensor],
    without: Mapping[str, str] | None = None,
) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants of a case, the backend that users get first, and why others are left out. Each has run once.

    Args:
        device: of the tensors.
        threads: torch's threads while the case runs; compiled code depends on them.
        ours: this library's op as a function of the tensors; the 0-d loss, or a tuple that starts with it.
        line: the same in plain torch.
        tensors: the arguments.
        without: contestants not to measure, and why; the backend that users get is measured all the same.
    """
    chosen = rewardfuse.backend(device)
    without = {name: reason for name, reason in (without or {}).items() if name != chosen}
    entries, left_out = [], dict(without)
    for name in sorted(_backend.BACKENDS, key=lambda name: name != chosen):
        reason = without.get(name) or _backend.missing(name, device.type)
        if name == "triton" and device.type == "cpu":
            reason = "compiles for GPUs; on CPU it is interpreted, for tests"
        if reason is None:
            entries.append((name, ours, partial(rewardfuse.use_backend, name)))
        else:
            left_out[name] = reason
    entries.append(("torch", line, contextlib.nullcontext))
    torch.compiler.reset()  # else the code of the cases before is looked through at every call
    entries.append(("torch.compile", torch.compile(line, dynamic=False), contextlib.nullcontext))
    racing = []
    for name, function, scope in entries:
        if name in without:
            continue
        try:
            with torch_threads(threads), scope():
                forward = bind(function, tensors)
                forward().backward()
        except RuntimeError as error:  # no C++ compiler, no Triton, or not enough memory
            if name == chosen:
                raise
            left_out[name] = str(error).strip().splitlines()[0]
        else:
            racing.append(Contestant(name, forward, scope))
        for tensor in tensors:
            tensor.grad = None
    return racing, left_out


def bind(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
    """The loss of `function` at the tensors, as every contestant is called: with the same hops in Python."""
    if isinstance(function(*tensors), tuple):
        return lambda: function(*tensors)[0]
    return lambda: function(*tensors)
