"""A trace of what one rank does, for chrome://tracing or Perfetto."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def traced(path: Path | None) -> Iterator[None]:
    """Write a trace of the block, by torch's profiler, to ``path`` (.json or .json.gz); None: only run it."""
    if path is None:
        yield
        return
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        yield
    profiler.export_chrome_trace(str(path))
