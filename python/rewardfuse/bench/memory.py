"""The memory that a step takes at its worst moment."""

from __future__ import annotations

import os
from itertools import accumulate
from typing import Any

import torch

from rewardfuse.bench.case import Case, Memory
from rewardfuse.bench.clocks import Step


def peak_extra_bytes(step: Step, device: torch.device) -> int:
    """Memory a step takes at its worst moment beyond what was there before, results and gradients included.

    It is what torch's allocator hands out, to kernels in C++ too. What a kernel takes from the system by itself, as
    oneDNN does to pack matrices on a CPU, is not seen.
    """
    return _gpu_peak(step) if device.type == "cuda" else _cpu_peak(step)


def _gpu_peak(step: Step) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(step: Step) -> int:
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells stderr that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


def memory_facts(case: Case, memory: Memory | None, peaks: dict[str, int]) -> dict[str, Any]:
    """The peaks of a direction, ready for JSON, with what is to be reached of them."""
    ours = case.contestants[0].name
    facts: dict[str, Any] = {"peak_extra_bytes": peaks}
    if memory is None:
        return facts
    counted = max(peaks[ours] - memory.kept_bytes, 0)
    facts |= {"kept_bytes": memory.kept_bytes, "share_of": {}, "ratio_to": {}}
    for name, size in memory.whole.items():
        share = counted / size
        facts["share_of"][name] = {"bytes": size, "share": share, **_reached(share, memory.reach)}
    for name, peak in peaks.items():
        if name != ours and peak > 0:
            ratio = peaks[ours] / peak
            facts["ratio_to"][name] = {"ratio": ratio, **_reached(ratio, memory.reach_peers.get(name))}
    return facts


def _reached(value: float, reach: float | None) -> dict[str, Any]:
    return {} if reach is None else {"reach": reach, "reached": value <= reach}
