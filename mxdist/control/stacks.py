"""Python stacks of processes that may be stuck: a signal makes each write its own into a file.

The handler is faulthandler's, in C: it works while Python code waits in a C library or holds the interpreter's lock.
"""

import contextlib
import faulthandler
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

SIGNAL = signal.SIGUSR2
SECONDS_TO_WRITE = 5.0  # that all of them together may take
SECONDS_TO_REACH = 15.0  # for a signal to a process on another node: Ray may start a worker to send it

_stream: TextIO | None = None  # kept open for the handler


@dataclass(frozen=True)
class Place:
    """Where a process runs, as it has written at the head of its file."""

    pid: int
    node: str  # Ray's id of it
    born: float  # what tells it from a later process of the same number

    @property
    def process(self) -> psutil.Process | None:
        """The process, if it is on this node and still there."""
        if self.node != ray.get_runtime_context().get_node_id():
            return None
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.pid)
            if found.create_time() == self.born:
                return found
        return None


def register(path: Path) -> None:
    """Called in a process: from now on ``SIGNAL`` appends its stacks to the file ``path``."""
    global _stream
    path.parent.mkdir(parents=True, exist_ok=True)
    _stream = open(path, "w", encoding="utf-8")  # noqa: SIM115  (open as long as the process)
    here = Place(os.getpid(), ray.get_runtime_context().get_node_id(), psutil.Process().create_time())
    _stream.write(json.dumps(asdict(here)) + "\n")
    _stream.flush()
    faulthandler.register(SIGNAL, _stream, all_threads=True, chain=False)


def place(path: Path) -> Place | None:
    """Who writes into ``path``; None when nobody has begun to."""
    try:
        return Place(**json.loads(path.read_text(encoding="utf-8").splitlines()[0]))
    except (OSError, IndexError, ValueError):
        return None


def collect(paths: list[Path]) -> dict[Path, str]:
    """Ask the processes of all files for their stacks; what each has to show, or why it shows nothing."""
    answers: dict[Path, str] = {}
    before: dict[Path, int] = {}
    for path in paths:
        size = path.stat().st_size if path.exists() else 0
        if (unable := _ask(path)) is None:
            before[path] = size
        else:
            answers[path] = unable
    expiry = time.monotonic() + SECONDS_TO_WRITE
    while before and time.monotonic() < expiry:
        sizes = {path: path.stat().st_size for path in before}
        time.sleep(0.2)
        for path, size in sizes.items():
            if size > before[path] and path.stat().st_size == size:  # written, and to the end
                answers[path] = path.read_bytes()[before.pop(path) :].decode(errors="replace")
    return answers | dict.fromkeys(before, f"it wrote no stack within {SECONDS_TO_WRITE:g} s")


def _ask(path: Path) -> str | None:
    """Send the signal. Returns why that is of no use, or None when an answer can be expected."""
    there = place(path)
    if there is None:
        return "it has not come up"
    if there.node != ray.get_runtime_context().get_node_id():
        return _ask_on_other_node(there)
    process = there.process
    if process is None:
        return f"process {there.pid} is gone"
    with contextlib.suppress(psutil.NoSuchProcess):
        if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            return f"process {there.pid} is stopped (SIGSTOP or a debugger) and cannot show its stack"
        process.send_signal(SIGNAL)
    return None


def _ask_on_other_node(there: Place) -> str | None:
    here = NodeAffinitySchedulingStrategy(there.node, soft=False)
    try:
        sent = ray.remote(num_cpus=0, max_retries=0)(os.kill).options(scheduling_strategy=here)
        ray.get(sent.remote(there.pid, SIGNAL), timeout=SECONDS_TO_REACH)
    except Exception as error:  # a report says what it can; this is its last page
        return f"process {there.pid} on node {there.node} cannot be reached ({type(error).__name__})"
    return None
