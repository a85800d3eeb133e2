"""What a step takes: host time, GPU time and GPU launches."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

Step = Callable[[], Any]
SAMPLE_SECONDS = 2e-3


class Clock(Protocol):
    """Seconds a step takes."""

    name: str

    def sample(self, step: Step) -> float: ...


class WallClock:
    """Host time of steps run back to back until the device has finished them."""

    name = "wall"

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
        self._inner: dict[Step, int] = {}

    def sample(self, step: Step) -> float:
        inner = self._inner.get(step)
        if inner is not None:
            return self._run(step, inner) / inner
        inner, seconds = self._first_sample(step)
        self._inner[step] = inner
        return seconds / inner

    def _run(self, step: Step, inner: int) -> float:
        self._wait()
        start = time.perf_counter_ns()
        for _ in range(inner):
            step()
        self._wait()
        return (time.perf_counter_ns() - start) * 1e-9

    def _first_sample(self, step: Step) -> tuple[int, float]:
        """(how many steps make a sample, seconds of the first such)"""
        inner = 1
        while (seconds := self._run(step, inner)) < SAMPLE_SECONDS:
            inner = max(inner + 1, math.ceil(1.2 * inner * min(SAMPLE_SECONDS / seconds, 10)))
        return inner, seconds


class DeviceClock:
    """GPU time of one step between two events, with a cold L2 and without the host's time.

    Before the first event the stream is given writes over a buffer much larger than L2. They evict the inputs, and they
    last so long that the host has issued the whole step before the GPU reaches it: the gaps of a host that cannot keep
    up are what WallClock shows.
    """

    name = "device"

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(max(4 * l2_bytes, 256 << 20), dtype=torch.uint8, device=device)
        self._buffer.zero_()
        self._flush_seconds = self._between_events(self._buffer.zero_)
        self._flushes: dict[Step, int] = {}

    def sample(self, step: Step) -> float:
        flushes = self._flushes.get(step)
        if flushes is None:
            flushes = self._flushes[step] = max(1, math.ceil(2 * self._host_seconds(step) / self._flush_seconds))
        for _ in range(flushes):
            self._buffer.zero_()
        return self._between_events(step)

    @staticmethod
    def _between_events(step: Step) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    @staticmethod
    def _host_seconds(step: Step) -> float:
        seconds = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return max(seconds)


def clocks(device: torch.device) -> list[Clock]:
    """The clocks that tell something on a device, the one that users feel first."""
    return [WallClock(device), DeviceClock(device)] if device.type == "cuda" else [WallClock(device)]


def count_launches(step: Step) -> dict[str, Any]:
    """What a step puts on the GPU's queue: kernels, copies and memsets, by name."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    on_device = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    names = [event.name for event in on_device if not event.is_user_annotation]
    if not names:
        raise RuntimeError("the profiler saw no launch on the GPU: it lacks CUPTI, or the right to use it")
    without_fill = [name for name in names if "FillFunctor" not in name]
    return {"total": len(names), "without_fill": len(without_fill), "names": names}


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Hold torch to a number of threads; None leaves it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _nothing() -> None:
    pass
