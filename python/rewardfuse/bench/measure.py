"""Timing: contestants take turns on the same tensors, so that what slows the machine down hits all of them alike.

In each round every contestant gives one sample, and the order turns by one from round to round. A sample is the mean
of as many steps as fill two milliseconds (on the device clock, one step). A ratio is the median over rounds of ours /
theirs in that round, which noise that lasts longer than a round cancels out of. Contestants that take long leave after
a few rounds; a ratio is over the rounds that both took part in.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewardfuse.bench.clocks import Clock, Step, clocks, count_launches, peak_extra_bytes, torch_threads

WARM_UP_ROUNDS = 3
#: A contestant that has spent so long on a measurement leaves it, but not before it has this many samples; a quarter
#: of that time ends its warm-up.
SECONDS, FEWEST_ROUNDS = 2.0, 5
#: What a step finds in caches makes no difference to one as long as this.
LONG_STEP_SECONDS = 0.05


class Contestant(NamedTuple):
    """One way to compute the loss of a case."""

    name: str
    forward: Callable[[], Tensor]  #: the 0-d loss, with its graph
    scope: Callable[[], AbstractContextManager] = contextlib.nullcontext  #: what must hold while it runs


@dataclass(frozen=True)
class Case:
    """One row of the comparison. The first contestant is ours; the rest are its peers."""

    name: str
    device: torch.device
    items: int
    dtype: torch.dtype
    threads: int | None  #: torch's threads on CPU
    leaves: Sequence[Tensor]  #: what the backward pass fills the gradients of
    contestants: Sequence[Contestant]
    left_out: dict[str, str]  #: contestant to the reason why it does not take part
    step_bytes: int  #: that forward + backward must move at least
    reach: dict[str, float] = field(
        default_factory=dict
    )  #: peer to the share of its time (forward + backward) to reach
    compare_copy: bool = False  #: also time a copy that moves step_bytes
    reach_bandwidth: float | None = None  #: share of that copy's bandwidth to reach
    reach_launches: int | None = None  #: GPU launches in forward + backward, torch's fill of the first gradient aside
    tolerance: float = 1e-5  #: how far contestants may differ, relative to the largest value
    #: after a backward pass, the gradients to compare; default: those of the leaves
    gradients: Callable[[], Sequence[Tensor]] | None = None


def forward_backward(contestant: Contestant, leaves: Sequence[Tensor]) -> Step:
    """A training step's share: loss, gradients of the leaves, gradients dropped."""
    forward = contestant.forward

    def step() -> None:
        forward().backward()
        for leaf in leaves:
            leaf.grad = None

    return step


class Race(NamedTuple):
    """One step to time, and what must hold while it runs."""

    name: str
    step: Step
    scope: Callable[[], AbstractContextManager]


def take_turns(races: Sequence[Race], clock: Clock, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of every contestant, one value a round; fewer of those that take long."""
    seconds: dict[str, list[float]] = {race.name: [] for race in races}
    spent = dict.fromkeys(seconds, 0.0)
    with _no_garbage_collection():
        for turn in range(-WARM_UP_ROUNDS, rounds):
            for i in range(len(races)):
                race = races[(i + turn) % len(races)]
                samples = seconds[race.name]
                limit, least = (SECONDS / 4, 0) if turn < 0 else (SECONDS, FEWEST_ROUNDS)
                if spent[race.name] > limit and len(samples) >= least:
                    continue
                started = time.perf_counter()
                with race.scope():
                    if not samples or samples[-1] < LONG_STEP_SECONDS:
                        race.step()  # finds again what entering the scope, or the contestant before, threw out
                    sample = clock.sample(race.step)
                spent[race.name] += time.perf_counter() - started
                if turn >= 0:
                    samples.append(sample)
    return seconds


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of rounds."""
    quartiles = [values[0]] * 3 if len(values) == 1 else statistics.quantiles(values, n=4, method="inclusive")
    lower, median, upper = quartiles
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper, "rounds": len(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of ours / theirs, round by round, while both took part."""
    return summarize([a / b for a, b in zip(ours, theirs, strict=False)])


def check_agreement(case: Case) -> None:
    """Raises RuntimeError where contestants of a case do not compute the same loss and gradients."""
    expected: list[Tensor] = []
    for contestant in case.contestants:
        with contestant.scope():
            loss = contestant.forward()
            loss.backward()
        gradients = [leaf.grad for leaf in case.leaves] if case.gradients is None else case.gradients()
        found = [loss.detach().double(), *(gradient.double() for gradient in gradients)]
        for leaf in case.leaves:
            leaf.grad = None
        expected = expected or found
        for name, a, b in zip(("loss", *("gradient",) * len(gradients)), expected, found, strict=True):
            scale = a.abs().max().item()
            error = (a - b).abs().max().item()
            if not error <= case.tolerance * scale:
                raise RuntimeError(
                    f"{case.name}: {contestant.name} and {case.contestants[0].name} compute different things: "
                    f"{name} off by {error:.3g} where the largest is {scale:.3g}"
                )


def run_case(case: Case, rounds: int) -> dict[str, Any]:
    """Everything measured of one case, ready for JSON."""
    with torch_threads(case.threads):
        check_agreement(case)
        directions = {
            "forward": [Race(c.name, c.forward, c.scope) for c in case.contestants],
            "forward + backward": [Race(c.name, forward_backward(c, case.leaves), c.scope) for c in case.contestants],
        }
        if case.compare_copy:
            directions["forward + backward"].append(Race("copy", copy_step(case), contextlib.nullcontext))
        measurements = [
            _measure(case, direction, races, clock, rounds)
            for clock in clocks(case.device)
            for direction, races in directions.items()
        ]
        result = {
            "name": case.name,
            "device": case.device.type,
            "items": case.items,
            "dtype": str(case.dtype).removeprefix("torch."),
            "threads": case.threads,
            "measurements": measurements,
            "left_out": case.left_out,
        }
        if case.device.type == "cuda":
            result.update(_gpu_facts(case, directions["forward + backward"]))
    return result


def _measure(case: Case, direction: str, races: Sequence[Race], clock: Clock, rounds: int) -> dict[str, Any]:
    seconds = take_turns(races, clock, rounds)
    ours = races[0].name
    whole = direction == "forward + backward"
    against = {}
    for peer in (race.name for race in races[1:]):
        against[peer] = ratios(seconds[ours], seconds[peer])
        if whole and peer in case.reach:
            against[peer] |= {"reach": case.reach[peer], "reached": against[peer]["median"] <= case.reach[peer]}
    measurement: dict[str, Any] = {
        "direction": direction,
        "clock": clock.name,
        "ours": ours,
        "rounds": rounds,
        "seconds": {name: summarize(values) for name, values in seconds.items()},
        "ratio_to": against,
    }
    if "copy" in seconds:
        share = ratios(seconds["copy"], seconds[ours])
        if case.reach_bandwidth is not None:
            share |= {"reach": case.reach_bandwidth, "reached": share["median"] >= case.reach_bandwidth}
        measurement["bandwidth"] = {
            "bytes": case.step_bytes,
            "bytes_per_second": case.step_bytes / measurement["seconds"][ours]["median"],
            "copy_bytes_per_second": case.step_bytes / measurement["seconds"]["copy"]["median"],
            "share_of_copy": share,
        }
    return measurement


def copy_step(case: Case) -> Step:
    """A copy that reads and writes, together, as many bytes as the case must move."""
    source = torch.zeros(case.step_bytes // 2, dtype=torch.uint8, device=case.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _gpu_facts(case: Case, races: Sequence[Race]) -> dict[str, Any]:
    """Launches and peak extra memory of forward + backward."""
    launches: dict[str, Any] = {}
    peak: dict[str, int] = {}
    for race in races:
        if race.name == "copy":
            continue
        with race.scope():
            race.step()
            peak[race.name] = peak_extra_bytes(race.step)
            launches[race.name] = count_launches(race.step)
    if case.reach_launches is not None:
        ours = launches[races[0].name]
        ours |= {"reach": case.reach_launches, "reached": ours["without_fill"] <= case.reach_launches}
    return {"launches": launches, "peak_extra_bytes": peak}


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
