"""What tests do to a run and what they compare of it: who runs where, what a process is at, every number it wrote."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mxdist.control import stacks
from tests.e2e.command import metrics_of

UNCERTAIN = ("timing_s/", "perf/")  # what another run measures otherwise; and all in seconds
LOOK_SECONDS = 0.002  # far less than a sync or a batch of answers takes
Found = TypeVar("Found")


def soon(look: Callable[[], Found | None], what: str, seconds: float = 120) -> Found:
    """What ``look`` finds, as soon as it finds something."""
    expiry = time.monotonic() + seconds
    while time.monotonic() < expiry:
        if (found := look()) is not None:
            return found
        time.sleep(LOOK_SECONDS)
    raise AssertionError(f"{what} never came")


def pid(run_dir: Path, process: str) -> int:
    """Of a process by its name, such as "learner_rank_1", once it has come up."""
    path = run_dir / "stacks" / f"{process}.txt"
    return soon(lambda: stacks.place(path), f"a process {process}").pid


def caught_at(run_dir: Path, process: str, function: str) -> int:
    """The process' number at a moment when ``function`` is on its Python stack: it is asked for it again and again."""
    number, path = pid(run_dir, process), run_dir / "stacks" / f"{process}.txt"
    read = path.stat().st_size

    def look() -> int | None:
        nonlocal read
        os.kill(number, stacks.SIGNAL)
        with open(path, "rb") as stream:
            stream.seek(read)
            shown = stream.read()
        read += len(shown)
        return number if f"in {function}\n".encode() in shown else None

    return soon(look, f"{process} in {function}")


def kill_everything(controller: int) -> None:
    """kill -9 of the run and of all that it has started, Ray included."""
    root = psutil.Process(controller)
    family = [root, *root.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=30)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def results(run_dir: Path) -> dict[int, dict[str, Any]]:
    """All metrics of all steps that do not depend on the machine, and what was sampled."""
    found = {}
    for step, line in metrics_of(run_dir).items():
        found[step] = {
            name: value for name, value in line.items() if not (name.startswith(UNCERTAIN) or name.endswith("seconds"))
        }
        if step:
            found[step]["rollouts"] = (run_dir / "rollouts" / f"step_{step}.jsonl").read_text()
    return found


def weights(run_dir: Path, step: int) -> dict[str, bytes]:
    """The weights and the optimizer's state of a checkpoint, bit for bit."""
    reader = FileSystemReader(run_dir / "checkpoints" / f"step_{step}" / "learner")
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(state, storage_reader=reader, no_dist=True)
    assert len(state) > 20
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}
