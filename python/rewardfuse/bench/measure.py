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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewardfuse.bench.case import BACKWARD, BOTH, FORWARD, Aim, Case, Contestant
from rewardfuse.bench.clocks import Clock, Step, clocks, count_launches, torch_threads
from rewardfuse.bench.memory import memory_facts, peak_extra_bytes

WARM_UP_ROUNDS = 3
#: A contestant that has spent so long on a measurement leaves it, but not before it has this many samples; a quarter
#: of that time ends its warm-up.
SECONDS, FEWEST_ROUNDS = 2.0, 5
#: The same of one whose steps take seconds.
MANY_SECONDS, FEWEST_LONG_ROUNDS = 10.0, 3
#: What a step finds in caches makes no difference to one as long as this.
LONG_STEP_SECONDS = 0.05
COPY = "copy"


class Race(NamedTuple):
    """One step to time, and what must hold while it runs."""

    name: str
    step: Step
    scope: Callable[[], AbstractContextManager] = contextlib.nullcontext


def step_of(contestant: Contestant, direction: str, leaves: Sequence[Tensor]) -> Step:
    """What is timed of a contestant; gradients are dropped at once."""
    forward = contestant.forward
    graph: list[Tensor] = []

    def backward() -> None:
        if not graph:
            graph.append(forward())
        graph[0].backward(retain_graph=True)
        for leaf in leaves:
            leaf.grad = None

    def both() -> None:
        forward().backward()
        for leaf in leaves:
            leaf.grad = None

    return {FORWARD: forward, BACKWARD: backward, BOTH: both}[direction]


def take_turns(races: Sequence[Race], clock: Clock, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of every contestant, one value a round; fewer of those that take long."""
    seconds: dict[str, list[float]] = {race.name: [] for race in races}
    spent = dict.fromkeys(seconds, 0.0)
    last = dict.fromkeys(seconds, 0.0)
    with _no_garbage_collection():
        for turn in range(-WARM_UP_ROUNDS, rounds):
            for i in range(len(races)):
                race = races[(i + turn) % len(races)]
                if _is_done(spent[race.name], len(seconds[race.name]), warming_up=turn < 0):
                    continue
                started = time.perf_counter()
                with race.scope():
                    if last[race.name] < LONG_STEP_SECONDS:
                        race.step()  # finds again what entering the scope, or the contestant before, threw out
                    last[race.name] = clock.sample(race.step)
                spent[race.name] += time.perf_counter() - started
                if turn >= 0:
                    seconds[race.name].append(last[race.name])
    return seconds


def _is_done(spent: float, samples: int, *, warming_up: bool) -> bool:
    if warming_up:
        return spent > SECONDS / 4
    return spent > SECONDS and samples >= (FEWEST_LONG_ROUNDS if spent > MANY_SECONDS else FEWEST_ROUNDS)


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of rounds."""
    quartiles = [values[0]] * 3 if len(values) == 1 else statistics.quantiles(values, n=4, method="inclusive")
    lower, median, upper = quartiles
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper, "rounds": len(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of ours / theirs, round by round, while both took part."""
    return summarize([a / b for a, b in zip(ours, theirs, strict=False)])


def check_agreement(case: Case) -> None:
    """Raises RuntimeError where contestants of a case do not compute the same results and gradients; one that gives
    fewer results than ours is held to those."""
    expected: tuple[list[Tensor], list[Tensor]] | None = None
    for contestant in case.contestants:
        found = _results_and_gradients(case, contestant)
        expected = expected or found
        tolerances = case.tolerance, case.gradient_tolerance or case.tolerance
        for what, tolerance, ours, theirs in zip(("result", "gradient"), tolerances, expected, found, strict=True):
            for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
                scale, error = a.abs().max().item(), _distance(a, b)
                if not error <= tolerance * scale:
                    name = "loss" if what == "result" and i == 0 and case.leaves else f"{what} {i}"
                    raise RuntimeError(
                        f"{case.name}: {contestant.name} and {case.contestants[0].name} compute different things: "
                        f"{name} off by {error:.3g} where the largest is {scale:.3g}"
                    )


def _results_and_gradients(case: Case, contestant: Contestant) -> tuple[list[Tensor], list[Tensor]]:
    with contestant.scope():
        results = [contestant.forward()] if contestant.outputs is None else list(contestant.outputs())
        if not case.leaves:
            return results, []
        results[0].backward()
    gradients = [leaf.grad for leaf in case.leaves] if case.gradients is None else list(case.gradients())
    for leaf in case.leaves:
        leaf.grad = None
    return [result.detach() for result in results], gradients


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference; in pieces, because gradients may be as large as memory allows. NaN where there is one."""
    pieces = zip(a.reshape(-1).split(1 << 24), b.reshape(-1).split(1 << 24), strict=True)
    return torch.stack([(x.double() - y.double()).abs().max() for x, y in pieces]).max().item()


def run_case(case: Case, rounds: int) -> dict[str, Any]:
    """Everything measured of one case, ready for JSON."""
    with torch_threads(case.threads):
        check_agreement(case)
        measurements = [m for direction in case.aims for m in _measure_direction(case, direction, rounds)]
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
            result["launches"] = _count_launches(case)
    return result


def _measure_direction(case: Case, direction: str, rounds: int) -> list[dict[str, Any]]:
    """One measurement a clock; peaks of memory stand with the first."""
    aim = case.aims[direction]
    racing = [c for c in case.contestants if direction != BACKWARD or c.apart]
    races = [Race(c.name, step_of(c, direction, case.leaves), c.scope) for c in racing]
    beside = [Race(name, step) for name, step in aim.beside.items()]
    if aim.copy_bytes:
        beside.append(Race(COPY, copy_step(aim.copy_bytes, case.device)))
    measurements = [_measure(aim, direction, races, beside, clock, rounds) for clock in clocks(case.device)]
    if case.device.type == "cuda" or aim.memory is not None:
        measurements[0]["memory"] = memory_facts(case, aim.memory, {r.name: _peak(r, case.device) for r in races})
    return measurements


def _measure(
    aim: Aim, direction: str, races: Sequence[Race], beside: Sequence[Race], clock: Clock, rounds: int
) -> dict[str, Any]:
    seconds = take_turns([*races, *beside], clock, rounds)
    ours = races[0].name
    against = {}
    for peer in (name for name in seconds if name != ours):
        against[peer] = ratios(seconds[ours], seconds[peer])
        if peer in aim.reach:
            against[peer] |= {"reach": aim.reach[peer], "reached": against[peer]["median"] <= aim.reach[peer]}
    measurement: dict[str, Any] = {
        "direction": direction,
        "clock": clock.name,
        "ours": ours,
        "rounds": rounds,
        "seconds": {name: summarize(values) for name, values in seconds.items()},
        "ratio_to": against,
        "beside": [race.name for race in beside],
    }
    if COPY in seconds:
        share = ratios(seconds[COPY], seconds[ours])
        if aim.reach_bandwidth is not None:
            share |= {"reach": aim.reach_bandwidth, "reached": share["median"] >= aim.reach_bandwidth}
        measurement["bandwidth"] = {
            "bytes": aim.copy_bytes,
            "bytes_per_second": aim.copy_bytes / measurement["seconds"][ours]["median"],
            "copy_bytes_per_second": aim.copy_bytes / measurement["seconds"][COPY]["median"],
            "share_of_copy": share,
        }
    return measurement


def copy_step(size: int, device: torch.device) -> Step:
    """A copy that reads and writes, together, so many bytes."""
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _peak(race: Race, device: torch.device) -> int:
    with race.scope():
        race.step()
        return peak_extra_bytes(race.step, device)


def _count_launches(case: Case) -> dict[str, Any]:
    """GPU launches of a whole step."""
    direction = BOTH if case.leaves else FORWARD
    launches: dict[str, Any] = {}
    for contestant in case.contestants:
        step = step_of(contestant, direction, case.leaves)
        with contestant.scope():
            step()
            launches[contestant.name] = count_launches(step)
    if case.reach_launches is not None:
        ours = launches[case.contestants[0].name]
        ours |= {"reach": case.reach_launches, "reached": ours["without_fill"] <= case.reach_launches}
    return launches


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
