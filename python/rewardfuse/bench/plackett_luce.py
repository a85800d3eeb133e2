"""The cases of ``rewardfuse bench plackett_luce``: rankings, packed rankings, and all pairs of a list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import rewardfuse
from rewardfuse.bench.case import BOTH, FORWARD, Aim, Case, Contestant
from rewardfuse.bench.contestants import Settings, bind, contestants

NOTE = (
    "torch is (scores.flip(-1).logcumsumexp(-1).flip(-1) - scores).sum(-1).mean(), after a gather where an order is\n"
    "given, masked where lists are padded, and for all pairs -logsigmoid of the K x K differences. No peer measured:\n"
    "TRL, OpenRLHF, verl, NeMo-RL and Liger have no listwise loss for reward models."
)
#: times that forward reads, backward reads and backward writes, together, each score
SCORES_MOVED = 3
SLOW = dict.fromkeys(("reference", "torch.compile"), "takes as many seconds a step as torch, or more")


def fused(scores: Tensor) -> Tensor:
    """This library's call for the plain line."""
    return rewardfuse.plackett_luce_loss(scores)


def plain(scores: Tensor) -> Tensor:
    """The line that one writes with care: no running maximum by hand, no loop."""
    return (scores.flip(-1).logcumsumexp(-1).flip(-1) - scores).sum(-1).mean()


def fused_order(scores: Tensor, order: Tensor) -> Tensor:
    """This library's call for lists in any order."""
    return rewardfuse.plackett_luce_loss(scores, order=order)


def plain_order(scores: Tensor, order: Tensor) -> Tensor:
    """The same in plain torch."""
    return plain(scores.gather(-1, order))


def fused_packed(packed: Tensor, padded: Tensor, cu_seqlens: Tensor, lengths: Tensor) -> Tensor:
    """This library's call for lists laid end to end."""
    return rewardfuse.plackett_luce_loss_packed(packed, cu_seqlens)


def fused_padded(packed: Tensor, padded: Tensor, cu_seqlens: Tensor, lengths: Tensor) -> Tensor:
    """This library's call for the same lists padded."""
    return rewardfuse.plackett_luce_loss(padded, lengths=lengths)


def plain_padded(packed: Tensor, padded: Tensor, cu_seqlens: Tensor, lengths: Tensor) -> Tensor:
    """The same in plain torch, which has no scan of packed lists."""
    absent = torch.arange(padded.shape[-1], device=padded.device) >= lengths.unsqueeze(-1)
    suffixes = padded.masked_fill(absent, -torch.inf).flip(-1).logcumsumexp(-1).flip(-1)
    return (suffixes - padded).masked_fill(absent, 0).sum(-1).mean()


def fused_all_pairs(scores: Tensor, labels: Tensor) -> Tensor:
    """This library's call for all pairs."""
    return rewardfuse.all_pairs_loss(scores, labels)


def plain_all_pairs(scores: Tensor, labels: Tensor) -> Tensor:
    """The same in plain torch, by K x K differences."""
    pairs = labels.unsqueeze(-1) > labels.unsqueeze(-2)
    losses = -logsigmoid(scores.unsqueeze(-1) - scores.unsqueeze(-2))
    count = pairs.sum((-2, -1))
    means = losses.masked_fill(~pairs, 0).sum((-2, -1)) / count.clamp(min=1)
    return means.sum() / (count > 0).sum().clamp(min=1)


def cases(settings: Settings) -> Iterator[Case]:
    """The cases for a device, smallest first; each holds its tensors only while it is measured."""
    yield from _gpu_cases(settings) if settings.device.type == "cuda" else _cpu_cases(settings)


def _cpu_cases(settings: Settings) -> Iterator[Case]:
    yield _lists(settings, 1024, 8, reach={"torch": 1 / 15})
    if settings.quick:
        yield _packed(settings, 64, 128)
        return
    yield _all_pairs(settings, 1024, 8)
    yield _all_pairs(settings, 256, 64)
    yield _lists(settings, 16384, 64, reach={"torch": 1 / 60, "torch.compile": 1 / 45}, compare_copy=True)
    yield _lists(settings, 16384, 64, torch.bfloat16, reach={"torch": 1 / 60}, compare_copy=True)
    yield _ordered(settings, 16384, 64)
    yield _lists(settings, 16, 65536, reach={"torch": 1 / 40}, compare_copy=True)
    yield _packed(settings, 4000, 2048, without=SLOW, reach={"padded": 0.6})


def _gpu_cases(settings: Settings) -> Iterator[Case]:
    yield _lists(settings, 256, 8, reach={"torch": 1 / 6}, reach_launches=2)
    if settings.quick:
        yield _packed(settings, 64, 128)
        return
    yield _all_pairs(settings, 1024, 8)
    yield _all_pairs(settings, 256, 64)
    yield _ordered(settings, 16384, 64)
    yield _packed(settings, 4000, 2048, reach={"padded": 0.6})
    for size in (8, 64, 1024, 16384):
        yield _lists(settings, 2**27 // size, size, compare_copy=True, reach_bandwidth=0.85)


def _lists(settings: Settings, rows: int, size: int, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    scores = _draw(settings, rows, size).to(dtype).requires_grad_()
    if dtype is torch.bfloat16:
        options["tolerance"] = 0.1  # plain torch keeps its scan and its gradient in bfloat16
    return _case(settings, f"{rows} x {size}", fused, plain, [scores], [scores], **options)


def _ordered(settings: Settings, rows: int, size: int) -> Case:
    scores = _draw(settings, rows, size).requires_grad_()
    order = torch.rand_like(scores).argsort(-1)
    return _case(settings, f"{rows} x {size}, order", fused_order, plain_order, [scores, order], [scores])


def _all_pairs(settings: Settings, rows: int, size: int) -> Case:
    scores, labels = _draw(settings, rows, size).requires_grad_(), _draw(settings, rows, size)
    name = f"all pairs of {rows} x {size}"
    return _case(settings, name, fused_all_pairs, plain_all_pairs, [scores, labels], [scores])


def _packed(settings: Settings, rows: int, longest: int, **options: Any) -> Case:
    """Lists of lengths from 2 to `longest`, drawn log-uniformly, packed; against the same padded."""
    generator = torch.Generator().manual_seed(rows)
    lengths = (2 * (longest / 2) ** torch.rand(rows, generator=generator)).long().to(settings.device)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    there = torch.arange(longest, device=settings.device) < lengths.unsqueeze(-1)
    padded = _draw(settings, rows, longest)
    packed = padded[there].requires_grad_()
    padded.requires_grad_()
    return _case(
        settings,
        f"{rows} packed lists of 2 to {longest}",
        fused_packed,
        plain_padded,
        [packed, padded, cu_seqlens, lengths],
        [packed, padded],
        besides={"padded": fused_padded},
        gradients=lambda: [packed.grad if padded.grad is None else padded.grad[there]],
        **options,
    )


def _case(
    settings: Settings,
    name: str,
    ours: Callable[..., Tensor],
    line: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    leaves: Sequence[Tensor],
    *,
    besides: Mapping[str, Callable[..., Tensor]] | None = None,
    without: Mapping[str, str] | None = None,
    reach: dict[str, float] | None = None,
    compare_copy: bool = False,
    reach_bandwidth: float | None = None,
    **options: Any,
) -> Case:
    """A case on two threads on CPU; `besides` are further calls of this library to hold `ours` against."""
    used = None if settings.device.type == "cuda" else settings.threads or 2
    racing, left_out = contestants(settings.device, used, ours, line, tensors, without)
    racing[1:1] = [Contestant(key, bind(call, tensors), racing[0].scope) for key, call in (besides or {}).items()]
    scores = leaves[0]
    whole = Aim(
        # What the targets were set for is two threads; with another number they would say nothing.
        reach=(reach or {}) if used in (None, 2) else {},
        copy_bytes=SCORES_MOVED * scores.numel() * scores.element_size() if compare_copy else 0,
        reach_bandwidth=reach_bandwidth,
    )
    place = [] if used is None else [f"{used} thread{'s' * (used > 1)}"]
    return Case(
        name=", ".join([name, str(scores.dtype).removeprefix("torch."), *place]),
        device=settings.device,
        items=scores.numel(),
        dtype=scores.dtype,
        threads=used,
        leaves=leaves,
        contestants=racing,
        left_out=left_out,
        aims={FORWARD: Aim(), BOTH: whole},
        **options,
    )


def _draw(settings: Settings, rows: int, size: int) -> Tensor:
    generator = torch.Generator(settings.device).manual_seed(size)
    return torch.randn(rows, size, generator=generator, device=settings.device)
