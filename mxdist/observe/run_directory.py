"""The directory of a run: found or made, locked while a process uses it, and never overwritten."""

import fcntl
import os
import re
import shutil
import socket
import time
from pathlib import Path
from types import TracebackType

from mxdist import __version__
from mxdist.config import Config, dump_config
from mxdist.errors import UserError

CONFIG_FILE = "config.yaml"
LOCK_FILE = "lock"
CHECKPOINTS = "checkpoints"  # folder, of one folder "step_N" for each
LEARNER_FOLDER = "learner"  # of each of these
TOKENIZER = "tokenizer"  # folder; generation_config.json lies in it as well, if the model had one


class RunDirectory:
    """A claimed run directory: config.yaml, metrics.jsonl, log.txt, checkpoints/, tensorboard/, wandb/.

    The claim is a lock on an open file: it ends with the process, however that ends, and two can never hold it.
    Use as a context manager, or call ``release``.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock

    @classmethod
    def create(cls, config: Config) -> "RunDirectory":
        """Make ``run.dir``, or runs/<name>-<date>-<time> by default, and write the resolved configuration into it.

        Raises:
            UserError: it holds a run, or anything else, or cannot be written.
        """
        path = new_directory(config.run.name) if config.run.dir is None else config.run.dir.expanduser().absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
            if leftovers := {entry.name for entry in path.iterdir()} - {LOCK_FILE}:
                _refuse(path, leftovers)
            directory = cls(path, _lock(path))
        except OSError as error:
            raise UserError(f"run.dir={path} cannot be made or written: {error.strerror}; choose another") from None
        if (path / CONFIG_FILE).exists():  # made by another process between the look and the lock
            directory.release()
            _refuse(path, {CONFIG_FILE})
        directory.save_config(config.model_copy(update={"run": config.run.model_copy(update={"dir": path})}))
        return directory

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Claim the directory of an existing run.

        Raises:
            UserError: it holds no run, or is in use.
        """
        path = path.expanduser().absolute()
        require_run(path)
        try:
            return cls(path, _lock(path))
        except OSError as error:
            raise UserError(f"the run directory {path} cannot be written: {error.strerror}") from None

    @property
    def config_path(self) -> Path:
        return self.path / CONFIG_FILE

    def save_config(self, config: Config) -> None:
        """Write the resolved configuration; readers see the old file or the new one, never half of one."""
        partial = self.config_path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as stream:
            stream.write(f"# Every setting of this run, resolved by mxdist {__version__}.\n{dump_config(config)}")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, self.config_path)

    def discard(self) -> None:
        """Remove the directory and all that this process has written into it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Give the directory up. Does nothing the second time."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def require_run(path: Path) -> None:
    """UserError when ``path`` is not the directory of a run."""
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"{path} holds no run (no {CONFIG_FILE} in it); give the directory that 'mxdist train' made")


def checkpoint_folders(run_dir: Path) -> dict[int, Path]:
    """The folders of the complete checkpoints by step, ascending; those being written have other names."""
    found = (re.fullmatch(r"step_(\d+)", path.name) for path in (run_dir / CHECKPOINTS).glob("step_*"))
    steps = sorted(int(name[1]) for name in found if name)
    return {step: run_dir / CHECKPOINTS / f"step_{step}" for step in steps}


def new_directory(name: str) -> Path:
    """Make runs/<name>-<date>-<time>, which did not exist before, even when several runs start within one second."""
    stem = Path("runs").absolute() / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    stem.parent.mkdir(exist_ok=True)
    for attempt in range(1, 1000):
        path = stem if attempt == 1 else stem.with_name(f"{stem.name}-{attempt}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue
    raise UserError(f"runs/ holds a thousand runs named {stem.name}; set run.name or run.dir")


def _lock(path: Path) -> int:
    """An open, locked file that says who holds it."""
    descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited by programs it starts
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise UserError(
            f"the run directory {path} is in use by {holder}; wait for it to end, or choose another run.dir"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


def _refuse(path: Path, found: set[str]) -> None:
    if CONFIG_FILE not in found:
        raise UserError(f"run.dir={path} is not empty and holds no run; choose another run.dir")
    if checkpoint_folders(path):
        raise UserError(f"{path} holds a run; continue it with 'mxdist resume {path}', or choose another run.dir")
    os.close(_lock(path))  # still at work? then that is the message
    raise UserError(f"{path} holds a run without a checkpoint; choose another run.dir, or remove that directory")
