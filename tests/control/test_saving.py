"""What becomes of a checkpoint that is being written when the loop is left."""

from pathlib import Path
from typing import cast

from mxdist.config.schema import Config
from mxdist.control.checkpoints import CheckpointStore, ControllerState
from mxdist.control.groups import LearnerGroup
from mxdist.control.saving import CheckpointWriter
from mxdist.errors import RollBack


class SlowLearners:
    """Have written when they are waited for, and write one checkpoint at a time, as the ranks do."""

    def __init__(self) -> None:
        self.writing = False

    def save(self, folder: Path) -> None:
        assert not self.writing
        self.writing = True
        (folder / "state").write_text("")

    def save_finished(self, wait: bool) -> bool:
        self.writing = self.writing and not wait
        return not self.writing


def writer(folder: Path, learners: SlowLearners, config: Config) -> CheckpointWriter:
    notes: list[str] = []
    return CheckpointWriter(CheckpointStore(folder), cast("LearnerGroup", learners), config, notes.append, lambda: None)


def test_a_checkpoint_under_way_is_finished_before_the_loop_rolls_back(tmp_path: Path) -> None:
    learners, config = SlowLearners(), Config()
    try:
        with writer(tmp_path, learners, config) as checkpoints:
            checkpoints.begin(ControllerState(1, {}, {}, 100, config.recipe, {}), [])
            checkpoints.look()
            raise RollBack("a guard fired")
    except RollBack:
        pass
    with writer(tmp_path, learners, config) as checkpoints:
        checkpoints.begin(ControllerState(2, {}, {}, 100, config.recipe, {}), [])
        checkpoints.finish()
    assert CheckpointStore(tmp_path).steps() == [1, 2]
