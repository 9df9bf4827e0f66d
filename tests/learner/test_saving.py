"""A checkpoint is written beside training, and holds what Megatron's own, for which training waits, would hold."""

import os
import time
from pathlib import Path

import pytest

from mxdist.config.schema import ModelConfig, Supervised
from mxdist.learner.worker import LearnerWorker
from tests.learner.batches import random_batch
from tests.learner.test_resharding import stored
from tests.model.ranks import DENSE, MOE, Learners, RankProcesses

_held: list[Path] = []  # in the process of a rank: its forks wait until this file exists


def hold_forks(worker: LearnerWorker, until: Path) -> None:  # noqa: ARG001
    if not _held:
        os.register_at_fork(after_in_child=_wait)
    _held[:] = [until]


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
    ("model", "layout"),
    [
        (MOE.model_copy(update={"dtype": "bfloat16"}), {}),
        (DENSE.model_copy(update={"family": "qwen2", "tie_word_embeddings": True}), {}),
        (DENSE, {"tensor_parallel": 2}),
    ],
)
def test_a_checkpoint_holds_its_step_to_the_bit_though_training_goes_on(
    model: ModelConfig, layout: dict[str, int], ranks: RankProcesses, tmp_path: Path
) -> None:
    saves = ["first", "second", "third"]  # the others go by the plan of the first, the third by its metadata as well
    folders = {name: tmp_path / name for save in saves for name in (save, f"{save} by Megatron")}
    for folder in folders.values():
        folder.mkdir()
    with ranks.learners(model, "bf16", 2, **layout) as learners:
        for number, save in enumerate(saves):
            train(learners, seed=number)
            learners.run(save_as_megatron_does, folders[f"{save} by Megatron"])
            learners.run(hold_forks, tmp_path / f"{save} may be written")
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
