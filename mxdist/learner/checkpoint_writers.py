"""Who writes a checkpoint while training goes on, and where its state is meanwhile.

    on a CPU    a forked process: its memory is the state of that moment, and nothing is copied
    on a GPU    a thread, from copies on the host: the child of a process that uses CUDA must not touch anything of it,
                and ends, or waits for ever, where it only lets go of pinned memory

Both are given what Megatron has planned to write, [(file, name, (objects, tensors))], without its tensors' values.
"""

import contextlib
import ctypes
import inspect
import os
import queue
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncCallsQueue, AsyncRequest

PR_SET_PDEATHSIG = 1  # linux/prctl.h

Values = dict[tuple[str, tuple[int, ...]], torch.Tensor]
"""Of the tensors' pieces, by their key and where they begin."""


class ForkedWriter:
    """Writes in a process of its own."""

    def __init__(self) -> None:
        self.calls = AsyncCallsQueue(persistent=False)

    def take(self, request: AsyncRequest, values: Values) -> AsyncRequest:
        """The request, with ``values`` as they are when it is scheduled."""
        rank, buckets, results = request.async_fn_args
        # Each is copied out of what it is a view of when its turn comes: the whole would be written.
        buckets = _with_tensors(buckets, values, lambda found: ((item, each.clone()) for item, each in found))
        write = partial(_in_child, request.async_fn)
        return request._replace(async_fn=write, async_fn_args=[rank, buckets, results], preload_fn=None)


class ThreadWriter:
    """Writes in a thread of this process."""

    def __init__(self) -> None:
        self.calls = AsyncCallsQueue(persistent=True)
        self.calls.persistent_caller = _Thread()

    def take(self, request: AsyncRequest, values: Values) -> AsyncRequest:
        """The request, with copies of ``values``, which may change when this returns."""
        _, buckets, results = request.async_fn_args
        # Not pinned, which would be faster: torch takes powers of two for it, and keeps them to the end of the run.
        buckets = _with_tensors(buckets, values, _copied)
        (transforms, _) = request.async_fn.args
        return request._replace(async_fn=_in_turn, async_fn_args=[transforms, buckets, results], preload_fn=None)


class _Thread(AsyncCaller):
    """One request at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        if async_req.async_fn is None:  # this rank has nothing to write
            return
        self._thread = threading.Thread(
            target=async_req.async_fn, args=async_req.async_fn_args, name="checkpoint", daemon=True
        )
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:  # noqa: ARG002
        """Whether all ranks are done; collective."""
        if blocking:
            self.close()
        busy = self._thread is not None and self._thread.is_alive()
        return bool(self.sync_all_async_calls(int(busy)))

    def close(self, abort: bool = False) -> None:
        if self._thread and not abort:
            self._thread.join()
            self._thread = None

    def __del__(self) -> None:  # Megatron's own raises
        pass


def _with_tensors(
    buckets: list[Any],
    values: Values,
    how: Callable[[list[tuple[Any, torch.Tensor]]], Any],
) -> list[Any]:
    """What is planned, with what ``how`` makes of the values in the places of the tensors."""

    def found(planned: list[Any]) -> list[tuple[Any, torch.Tensor]]:
        return [(item, values[item.index.fqn, tuple(item.index.offset)]) for item, _ in planned]

    return [(file, name, (objects, how(found(planned)))) for file, name, (objects, planned) in buckets]


def _copied(found: list[tuple[Any, torch.Tensor]]) -> list[tuple[Any, torch.Tensor]]:
    return [(item, each.to("cpu", copy=True)) for item, each in found]


def _in_turn(transforms: list[Any], buckets: list[Any], results: Any) -> None:
    """Write one file after the other; what Megatron's writer says of all, or one failure, goes to ``results``."""
    # Megatron's function turns Python's garbage collector off: good for a child, not for a process that trains.
    write = inspect.unwrap(filesystem_async.FileSystemWriterAsync.write_preloaded_data)
    said: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    counted: queue.Queue[int] = queue.Queue()
    for number, bucket in enumerate(buckets):
        counted.put(number)
        write(transforms, number, bucket, said, counted, use_fsync=True)
    written = dict(said.get() for _ in buckets)
    failures = [each for each in written.values() if isinstance(each, Exception)]
    results.put(failures[0] if failures else written)


def _in_child(write: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Write in the forked process, which must not outlive or impersonate its parent.

    It closes the sockets it has inherited: while it held them, nobody would learn of the parent's death.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                os.close(int(entry))
    write(*arguments, **options)
