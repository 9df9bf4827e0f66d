"""Training with quantised gradients: it learns, every draw is new, and a run can be repeated bit for bit."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mxdist.config.schema import Grpo, Supervised
from mxdist.learner.worker import LearnerWorker
from mxdist.messages import TrainBatch, UpdateReport
from mxdist.model.draws import GradientDraws
from tests.learner.batches import random_batch
from tests.model.ranks import DENSE, MOE, RankProcesses


def test_draws_differ_between_updates_micro_batches_ranks_linears_and_runs() -> None:
    seeds = []
    for run_seed, rank in ((0, 0), (0, 1), (1, 0)):
        draws = GradientDraws(run_seed, rank, rank)
        for update, micro_batch in ((0, 0), (0, 1), (1, 0)):
            draws.move_to(update, micro_batch)
            seeds += [draws.seed("model.layers.0.self_attn.o_proj"), draws.seed("model.layers.1.self_attn.o_proj")]
            seeds += [draws.seed("model.layers.0.mlp.experts.0.down_proj")]
    assert len(set(seeds)) == len(seeds)


def test_ranks_that_share_the_tokens_of_a_linear_share_its_draws() -> None:
    # Tensor-parallel ranks: the same sequences, but tokens of their own for the copies of an expert.
    first, second = GradientDraws(0, 0, 0), GradientDraws(0, 0, 1)
    assert first.seed("model.layers.0.self_attn.o_proj") == second.seed("model.layers.0.self_attn.o_proj")
    expert = "model.layers.0.mlp.experts.0.down_proj"
    assert first.seed(expert) != second.seed(expert)


def losses(reports: Sequence[UpdateReport]) -> float:
    return sum(report.means["warm_start/loss"].total for report in reports)


@pytest.mark.parametrize("recipe", ["mxfp4_g4", "mxfp4_mbs_of_g4"])
def test_quantised_gradients_learn_a_small_batch_by_heart(recipe: str, ranks: RankProcesses) -> None:
    batch = random_batch(8)
    with ranks.learners(MOE, recipe, 2) as learners:
        run = [losses(learners.call("update", batch, Supervised(), 1e-2)) for _ in range(40)]
    assert run[0] > 3
    assert run[-1] < 0.7


def test_a_run_repeats_bit_for_bit_and_another_seed_rounds_otherwise(ranks: RankProcesses, tmp_path: Path) -> None:
    runs = []
    for seed in (0, 0, 1):
        with ranks.learners(MOE, "mxfp4_g4", 2, micro_batch_tokens=30, run={"seed": seed}) as learners:
            if not runs:
                learners.call("save", tmp_path)
                learners.call("save_finished", True)
            learners.call("load", tmp_path)  # the same weights for every seed
            runs.append([learners.call("update", random_batch(), Grpo(), 1e-3)[0].grad_norm for _ in range(3)])
    assert runs[0] == runs[1]
    assert all(first != second for first, second in zip(runs[0], runs[2], strict=True))


def test_the_draws_go_on_where_a_checkpoint_left_them(ranks: RankProcesses, tmp_path: Path) -> None:
    with ranks.learners(MOE, "mxfp4_g4", 2) as learners:
        for _ in range(2):
            learners.call("update", random_batch(), Grpo(), 1e-3)
        assert learners.run(updates) == [2, 2]
        learners.call("save", tmp_path)
        learners.call("save_finished", True)
        uninterrupted = learners.call("update", random_batch(), Grpo(), 1e-3)[0].grad_norm
    with ranks.learners(MOE, "mxfp4_g4", 2) as learners:
        learners.call("load", tmp_path)
        assert learners.run(updates) == [2, 2]
        assert learners.call("update", random_batch(), Grpo(), 1e-3)[0].grad_norm == uninterrupted


def updates(worker: LearnerWorker) -> int:
    return worker._policy.updates


def test_gradients_are_right_on_average_and_differ_between_updates(ranks: RankProcesses) -> None:
    # Unclipped: the norm that clipping divides by is noisy too, and would shift the mean.
    with ranks.learners(DENSE, "mxfp4_g4", optimizer={"clip_grad": 1e9}) as learners:
        [(exact, draws)] = learners.run(last_gradient, random_batch(), 60)
    assert all(not np.array_equal(first, second) for first, second in itertools.pairwise(draws))
    mean, spread = np.mean(draws, axis=0), np.std(draws, axis=0)
    single = np.linalg.norm(draws[0] - exact) / np.linalg.norm(exact)
    assert 0.05 < single < 1
    # Sixty draws bring the noise down by sqrt(60); what is left beyond it would be a bias.
    assert np.linalg.norm(mean - exact) < 1.3 * np.linalg.norm(spread) / 60**0.5


def last_gradient(worker: LearnerWorker, batch: TrainBatch, count: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Of the last layer's down projection: with exact gradient operands, and as drawn in each of ``count`` updates.

    Its dY is exact, so nothing but its own rounding acts; X along the tokens is rounded to nearest, which no average
    removes, and stays exact here.
    """
    linear = worker._policy.model.decoder.layers[-1].mlp.linear_fc2
    recipe = linear.recipe
    rounding = replace(recipe, x_wgrad=None)

    def gradient() -> np.ndarray:
        worker.update(batch, Supervised(), 0.0)
        return linear.weight.main_grad.numpy().copy()

    linear.recipe = replace(recipe, dy_dgrad=None, x_wgrad=None, dy_wgrad=None)
    exact = gradient()
    linear.recipe = rounding
    return exact, [gradient() for _ in range(count)]


def test_an_expert_without_tokens_takes_part(ranks: RankProcesses) -> None:
    with ranks.learners(MOE, "mxfp4_g4") as learners:
        assert learners.run(idle_gradient) == [0.0]


def idle_gradient(worker: LearnerWorker) -> float:
    experts = worker._policy.model.decoder.layers[0].mlp.experts
    rows = torch.randn(3, 64, requires_grad=True)
    output, _ = experts(rows, torch.tensor([0, 3, 0, 0]), torch.ones(3))
    idle = experts.local_experts[0].linear_fc1.weight
    return float(torch.autograd.grad(output.sum(), (rows, idle))[1].abs().max())
