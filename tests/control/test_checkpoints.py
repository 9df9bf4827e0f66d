"""Checkpoints appear whole or not at all, damage is found, and old ones go."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mxdist.control.checkpoints import Checkpoint, CheckpointStore, ControllerState
from mxdist.control.collect import SavedBatch
from mxdist.control.records import read_records, write_records
from mxdist.errors import UserError
from mxdist.messages import EntropyStatistics, Group, Noise, Prompt, RolloutResult, Sample, SamplingSettings
from mxdist.tasks.base import Cursor


def state(step: int) -> ControllerState:
    return ControllerState(step, {"epoch": 0, "position": step}, {"sigma": 0.0}, 10, "mxfp4", {"torch": "2.13"})


def write(store: CheckpointStore, step: int) -> Path:
    partial = store.begin(step)
    (partial / "learner" / "weights").write_text(f"weights of step {step}")
    return store.complete(partial, state(step))


def newest(store: CheckpointStore, notes: list[str] | None = None) -> Checkpoint:
    found = store.newest((notes if notes is not None else []).append)
    assert found is not None
    return found


def test_the_newest_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (2, 10, 9):
        write(store, step)
    found = newest(store)
    assert found.state == state(10)
    assert (found.learner_folder / "weights").read_text() == "weights of step 10"


def test_a_save_that_is_given_up_or_killed_leaves_the_earlier_checkpoint_in_force(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    given_up, killed = store.begin(2), store.begin(3)
    (killed / "learner" / "weights").write_text("half of")
    store.discard(given_up)
    assert newest(store).state.step == 1
    write(store, 4)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_1", "step_4"}


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "no manifest", "half a manifest"])
def test_a_damaged_checkpoint_is_passed_over_in_one_line(tmp_path: Path, damage: str) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    folder = write(store, 2)
    victim = folder / "learner" / "weights"
    content = bytearray(victim.read_bytes())
    if damage == "truncated":
        victim.write_bytes(content[:-1])
    elif damage == "one bit":
        content[3] ^= 1
        victim.write_bytes(content)
    elif damage == "missing":
        victim.unlink()
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-20])
    notes: list[str] = []
    assert newest(store, notes).state.step == 1
    [note] = notes
    assert "step_2 is passed over" in note
    assert "\n" not in note
    assert "manifest" in note or "learner/weights" in note
    write(store, 2)  # the run takes the step again
    assert newest(store).state.step == 2


def test_when_every_checkpoint_is_damaged_the_user_is_told_what_to_do(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.newest(print) is None
    (write(store, 1) / "controller.json").write_text("{}")
    with pytest.raises(UserError, match=r"controller\.json .* in the oldest\); start again with 'mxdist train'"):
        store.newest(lambda _: None)


def test_the_newest_few_and_every_so_many_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, keep_every=10)
    for step in range(0, 36, 5):
        write(store, step)
    assert store.steps() == [0, 10, 20, 30, 35]


def test_a_full_disk_is_an_error_that_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    write(CheckpointStore(tmp_path), 1)
    code = (  # in a process of its own, whose files may grow to 64 bytes only
        "import resource, sys\nfrom pathlib import Path\n"
        "from tests.control.test_checkpoints import CheckpointStore, write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        "try:\n    write(CheckpointStore(Path(sys.argv[1])), 2)\nexcept OSError as error:\n    print(error.strerror)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "File too large\n"
    assert newest(CheckpointStore(tmp_path)).state.step == 1


def test_batches_sampled_ahead_come_back_bit_for_bit(tmp_path: Path) -> None:
    tokens, logprobs = np.array([3, 1], dtype=np.int64), np.array([-0.1, -np.inf], dtype=np.float32)
    sample = Sample(tokens, logprobs, False, drawn_by=((4, 1), (5, 1)))
    group = Group(Prompt("k", (1, 2), "r"), (sample, sample), 4, 0.25)
    result = RolloutResult((group,), EntropyStatistics(1.5, 4), 0.5, 3, 0.1)
    sampling = SamplingSettings(2, 1.0, 8, 2**62 + 1)
    batches = [SavedBatch(5, Cursor(1, 8), 4, sampling, Noise(0.25, 7), (result,))]
    write_records(tmp_path / "ahead", batches)
    [found] = read_records(tmp_path / "ahead", SavedBatch)
    [again] = found.results[0].groups
    for name in ("tokens", "logprobs"):
        there, here = getattr(again.samples[1], name), getattr(sample, name)
        assert there.dtype == here.dtype
        assert there.tobytes() == here.tobytes()
    assert again.prompt == group.prompt
    assert again.samples[0].drawn_by == ((4, 1), (5, 1))
    assert again.token_versions().tolist() == [4, 5, 4, 5]
    assert (found.cursor, found.sampling, found.noise) == (Cursor(1, 8), sampling, Noise(0.25, 7))
    write_records(tmp_path / "none", [])
    assert read_records(tmp_path / "none", SavedBatch) == []
