"""The cases of ``rewardfuse bench bradley_terry`` and the peers they are held against.

TRL's RewardTrainer and OpenRLHF's PairWiseLoss have no kernel of their own: what they compute is the plain torch line.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import rewardfuse
from rewardfuse.bench.case import BOTH, FORWARD, Aim, Case
from rewardfuse.bench.contestants import Settings, contestants

NOTE = (
    "torch is -logsigmoid(chosen - rejected).mean(), and TRL's RewardTrainer and OpenRLHF's PairWiseLoss compute that\n"
    "same line: neither has a kernel of its own that could be measured apart."
)
SMOOTHING, CENTERING = 0.1, 0.01
EVERY_OPTION = "margin, weight, smoothing, centering, stats"
#: bytes forward reads, backward reads and backward writes, in units of one reward
REWARDS_MOVED_PER_PAIR = 6
Result = Tensor | tuple[Tensor, tuple[Tensor, ...]]


def fused(chosen: Tensor, rejected: Tensor) -> Tensor:
    """This library's call for the plain line."""
    return rewardfuse.bradley_terry_loss(chosen, rejected)


def plain(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The line that trainers use."""
    return -logsigmoid(chosen - rejected).mean()


def plain_every_option(chosen: Tensor, rejected: Tensor, margin: Tensor, weight: Tensor) -> Result:
    """The same with every option, as one would write it with care: logσ(−z) = logσ(z) − z saves the second logsigmoid,
    and the statistics record no graph and take the means that they can from one another."""
    difference = chosen - rejected
    z = difference - margin
    losses = SMOOTHING * z - logsigmoid(z) + CENTERING * (chosen + rejected).square()
    with torch.no_grad():
        mean_chosen, mean_rejected = chosen.mean(), rejected.mean()
        accuracy = (difference > 0).float().mean()
        tie_rate = (difference == 0).float().mean()
        stats = (accuracy, tie_rate, mean_chosen - mean_rejected, mean_chosen, mean_rejected)
    return (weight * losses).mean(), stats


def fused_every_option(chosen: Tensor, rejected: Tensor, margin: Tensor, weight: Tensor) -> Result:
    """This library's call for it."""
    return rewardfuse.bradley_terry_loss(
        chosen,
        rejected,
        margin,
        weight=weight,
        label_smoothing=SMOOTHING,
        center_rewards_coefficient=CENTERING,
        return_stats=True,
    )


def cases(settings: Settings) -> Iterator[Case]:
    """The cases for a device, smallest first; each holds its tensors only while it is measured."""
    yield from _gpu_cases(settings) if settings.device.type == "cuda" else _cpu_cases(settings)


def _cpu_cases(settings: Settings) -> Iterator[Case]:
    yield _case(settings, 64, 1, reach={"torch": 0.65})
    yield _case(settings, 64, 1, every_option=True, reach={"torch": 0.30})
    if settings.quick:
        return
    yield _case(settings, 4096, 1)
    yield _case(settings, 2**20, 2, reach={"torch": 0.28, "torch.compile": 0.40}, compare_copy=True)
    yield _case(settings, 2**20, 2, torch.bfloat16, compare_copy=True)


def _gpu_cases(settings: Settings) -> Iterator[Case]:
    reach = {"torch": 0.35, "torch.compile": 0.6}
    for items in (64, 4096) if settings.quick else (64, 1024, 4096, 2**14, 2**16):
        yield _case(settings, items, None, reach=reach, reach_launches=2)
    yield _case(settings, 64, None, every_option=True, reach_launches=2)
    if settings.quick:
        return
    yield _case(settings, 2**27, None, compare_copy=True, reach_bandwidth=0.90)
    yield _case(settings, 2**27, None, torch.bfloat16, compare_copy=True)


def _case(
    settings: Settings,
    items: int,
    threads: int | None,
    dtype: torch.dtype = torch.float32,
    *,
    every_option: bool = False,
    reach: dict[str, float] | None = None,
    compare_copy: bool = False,
    reach_bandwidth: float | None = None,
    reach_launches: int | None = None,
) -> Case:
    used = None if settings.device.type == "cuda" else settings.threads or threads
    generator = torch.Generator(settings.device).manual_seed(items)

    def draw() -> Tensor:
        return torch.randn(items, generator=generator, device=settings.device).to(dtype)

    leaves = [draw().requires_grad_(), draw().requires_grad_()]
    if every_option:
        tensors = [*leaves, draw().abs(), draw().abs() + 0.5]
        racing, left_out = contestants(settings.device, used, fused_every_option, plain_every_option, tensors)
    else:
        racing, left_out = contestants(settings.device, used, fused, plain, leaves)
    whole = Aim(
        # What the targets were set for is one number of threads; with another they would say nothing.
        reach=(reach or {}) if used == threads else {},
        copy_bytes=REWARDS_MOVED_PER_PAIR * items * dtype.itemsize if compare_copy else 0,
        reach_bandwidth=reach_bandwidth,
    )
    place = [] if used is None else [f"{used} thread{'s' * (used > 1)}"]
    return Case(
        name=", ".join([_count(items), str(dtype).removeprefix("torch."), *place, *[EVERY_OPTION] * every_option]),
        device=settings.device,
        items=items,
        dtype=dtype,
        threads=used,
        leaves=leaves,
        contestants=racing,
        left_out=left_out,
        aims={FORWARD: Aim(), BOTH: whole},
        reach_launches=reach_launches,
        tolerance=2e-2 if dtype is torch.bfloat16 else 1e-5,
    )


def _count(items: int) -> str:
    power = items.bit_length() - 1
    return f"2^{power} pairs" if items == 1 << power and power > 12 else f"{items} pairs"
