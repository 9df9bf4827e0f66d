"""DeepSpeed's learner against Megatron's: what it sends, how it trains; its checkpoints. Two ranks on CPUs and gloo."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mxdist.config.schema import Grpo, ModelConfig
from mxdist.errors import NotFinite, UserError
from mxdist.messages import Mean, UpdateReport
from mxdist.model.run_safetensors import open_run_weights
from mxdist.model.run_weights import RunWeights
from tests.learner.batches import random_batch
from tests.model.checkpoints import config_of, save_checkpoint
from tests.model.ranks import DENSE, Learners, RankProcesses, shape_of

ZERO: dict[str, dict[str, Any]] = {
    "1": {"zero_stage": 1},
    "2, offloaded": {"zero_stage": 2, "zero_offload": "optimizer"},
    "3": {"zero_stage": 3},
    "3, recomputed, offloaded": {"zero_stage": 3, "zero_offload": "weights", "recompute": True},
}
TIED = ModelConfig(**DENSE.model_dump() | {"family": "qwen2", "tie_word_embeddings": True, "vocab_size": 40})
SMALL = {"backend": "deepspeed", "micro_batch_tokens": 40}  # several micro-batches of every rank


@pytest.fixture(scope="module")
def pair() -> Iterator[RankProcesses]:
    """Not the processes that Megatron is adjusted in."""
    processes = RankProcesses(2)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def single() -> Iterator[RankProcesses]:
    """DeepSpeed keeps traces of a group of ranks for the length of a process: one process, one number of ranks."""
    processes = RankProcesses(1)
    yield processes
    processes.close()


def mean(reports: list[UpdateReport], name: str) -> float:
    return sum((report.means[name] for report in reports), Mean(0.0, 0.0)).value


def train(learners: Learners, seeds: range) -> list[tuple[float, float]]:
    """Loss and gradient norm of one update for each seed."""
    results = []
    for seed in seeds:
        reports = learners.call("update", random_batch(12, seed=seed), Grpo(), 1e-3)
        results.append((mean(reports, "actor/pg_loss"), reports[0].grad_norm))
    return results


def sent(learners: Learners) -> dict[str, dict[str, int]]:
    """Checksums of every tensor's parts. Each tensor comes from one rank."""
    entries = [entry for payload in learners.call("export", 1) for entry in payload.entries]
    assert len({entry.name for entry in entries}) == len(entries)
    return {entry.name: entry.checksums for entry in entries}


class Megatron:
    """What Megatron's learner gives, each asked once."""

    def __init__(self, ranks: RankProcesses) -> None:
        self.losses, self.sent, self.names = cache(self._losses), cache(self._sent), cache(self._names)
        self._ranks = ranks

    def _losses(self, recipe: str) -> list[tuple[float, float]]:
        with self._ranks.learners(DENSE, recipe, 2, micro_batch_tokens=40) as learners:
            return train(learners, range(10))

    def _sent(self, model: ModelConfig) -> dict[str, dict[str, int]]:
        with self._ranks.learners(model, "mxfp4_mbs_of", 2) as learners:
            return sent(learners)

    def _names(self, recipe: str) -> set[str]:
        with self._ranks.learners(DENSE, recipe, 2) as learners:
            return {*learners.call("update", random_batch(), Grpo(), 1e-3, True)[0].means}


@pytest.fixture(scope="module")
def megatron(ranks: RankProcesses) -> Megatron:
    return Megatron(ranks)


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("recipe", ["bf16", "mxfp4_mbs_of"])
def test_losses_of_ten_steps_are_megatrons(recipe: str, zero: str, pair: RankProcesses, megatron: Megatron) -> None:
    with pair.learners(DENSE, recipe, 2, **SMALL, **ZERO[zero]) as learners:
        ours = np.array(train(learners, range(10)))
    theirs = np.array(megatron.losses(recipe))
    assert np.ptp(theirs[:, 0]) > 0.01
    assert np.abs(ours - theirs)[:, 0].max() < 1e-4
    assert np.allclose(ours[:, 1], theirs[:, 1], rtol=1e-3)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("source", ["random", "directory"])
def test_the_same_weights_are_sent_byte_for_byte(
    source: str, stage: int, pair: RankProcesses, megatron: Megatron, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = DENSE
    if source == "directory":
        folder = tmp_path_factory.getbasetemp() / "tied"
        model = config_of(folder if folder.exists() else save_checkpoint(folder, shape_of(TIED)))
    with pair.learners(model, "mxfp4_mbs_of", 2, backend="deepspeed", zero_stage=stage) as learners:
        assert sent(learners) == megatron.sent(model)
        assert learners.reports[0].quantised_modules


def test_watched_steps_report_what_megatrons_do(pair: RankProcesses, megatron: Megatron) -> None:
    with pair.learners(DENSE, "mxfp4_g4", 2, **SMALL, zero_stage=3) as learners:
        reports = learners.call("update", random_batch(), Grpo(), 1e-3, True)
    assert {*reports[0].means} == {*reports[1].means} == megatron.names("mxfp4_g4")
    parts = ("scale_bias", "deadzone", "grid", "cross_scale_grid", "cross_scale_deadzone")
    for kind in ("weights", "activations", "gradients"):
        assert sum(mean(reports, f"quant/{part}/{kind}") for part in parts) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("zero", ZERO)
def test_training_continues_bit_for_bit_from_a_checkpoint(zero: str, pair: RankProcesses, tmp_path: Path) -> None:
    model = DENSE.model_copy(update={"dtype": "bfloat16" if zero == "1" else "float32"})
    with pair.learners(model, "mxfp4_mbs_of", 2, **SMALL, **ZERO[zero]) as learners:
        train(learners, range(2))
        learners.call("save", tmp_path)
        assert learners.call("save_finished", True) == [True, True]
        at_saving = sent(learners)
        uninterrupted = train(learners, range(2, 4))
        learners.call("load", tmp_path)
        assert sent(learners) == at_saving
    with pair.learners(model, "mxfp4_mbs_of", 2, run={"seed": 1}, **SMALL, **ZERO[zero]) as learners:
        learners.call("load", tmp_path)
        assert train(learners, range(2, 4)) == uninterrupted


@pytest.mark.parametrize("zero", ["2, offloaded", "3"])
def test_a_checkpoint_continues_on_other_numbers_of_ranks(
    zero: str, pair: RankProcesses, single: RankProcesses, tmp_path: Path
) -> None:
    first, second = tmp_path / "first" / "learner", tmp_path / "second" / "learner"
    for folder in (first, second):
        folder.mkdir(parents=True)
    with pair.learners(DENSE, "bf16", 2, **SMALL, **ZERO[zero]) as learners:
        train(learners, range(2))
        learners.call("save", first)
        uninterrupted = train(learners, range(2, 5))
    with single.learners(DENSE, "bf16", 1, run={"seed": 1}, **SMALL, **ZERO[zero]) as learners:
        learners.call("load", first)
        learners.call("save", second)
        assert np.allclose(train(learners, range(2, 5)), uninterrupted, rtol=1e-3, atol=1e-5)
    with pair.learners(DENSE, "bf16", 2, run={"seed": 2}, **SMALL, **ZERO[zero]) as learners:
        learners.call("load", second)
        assert np.allclose(train(learners, range(2, 5)), uninterrupted, rtol=1e-3, atol=1e-5)
    assert [path.name for path in first.parent.iterdir()] == ["learner"]  # nothing of the universal form


def test_the_weights_of_a_checkpoint_can_be_read_without_deepspeed(pair: RankProcesses, tmp_path: Path) -> None:
    with pair.learners(DENSE, "bf16", 2, **SMALL, zero_stage=3) as learners:
        learners.call("save", tmp_path)
        entries = [entry for payload in learners.call("export", 0) for entry in payload.entries]
    weights: RunWeights = open_run_weights(tmp_path)
    assert weights.tensors.keys() == {entry.name for entry in entries}
    for entry in entries:
        stored = weights.cut(weights.matrix(weights.tensors[entry.name].matrix), entry.name)
        assert torch.equal(stored, torch.from_numpy(entry.parts["values"]))


def test_checkpoints_that_cannot_be_gone_on_from_are_refused(
    pair: RankProcesses, ranks: RankProcesses, tmp_path: Path
) -> None:
    zero, megatron = tmp_path / "zero", tmp_path / "megatron"
    for folder in (zero, megatron):
        folder.mkdir()
    with ranks.learners(DENSE, "bf16", 2) as learners:
        learners.call("save", megatron)
        learners.call("save_finished", True)
    with pair.learners(DENSE, "bf16", 2, **SMALL, zero_stage=2) as learners:
        learners.call("save", zero)
        with pytest.raises(UserError, match=r"was written with learner\.backend=megatron"):
            learners.call("load", megatron)
    message = r"learner\.zero_stage=2, which cannot go on as learner\.zero_stage=3"
    with pair.learners(DENSE, "bf16", 2, **SMALL, zero_stage=3) as learners, pytest.raises(UserError, match=message):
        learners.call("load", zero)
    with ranks.learners(DENSE, "bf16", 2) as learners, pytest.raises(UserError, match=r"learner\.backend=deepspeed"):
        learners.call("load", zero)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 3])
def test_gradients_that_are_not_finite_change_no_weight(stage: int, dtype: str, pair: RankProcesses) -> None:
    batch = random_batch()
    batch.weights[0] = np.nan
    model = DENSE.model_copy(update={"dtype": dtype})
    with pair.learners(model, "mxfp4", 2, **SMALL, zero_stage=stage) as learners:
        before = sent(learners)
        with pytest.raises(NotFinite, match=r"first that of lm_head\.weight in the backward pass of update 1;"):
            learners.call("update", batch, Grpo(), 1e-3)
        assert sent(learners) == before
        (_, norm), *_ = train(learners, range(1))  # and the next batch can be learnt from
        assert 0 < norm < 100
        assert sent(learners) != before
