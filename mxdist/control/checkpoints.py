"""Checkpoints of a run as directories: written under a temporary name with checksums, then renamed; the newest good
one wins.

    checkpoints/step_N/
        manifest.json      every other file with its size and SHA-256; written last
        controller.json    the loop's state, and the versions of what wrote it
        config.yaml        every setting
        recipes.json       which linear has which recipe, and what each recipe means
        ahead.*            batches sampled ahead of the learner and not yet trained on (``records``)
        learner/           the backend's checkpoint, the model's shape, and the random state of each rank

A checksum tells damage, not malice; against malice ``model.checkpoint_reader`` opens what Megatron pickles.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from mxdist.errors import UserError
from mxdist.observe.run_directory import CHECKPOINTS, LEARNER_FOLDER, checkpoint_folders

MANIFEST_FILE = "manifest.json"
STATE_FILE = "controller.json"
AHEAD = "ahead"
PARTIAL = ".partial"
READERS = 4  # threads that compute checksums


@dataclass(frozen=True)
class ControllerState:
    """What the controller needs to go on after ``step`` updates; the learner's part lies beside it."""

    step: int
    cursor: dict[str, int]  # where new prompts are drawn from
    aqn: dict[str, float | int]
    aqn_steps: int  # the steps that the noise schedule was made for
    recipe: str
    versions: dict[str, str]  # of this package and of those that a result depends on


@dataclass(frozen=True)
class Checkpoint:
    """A complete one, whose files are as they were written."""

    state: ControllerState
    folder: Path

    @property
    def learner_folder(self) -> Path:
        return self.folder / LEARNER_FOLDER

    @property
    def ahead(self) -> Path:
        return self.folder / AHEAD


class CheckpointStore:
    """``checkpoints/step_N`` of one run directory."""

    def __init__(self, run_dir: Path, keep: int = 0, keep_every: int = 0) -> None:
        """
        Args:
            keep: older checkpoints than the newest so many are removed; 0 keeps all.
            keep_every: but never those of every so many steps; 0: no such ones.
        """
        self._run_dir, self._folder = run_dir, run_dir / CHECKPOINTS
        self._keep = keep
        self._keep_every = keep_every

    def begin(self, step: int) -> Path:
        """A new directory to write the checkpoint of ``step`` into, with an empty ``learner`` in it.

        What earlier attempts left is removed. The name is new every time: a writer that outlives a killed learner
        must not write into it.

        Raises:
            OSError: it cannot be made.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob(f"step_*{PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"step_{step}{PARTIAL}.", dir=self._folder))
        partial.chmod(0o755)
        (partial / LEARNER_FOLDER).mkdir()
        return partial

    def complete(self, partial: Path, state: ControllerState) -> Path:
        """Give a written directory its checksums and its name. A kill at any moment leaves the earlier ones as is.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        (partial / STATE_FILE).write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        manifest = json.dumps({"files": _described(partial)}, indent=1) + "\n"
        (partial / MANIFEST_FILE).write_text(manifest, encoding="utf-8")
        for path in [*_files(partial), partial / LEARNER_FOLDER, partial]:
            _flush(path)
        final = self._folder / f"step_{state.step}"
        if final.exists():  # damaged: a good one would have been continued from
            shutil.rmtree(final)
        os.rename(partial, final)
        _flush(self._folder)
        self._retire()
        return final

    @staticmethod
    def discard(partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)

    def bytes_needed(self) -> int:
        """About what the next checkpoint takes: as much as the newest."""
        steps = self.steps()
        return sum(path.stat().st_size for path in _files(self._of(steps[-1]))) if steps else 0

    def bytes_free(self) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self._folder).free

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return list(checkpoint_folders(self._run_dir))

    def newest(self, note: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint whose files have their checksums; None when the run has no checkpoint at all.

        ``note`` is told of each that is passed over.

        Raises:
            UserError: every checkpoint is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            damage = _damage(self._of(step))
            if damage is None:
                state = ControllerState(**json.loads((self._of(step) / STATE_FILE).read_text(encoding="utf-8")))
                return Checkpoint(state, self._of(step))
            note(f"checkpoint {self._of(step)} is passed over: {damage}")
        if steps:
            raise UserError(
                f"every checkpoint in {self._folder} is damaged ({damage} in the oldest); "
                f"start again with 'mxdist train' and another run.dir"
            )
        return None

    def existing(self, note: Callable[[str], None]) -> Checkpoint:
        """As ``newest``, for who needs one. UserError when there is none."""
        found = self.newest(note)
        if found is None:
            raise UserError(
                f"{self._folder} holds no complete checkpoint; go on with 'mxdist resume {self._folder.parent}'"
            )
        return found

    def _of(self, step: int) -> Path:
        return self._folder / f"step_{step}"

    def _retire(self) -> None:
        if not self._keep:
            return
        for step in self.steps()[: -self._keep]:
            if not self._keep_every or step % self._keep_every:
                # Under another name first: half a checkpoint must not look like one.
                going = self._of(step).with_name(f"step_{step}{PARTIAL}.old")
                os.rename(self._of(step), going)
                shutil.rmtree(going, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _described(folder: Path) -> dict[str, dict[str, object]]:
    """Size and SHA-256 of every file but the manifest, by its path in ``folder``."""
    paths = [path for path in _files(folder) if path.name != MANIFEST_FILE]
    with ThreadPoolExecutor(READERS) as readers:
        sums = readers.map(_sha256, paths)
        return {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum}
            for path, checksum in zip(paths, sums, strict=True)
        }


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        written = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        found = _described(folder)
    except (OSError, ValueError, KeyError) as error:
        return f"its {MANIFEST_FILE} cannot be read ({type(error).__name__})"
    for name, description in written.items():
        if name not in found:
            return f"{name} is missing"
        if found[name]["bytes"] != description["bytes"]:
            return f"{name} has {found[name]['bytes']} bytes, and {description['bytes']} were written"
        if found[name] != description:
            return f"the checksum of {name} is not the one that was written"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have a file's contents, or a directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
