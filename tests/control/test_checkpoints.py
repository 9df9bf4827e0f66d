"""Checkpoints appear whole or not at all."""

from pathlib import Path

import pytest

from mxdist.control.checkpoints import CheckpointStore, ControllerState
from mxdist.errors import UserError


def state(step: int) -> ControllerState:
    return ControllerState(step, {"epoch": 0, "position": step}, [], {"sigma": 0.0}, 10, "mxfp4", "0.1.0")


def test_the_newest_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (2, 10, 9):
        store.write(state(step), lambda folder, step=step: (folder / "weights").write_text(str(step)))  # type: ignore[misc]
    found, learner = store.newest()
    assert found == state(10)
    assert (learner / "weights").read_text() == "10"


def test_a_save_that_fails_leaves_the_earlier_checkpoint_in_force(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.write(state(1), lambda _: None)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError):
        store.write(state(2), fail)
    assert store.newest()[0].step == 1


def test_a_save_after_a_failed_one_starts_clean(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    leftover = tmp_path / "checkpoints" / "step_3.partial" / "learner" / "stale"
    leftover.mkdir(parents=True)
    folder = store.write(state(3), lambda _: None)
    assert not (folder / "learner" / "stale").exists()


def test_a_run_without_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mxdist train"):
        CheckpointStore(tmp_path).newest()
