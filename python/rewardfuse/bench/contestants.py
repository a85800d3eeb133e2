"""Who takes part in a comparison: every backend that serves the device, plain torch, torch.compile of it, and peers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rewardfuse
from rewardfuse import _backend
from rewardfuse.bench.case import NOTHING, Contestant
from rewardfuse.bench.clocks import torch_threads


class Settings(NamedTuple):
    """What the command line asked for."""

    device: torch.device
    threads: int | None = None  #: for every CPU case in place of the case's own
    quick: bool = False
    rounds: int = 50


class _Entry(NamedTuple):
    name: str
    function: Callable[..., Any]
    scope: Callable[[], AbstractContextManager]
    ours: bool = False


def contestants(
    device: torch.device,
    threads: int | None,
    ours: Callable[..., Any],
    line: Callable[..., Any],
    tensors: Sequence[Tensor],
    without: Mapping[str, str] | None = None,
    *,
    peers: Mapping[str, Callable[..., Any]] = NOTHING,
    native_cuda: bool = True,
) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants of a case, the backend that users get first, and why others are left out. Each has run once.

    Args:
        device: of the tensors.
        threads: torch's threads while the case runs; compiled code depends on them.
        ours: this library's op as a function of the tensors; the 0-d loss, or a tuple that starts with it. Where no
            tensor wants a gradient the first may be any result.
        line: the same in plain torch.
        tensors: the arguments.
        without: contestants not to measure, and why; the backend that users get is measured all the same.
        peers: further functions of the tensors, by name.
        native_cuda: whether the op has native CUDA kernels; of one that has none users get Triton's on a GPU.
    """
    chosen = _chosen(device, native_cuda)
    without = {name: reason for name, reason in (without or {}).items() if name != chosen}
    racing, left_out = [], dict(without)
    for name in sorted(_backend.BACKENDS, key=lambda name: name != chosen):
        reason = left_out.get(name) or _backend.missing(name, device.type, native_cuda)
        if name == "triton" and device.type == "cpu":
            reason = "compiles for GPUs; on CPU it is interpreted, for tests"
        if reason is not None:
            left_out[name] = reason
    torch.compiler.reset()  # else the code of the cases before is looked through at every call
    for entry in _entries(chosen, ours, line, peers):
        if entry.name in left_out:
            continue
        try:
            with torch_threads(threads), entry.scope():
                racing.append(_after_one_run(entry, tensors))
        except (RuntimeError, ImportError) as error:  # no C++ compiler, no Triton, or not enough memory
            if entry.name == chosen:
                raise
            left_out[entry.name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        for tensor in tensors:
            tensor.grad = None
    return racing, left_out


def _chosen(device: torch.device, native_cuda: bool) -> str:
    return rewardfuse.backend(device) if native_cuda else _backend.choose(device.type, native_cuda=False)


def _entries(
    chosen: str, ours: Callable[..., Any], line: Callable[..., Any], peers: Mapping[str, Callable[..., Any]]
) -> Iterator[_Entry]:
    for name in sorted(_backend.BACKENDS, key=lambda name: name != chosen):
        # Without a wish every op of a call goes to the backend that users get for it.
        scope = contextlib.nullcontext if name == chosen else partial(rewardfuse.use_backend, name)
        yield _Entry(name, ours, scope, ours=True)
    yield _Entry("torch", line, contextlib.nullcontext)
    yield _Entry("torch.compile", torch.compile(line, dynamic=False), contextlib.nullcontext)
    for name, peer in peers.items():
        yield _Entry(name, peer, contextlib.nullcontext)


def _after_one_run(entry: _Entry, tensors: Sequence[Tensor]) -> Contestant:
    result = entry.function(*tensors)
    first = result[0] if isinstance(result, tuple) else result
    if first.requires_grad:
        first.backward()
    forward = _bound(entry.function, tensors, isinstance(result, tuple))
    return Contestant(entry.name, forward, entry.scope, partial(_outputs, entry.function, tensors), entry.ours)


def bind(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
    """The loss of `function` at the tensors, as every contestant is called: with the same hops in Python."""
    return _bound(function, tensors, isinstance(function(*tensors), tuple))


def _bound(function: Callable[..., Any], tensors: Sequence[Tensor], gives_tuple: bool) -> Callable[[], Tensor]:
    if gives_tuple:
        return lambda: function(*tensors)[0]
    return lambda: function(*tensors)


def _outputs(function: Callable[..., Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a result; statistics in a tuple of their own are not compared."""
    result = function(*tensors)
    return [part for part in (result if isinstance(result, tuple) else (result,)) if isinstance(part, Tensor)]
