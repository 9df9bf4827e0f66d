"""Phases of an update: their seconds, and their names in traces, of torch's profiler and (NVTX) of nsys."""

import contextlib
import time
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def named(phase: str) -> Iterator[None]:
    """Under this name in whatever trace is being taken."""
    on_gpu = torch.cuda.is_available()
    with torch.profiler.record_function(phase):
        if on_gpu:
            torch.cuda.nvtx.range_push(phase)
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.nvtx.range_pop()


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the block's seconds to the phase's, the device's work included."""
    start = time.perf_counter()
    try:
        with named(phase):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # else a phase pays for what the one before it left running
    finally:
        seconds[phase] += time.perf_counter() - start


Mark = torch.cuda.Event | float


class Stopwatch:
    """Adds up the laps of one phase as the device runs them, and waits for nothing meanwhile."""

    def __init__(self, phase: str) -> None:
        self._phase = phase
        self._laps: list[tuple[Mark, Mark]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """One lap."""
        start = _mark()
        with named(self._phase):
            yield
        self._laps.append((start, _mark()))

    def take(self) -> float:
        """Seconds of all laps since the last call, for whose end it waits."""
        laps, self._laps = self._laps, []
        return sum(_between(*lap) for lap in laps)


def _mark() -> Mark:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, float):
        assert isinstance(end, float)
        return end - start
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return start.elapsed_time(end) / 1e3
