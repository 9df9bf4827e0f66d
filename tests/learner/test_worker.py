"""Updates, scores, exports and checkpoints of real learner ranks, against transformers and against each other."""

import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mxdist.config.schema import Grpo, Supervised
from mxdist.errors import NotFinite, UserError
from mxdist.learner.worker import LearnerWorker
from mxdist.messages import Mean, TrainBatch, UpdateReport, WeightPayload
from tests.learner.batches import random_batch
from tests.model.against_transformers import logprobs_of, transformers_model
from tests.model.ranks import MOE, Learners, RankProcesses, shape_of

UNCLIPPED = {"clip_grad": 1e9}


def tensors(payloads: Sequence[WeightPayload]) -> dict[str, np.ndarray]:
    return {entry.name: entry.parts["values"] for payload in payloads for entry in payload.entries}


def mean(reports: Sequence[UpdateReport], name: str) -> float:
    return sum((report.means[name] for report in reports), Mean(0.0, 0.0)).value


def trained(ranks: RankProcesses, count: int, batch: TrainBatch, **settings: object) -> dict[str, np.ndarray]:
    """Weights after three updates with large steps."""
    with ranks.learners(MOE, "bf16", count, optimizer=UNCLIPPED, **settings) as learners:
        for _ in range(3):
            learners.call("update", batch, Grpo(), 1e-2)
        return tensors(learners.call("export", 3))


def distance(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    assert first.keys() == second.keys()
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


# Updates


def test_the_gradient_is_that_of_the_plain_sum_over_the_whole_batch(ranks: RankProcesses, tmp_path: Path) -> None:
    batch = random_batch(13)
    with ranks.learners(MOE, "bf16", 2, micro_batch_tokens=30, optimizer=UNCLIPPED) as learners:
        model = transformers_model(shape_of(MOE), learners.call("export", 0), tmp_path)
        reports = learners.call("update", batch, Supervised(), 1e-3)
    weights = torch.from_numpy(batch.weights[:, None] * batch.response_mask)[:, 1:]
    loss = -(logprobs_of(model, batch.tokens) * weights).sum()
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm().item()
    assert [report.grad_norm for report in reports] == pytest.approx([norm, norm], rel=1e-4)
    assert mean(reports, "warm_start/loss") == pytest.approx(loss.item(), rel=1e-5)


def test_experts_over_two_ranks_train_as_on_one(ranks: RankProcesses) -> None:
    # 13 rows do not divide by two, so that one rank also has a row that is only there to fill up.
    alone, divided = (trained(ranks, count, random_batch(13)) for count in (1, 2))
    assert distance(alone, divided) < 2e-4
    replicated = trained(ranks, 2, random_batch(13), expert_parallel=1)
    assert distance(alone, replicated) < 2e-4


def test_the_size_of_micro_batches_changes_nothing(ranks: RankProcesses) -> None:
    sizes = [trained(ranks, 1, random_batch(12), micro_batch_tokens=size) for size in (200, 50, 1)]
    assert distance(sizes[0], sizes[1]) < 2e-4
    assert distance(sizes[0], sizes[2]) < 2e-4


def test_a_rank_without_any_response_token_takes_part(ranks: RankProcesses) -> None:
    batch = random_batch(4)
    batch.response_mask[1:] = False
    with ranks.learners(MOE, "mxfp4_mbs_of", 2) as learners:
        reports = learners.call("update", batch, Grpo(), 1e-3)
    assert sorted(report.entropy.tokens for report in reports) == [0, batch.response_mask.sum()]
    assert reports[0].grad_norm == reports[1].grad_norm > 0


def test_one_update_has_no_policy_drift_and_a_second_minibatch_has_some(ranks: RankProcesses) -> None:
    batch = random_batch(12)
    drift = {}
    for minibatches in (1, 3):
        with ranks.learners(MOE, "bf16") as learners:
            algorithm = Grpo(minibatches=minibatches, prompts_per_step=3, samples_per_prompt=4)
            (report,) = learners.call("update", batch, algorithm, 1e-2)
            drift[minibatches] = mean([report], "actor/ppo_kl")
            assert (report.seconds["old_logprobs"] > 0) == (minibatches > 1)
    assert drift[1] == 0
    assert abs(drift[3]) > 1e-4


def test_learning_rate_zero_changes_no_weight_and_gradients_are_clipped_to_the_limit(ranks: RankProcesses) -> None:
    with ranks.learners(MOE, "bf16") as learners:
        before = tensors(learners.call("export", 0))
        learners.call("update", random_batch(), Supervised(), 0.0)
        assert distance(before, tensors(learners.call("export", 1))) == 0
        assert learners.run(clipped_norm, random_batch()) == [pytest.approx(1.0, rel=1e-3)]


def clipped_norm(worker: LearnerWorker, batch: TrainBatch) -> float:
    """Norm of the gradients that reach the optimizer from a batch whose own gradient is large (limit 1)."""
    heavy = replace(batch, weights=batch.weights * 1000)
    assert worker.update(heavy, Supervised(), 0.0).grad_norm > 100
    parts = worker._policy.optimizer.chained_optimizers
    grads = [p.grad for part in parts for group in part.optimizer.param_groups for p in group["params"]]
    return float(torch.stack([grad.norm() for grad in grads]).norm())


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4_mbs_of"])
def test_supervised_steps_learn_a_small_batch_by_heart(recipe: str, ranks: RankProcesses) -> None:
    batch = random_batch(8)
    with ranks.learners(MOE, recipe, 2) as learners:
        losses = [mean(learners.call("update", batch, Supervised(), 1e-2), "warm_start/loss") for _ in range(40)]
    assert losses[0] > 3
    assert losses[-1] < 0.5


def test_a_bfloat16_model_trains_like_the_float32_one(ranks: RankProcesses) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        with ranks.learners(MOE.model_copy(update={"dtype": dtype}), "mxfp4", 2) as learners:
            reports = [learners.call("update", random_batch(), Supervised(), 1e-3) for _ in range(10)]
            losses[dtype] = np.array([mean(report, "warm_start/loss") for report in reports])
    assert losses["float32"][0] - losses["float32"][-1] > 0.1
    assert np.abs(losses["bfloat16"] - losses["float32"]).max() < 0.1


def test_weight_decay_shrinks_matrices_and_leaves_norms_alone(ranks: RankProcesses) -> None:
    batch = replace(random_batch(), weights=np.zeros(12, np.float32))  # no gradient: decay is all that acts
    with ranks.learners(MOE, "bf16", 2, optimizer={"weight_decay": 0.5}) as learners:
        before = tensors(learners.call("export", 0))
        learners.call("update", batch, Supervised(), 0.1)
        after = tensors(learners.call("export", 1))
    for name, values in before.items():
        factor = 1 - 0.5 * 0.1 if values.ndim == 2 else 1
        assert np.allclose(after[name], factor * values, rtol=1e-6), name


@pytest.mark.parametrize("ranks_", [1, 2])
def test_gradients_that_are_not_finite_stop_the_run_before_a_weight_changes(ranks_: int, ranks: RankProcesses) -> None:
    batch = random_batch()
    batch.weights[0] = np.nan
    with ranks.learners(MOE, "bf16", ranks_) as learners:
        before = tensors(learners.call("export", 0))
        with pytest.raises(NotFinite, match=r"first that of output_layer\.weight in the backward pass of update 1"):
            learners.call("update", batch, Supervised(), 1e-3)
        assert distance(before, tensors(learners.call("export", 0))) == 0
        learners.call("update", random_batch(), Supervised(), 1e-3)  # and the next batch can be learnt from
        assert 0 < distance(before, tensors(learners.call("export", 1))) < 1


def test_an_update_with_gradients_that_are_not_finite_is_left_out_when_asked_to(ranks: RankProcesses) -> None:
    batch = random_batch()
    batch.weights[0] = np.nan
    with ranks.learners(MOE, "bf16", 2, guards={"not_finite": "skip"}) as learners:
        before = tensors(learners.call("export", 0))
        reports = learners.call("update", batch, Supervised(), 1e-3)
        assert all(np.isnan(report.grad_norm) for report in reports)
        assert distance(before, tensors(learners.call("export", 0))) == 0


# Scores


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_the_logprobs_of_transformers(temperature: float, ranks: RankProcesses, tmp_path: Path) -> None:
    batch = random_batch(9, temperature=temperature)
    with ranks.learners(MOE, "bf16", 2) as learners:
        model = transformers_model(shape_of(MOE), learners.call("export", 0), tmp_path)
        scored = learners.call("score", batch)
        empty = learners.call("score", batch.rows(slice(0, 0)))
    expected = np.zeros(batch.tokens.shape, dtype=np.float32)
    expected[:, 1:] = logprobs_of(model, batch.tokens, temperature).detach().numpy()
    expected[~batch.response_mask] = 0
    assert np.abs(sum(scored) - expected).max() < 1e-4
    assert ((scored[0] != 0) & (scored[1] != 0)).sum() == 0
    assert empty[0].shape == (0, batch.tokens.shape[1])


# Exports


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_every_tensor_is_exported_by_exactly_one_rank(expert_parallel: int, ranks: RankProcesses) -> None:
    with ranks.learners(MOE, "mxfp4_mbs_of", 2, expert_parallel=expert_parallel) as learners:
        payloads = learners.call("export", 7)
        modules = {name for report in learners.reports for name in report.quantised_modules}
    names = [entry.name for payload in payloads for entry in payload.entries]
    assert len(names) == len(set(names)) == 2 + 1 + MOE.num_hidden_layers * (2 + 6 + 1 + 3 * MOE.num_experts)
    assert {
        entry.name.removesuffix(".weight") for payload in payloads for entry in payload.entries if entry.kind == "mx"
    } == modules
    assert all(payload.version == 7 for payload in payloads)


def test_packed_weights_are_those_of_the_forward_pass_and_do_not_depend_on_the_layout(ranks: RankProcesses) -> None:
    exports = []
    for count in (1, 2):
        with ranks.learners(MOE, "mxfp4_mbs_of", count) as learners:
            exports.append({e.name: e for payload in learners.call("export", 0) for e in payload.entries})
            used = {name: values for rank in learners.run(values_in_use) for name, values in rank.items()}
            check_parts(exports[-1], used)
    alone, divided = exports
    assert alone.keys() == divided.keys()
    assert all(alone[name].checksums == divided[name].checksums for name in alone)


def values_in_use(worker: LearnerWorker) -> dict[str, np.ndarray]:
    """By name, the rows of the matrix that the forward pass multiplies with."""
    from mxdist.model.weights import hf_tensors

    found = {}
    for tensor in hf_tensors(worker._policy.model, worker.shape):
        if tensor.module is not None:
            found[tensor.name] = torch.cat([tensor.module.quantised_values()[rows] for rows in tensor.rows]).numpy()
    return found


def check_parts(entries: dict, used: dict[str, np.ndarray]) -> None:
    from mxdist.quant.recipe import get_recipe
    from mxdist.quant.tensor import MXTensor
    from mxdist.sync.payload import part_checksum

    operand = get_recipe("mxfp4_mbs_of").w
    assert operand is not None
    assert {name for name, entry in entries.items() if entry.kind == "mx"} == used.keys()
    for name, values in used.items():
        parts = {part: torch.from_numpy(array) for part, array in entries[name].parts.items()}
        read = MXTensor.from_parts(parts, entries[name].shape, operand).dequantise()
        assert np.array_equal(read.numpy(), values)
        assert entries[name].checksums == {k: part_checksum(k, v) for k, v in (parts | {"values": read}).items()}


def test_an_exported_payload_does_not_change_with_the_next_step(ranks: RankProcesses) -> None:
    with ranks.learners(MOE, "bf16") as learners:
        assert learners.run(export_then_step, random_batch()) == [True]


def export_then_step(worker: LearnerWorker, batch: TrainBatch) -> bool:
    payload = worker.export(0)
    before = {entry.name: entry.parts["values"].copy() for entry in payload.entries}
    worker.update(batch, Supervised(), 1e-2)
    return all(np.array_equal(before[entry.name], entry.parts["values"]) for entry in payload.entries)


# Checkpoints


def train(learners: Learners, seeds: range) -> list[tuple[float, float]]:
    """Gradient norm and loss of one update for each seed."""
    results = []
    for seed in seeds:
        reports = learners.call("update", random_batch(12, seed=seed), Grpo(), 1e-2)
        results.append((reports[0].grad_norm, mean(reports, "actor/pg_loss")))
    return results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_continues_bit_for_bit_from_a_checkpoint(dtype: str, ranks: RankProcesses, tmp_path: Path) -> None:
    model = MOE.model_copy(update={"dtype": dtype})
    with ranks.learners(model, "mxfp4_mbs_of", 2) as learners:
        train(learners, range(2))
        learners.call("save", tmp_path)
        uninterrupted = train(learners, range(2, 5))  # goes on while the checkpoint is written
        learners.call("save_finished", True)
        weights = [entry.checksums for payload in learners.call("export", 5) for entry in payload.entries]
    with ranks.learners(model, "mxfp4_mbs_of", 2, run={"seed": 1}) as learners:
        learners.call("load", tmp_path)
        assert train(learners, range(2, 5)) == uninterrupted
        assert [entry.checksums for payload in learners.call("export", 5) for entry in payload.entries] == weights


@pytest.mark.parametrize(("saved", "loaded"), [((2, 2), (1, 1)), ((1, 1), (2, 2)), ((2, 1), (2, 2))])
def test_a_checkpoint_continues_on_another_layout(
    saved: tuple[int, int], loaded: tuple[int, int], ranks: RankProcesses, tmp_path: Path
) -> None:
    with ranks.learners(MOE, "bf16", saved[0], expert_parallel=saved[1]) as learners:
        train(learners, range(2))
        learners.call("save", tmp_path)
        learners.call("save_finished", True)
        uninterrupted = train(learners, range(2, 5))
    with ranks.learners(MOE, "bf16", loaded[0], expert_parallel=loaded[1], run={"seed": 1}) as learners:
        learners.call("load", tmp_path)
        assert np.allclose(train(learners, range(2, 5)), uninterrupted, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_before_the_first_step_can_be_loaded(ranks: RankProcesses, tmp_path: Path) -> None:
    with ranks.learners(MOE, "bf16") as learners:
        start = tensors(learners.call("export", 0))
        learners.call("save", tmp_path)
        learners.call("save_finished", True)
        learners.call("update", random_batch(), Supervised(), 1e-2)
        once = tensors(learners.call("export", 1))
        learners.call("load", tmp_path)
        assert distance(start, tensors(learners.call("export", 0))) == 0
        learners.call("update", random_batch(), Supervised(), 1e-2)
        assert distance(once, tensors(learners.call("export", 1))) == 0


def test_saving_leaves_no_process_behind(ranks: RankProcesses, tmp_path: Path) -> None:
    with ranks.learners(MOE, "bf16", 2) as learners:
        learners.call("save", tmp_path)
        learners.call("save_finished", True)
        assert learners.run(child_processes) == [0, 0]


def child_processes(worker: LearnerWorker) -> int:  # noqa: ARG001
    return len(multiprocessing.active_children())


def test_a_checkpoint_of_another_model_is_refused_by_name_and_changes_nothing(
    ranks: RankProcesses, tmp_path: Path
) -> None:
    with ranks.learners(MOE, "bf16") as learners:
        learners.call("save", tmp_path)
        learners.call("save_finished", True)
    with ranks.learners(MOE.model_copy(update={"num_experts": 2}), "bf16") as learners:
        before = tensors(learners.call("export", 0))
        with pytest.raises(UserError, match="num_experts 4 there and 2 here"):
            learners.call("load", tmp_path)
        assert distance(before, tensors(learners.call("export", 0))) == 0
