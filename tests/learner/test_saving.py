"""A checkpoint is written beside training, and holds what Megatron's own, for which training waits, would hold."""

import gc
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import pytest

from mxdist.config.schema import ModelConfig, Supervised
from mxdist.errors import CheckpointFailed
from mxdist.learner import checkpoint_writers
from mxdist.learner.checkpoint import Saver
from mxdist.learner.checkpoint_writers import ThreadWriter
from mxdist.learner.checkpoint_writers import _in_turn as write_in_turn
from mxdist.learner.worker import LearnerWorker
from tests.learner.batches import random_batch
from tests.learner.test_resharding import stored
from tests.model.ranks import DENSE, MOE, Learners, RankProcesses

_held: list[Path] = []  # in the process of a rank: what writes there waits until this file exists


def hold_writers(worker: LearnerWorker, until: Path, fork: bool) -> str:
    """Returns who writes."""
    if not _held:
        os.register_at_fork(after_in_child=_wait)
    _held[:] = [until]
    if not fork and not isinstance(worker._backend._saver._writer, ThreadWriter):
        worker._backend._saver = Saver(worker._policy, worker.shape, forks=False)
        checkpoint_writers._in_turn = partial(_write_later, write_in_turn)
    return type(worker._backend._saver._writer).__name__


def _write_later(write: Callable[..., None], *arguments: object) -> None:
    _wait()
    write(*arguments)


def _wait() -> None:
    while not _held[0].exists():
        time.sleep(0.02)


def save_as_megatron_does(worker: LearnerWorker, folder: Path) -> None:
    """Gather the optimizer's state and write, while the rank waits."""
    from megatron.core import dist_checkpointing, parallel_state

    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    policy = worker._policy
    model = policy.model.sharded_state_dict(metadata=metadata)
    parts = policy.optimizer.chained_optimizers
    states = {
        index: part.sharded_state_dict(model, is_loading=False, metadata=metadata)["param_state"]
        for index, part in enumerate(parts)
    }
    dist_checkpointing.save({"model": model, "optimizer": states}, str(folder))


def train(learners: Learners, seed: int) -> None:
    learners.call("update", random_batch(12, seed=seed), Supervised(), 1e-2)


@pytest.mark.parametrize(
    ("model", "layout", "fork"),
    [
        (MOE.model_copy(update={"dtype": "bfloat16"}), {}, True),
        (MOE.model_copy(update={"dtype": "bfloat16"}), {}, False),
        (DENSE.model_copy(update={"family": "qwen2", "tie_word_embeddings": True}), {}, True),
        (DENSE, {"tensor_parallel": 2}, True),
    ],
)
def test_a_checkpoint_holds_its_step_to_the_bit_though_training_goes_on(
    model: ModelConfig, layout: dict[str, int], fork: bool, ranks: RankProcesses, tmp_path: Path
) -> None:
    saves = ["first", "second", "third"]  # the others go by the plan of the first, the third by its metadata as well
    folders = {name: tmp_path / name for save in saves for name in (save, f"{save} by Megatron")}
    for folder in folders.values():
        folder.mkdir()
    with ranks.learners(model, "bf16", 2, **layout) as learners:
        for number, save in enumerate(saves):
            train(learners, seed=number)
            learners.run(save_as_megatron_does, folders[f"{save} by Megatron"])
            writer = "ForkedWriter" if fork else "ThreadWriter"
            assert learners.run(hold_writers, tmp_path / f"{save} may be written", fork) == [writer, writer]
            learners.call("save", folders[save])
            train(learners, seed=10 + number)
            assert learners.call("save_finished", False) == [False, False]
            with pytest.raises(RuntimeError, match="while another is being written"):
                learners.call("save", tmp_path)
            (tmp_path / f"{save} may be written").touch()
            assert learners.call("save_finished", True) == [True, True]
    tensors = {name: stored(folder) for name, folder in folders.items()}
    assert any("exp_avg_sq" in name for name in tensors["first"])
    for save in saves:
        assert tensors[save] == tensors[f"{save} by Megatron"]
    assert tensors["first"] != tensors["second"] != tensors["third"]


@pytest.mark.parametrize("fork", [True, False])
def test_a_checkpoint_that_cannot_be_written_says_so_and_the_next_one_is_whole(
    fork: bool, ranks: RankProcesses, tmp_path: Path
) -> None:
    lost, kept, may_be_written = tmp_path / "lost", tmp_path / "kept", tmp_path / "may be written"
    with ranks.learners(DENSE, "bf16", 2) as learners:
        learners.run(hold_writers, may_be_written, fork)
        lost.mkdir()
        learners.call("save", lost)
        shutil.rmtree(lost)
        may_be_written.touch()
        with pytest.raises(CheckpointFailed, match="No such file or directory"):
            learners.call("save_finished", True)
        kept.mkdir()
        learners.call("save", kept)
        assert learners.call("save_finished", True) == [True, True]
    assert any("exp_avg_sq" in name for name in stored(kept))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_the_garbage_collector_goes_on_while_a_thread_writes_and_a_writer_ends_quietly(tmp_path: Path) -> None:
    pipe, results = tmp_path / "pipe", SimpleQueue[object]()
    os.mkfifo(pipe)  # opening it to write waits for who reads
    thread = Thread(target=write_in_turn, args=([], [(str(pipe), "pipe", ([], []))], results))
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive()
    assert gc.isenabled()
    pipe.read_bytes()
    thread.join()
    assert isinstance(results.get(), OSError)  # a pipe cannot be brought to the disk
    del thread
    writer = ThreadWriter()
    del writer
    gc.collect()
