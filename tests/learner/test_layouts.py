"""Whatever the layout of ranks, the learner computes what transformers computes, and trains as one rank does."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mxdist.config.schema import Grpo, ModelConfig
from mxdist.learner.worker import LearnerWorker
from mxdist.messages import EntropyStatistics, Mean, UpdateReport
from tests.learner.batches import random_batch
from tests.model.checkpoints import config_of, save_checkpoint
from tests.model.ranks import DENSE, MOE, Learners, RankProcesses, shape_of

QWEN2 = ModelConfig(**DENSE.model_dump() | {"family": "qwen2", "tie_word_embeddings": True, "vocab_size": 40})
MODELS = {
    "qwen2, tied": QWEN2,
    "qwen3": DENSE,
    "qwen3_moe": MOE,
    "qwen3_moe, not normalised": ModelConfig(**MOE.model_dump() | {"norm_topk_prob": False}),
}
LAYOUTS = {
    "DP2": {"expert_parallel": 1},
    "EP2": {"expert_parallel": 2},
    "TP2": {"tensor_parallel": 2, "expert_parallel": 1},
    "TP2 EP2": {"tensor_parallel": 2, "expert_parallel": 2},
    "PP2": {"pipeline_parallel": 2, "expert_parallel": 1},
}
ALIKE = "qwen3_moe, not normalised"  # in all but the router, which knows of no layout but that of experts
CASES = [(model, layout) for model in MODELS for layout in LAYOUTS if "moe" in model or "EP" not in layout]
CASES = [(model, layout) for model, layout in CASES if model != ALIKE or layout == "EP2"]
SEQUENCES = [np.random.default_rng(0).integers(3, 40, length) for length in (17, 3, 9, 1)]
EXACT = {"recipe": "bf16", "optimizer": {"clip_grad": 1e9}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape_of(model)) for name, model in MODELS.items()
    }


class Alone:
    """What one rank gives, by model; each is asked once."""

    def __init__(self, ranks: RankProcesses, folders: dict[str, Path]) -> None:
        self._ranks, self._folders = ranks, folders
        self.trained = cache(self._trained)

    def _trained(self, model: str) -> dict[str, float]:
        with self._ranks.learners(config_of(self._folders[model]), **EXACT) as learners:
            return train(learners)


@pytest.fixture(scope="module")
def alone(ranks: RankProcesses, folders: dict[str, Path]) -> Alone:
    return Alone(ranks, folders)


def train(learners: Learners, minibatches: int = 2) -> dict[str, float]:
    """Every figure that two steps report, of several micro-batches and updates each."""
    algorithm = Grpo(minibatches=minibatches, prompts_per_step=4, samples_per_prompt=3)
    found: dict[str, float] = {}
    for step in range(2):
        batch = random_batch(12, seed=step)
        scores = sum(learners.call("score", batch))
        reports = learners.call("update", batch, algorithm, 1e-2)
        assert len({frozenset(report.means) for report in reports}) == 1
        assert len({report.grad_norm for report in reports}) == 1
        found |= {f"{step} {name}": value for name, value in summed(reports).items()}
        found[f"{step} score"] = float(np.square(scores).sum())
        found[f"{step} grad_norm"] = reports[0].grad_norm
    return found


def summed(reports: list[UpdateReport]) -> dict[str, float]:
    entropy = sum((report.entropy for report in reports), EntropyStatistics())
    means = {name: sum((r.means[name] for r in reports), Mean(0, 0)) for name in reports[0].means}
    # Padding is the layout's own.
    values = {name: mean.value for name, mean in means.items() if not name.startswith("perf/padding_fraction")}
    weights = {f"{name} (weight)": mean.weight for name, mean in means.items() if name.startswith("actor/")}
    return values | weights | {"entropy": entropy.total, "tokens": float(entropy.tokens)}


def check_logits(learners: Learners, folder: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = [logits for logits in learners.run(logits_of, SEQUENCES) if logits]
    assert found
    for sequence, *ours in zip(SEQUENCES, *found, strict=True):
        with torch.no_grad():
            theirs = reference(torch.from_numpy(sequence)[None]).logits[0].numpy()
        assert np.abs(theirs).max() > 0.1
        for logits in ours:
            assert np.abs(logits - theirs).max() < 1e-4


def logits_of(worker: LearnerWorker, sequences: list[np.ndarray]) -> list[np.ndarray]:
    return [logits.numpy() for logits in worker._policy.forward(sequences)]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_layout_computes_as_transformers_and_trains_as_one_rank(
    model: str, layout: str, ranks: RankProcesses, folders: dict[str, Path], alone: Alone
) -> None:
    expected = alone.trained(model)
    with ranks.learners(config_of(folders[model]), ranks=2, **EXACT, **LAYOUTS[layout]) as learners:
        check_logits(learners, folders[model])
        assert train(learners) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_one_rank_computes_as_transformers(model: str, ranks: RankProcesses, folders: dict[str, Path]) -> None:
    with ranks.learners(config_of(folders[model]), **EXACT) as learners:
        check_logits(learners, folders[model])


def test_tensor_and_pipeline_parallelism_combine(folders: dict[str, Path], alone: Alone) -> None:
    model = "qwen3_moe"
    expected = alone.trained(model)
    layout = {"tensor_parallel": 2, "pipeline_parallel": 2, "expert_parallel": 2}
    four = RankProcesses(4)
    try:
        with four.learners(config_of(folders[model]), ranks=4, **EXACT, **layout) as learners:
            check_logits(learners, folders[model])
            assert train(learners) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    finally:
        four.close()


@pytest.mark.parametrize("layout", ["EP2", "PP2"])
def test_recomputing_layers_changes_no_gradient(
    layout: str, ranks: RankProcesses, folders: dict[str, Path], alone: Alone
) -> None:
    model = "qwen3_moe"
    expected = alone.trained(model)
    with ranks.learners(config_of(folders[model]), ranks=2, recompute=True, **EXACT, **LAYOUTS[layout]) as learners:
        assert train(learners) == pytest.approx(expected, rel=1e-4, abs=1e-5)


WIDE = DENSE.model_copy(update={"intermediate_size": 128})  # whole MXFP4 blocks on each of two ranks


@pytest.mark.parametrize(
    ("layout", "recompute", "tolerance"),
    [("PP2", False, 1e-3), ("PP2", True, 1e-3), ("TP2", False, 0.1)],  # tensor-parallel ranks have draws of their own
)
def test_quantised_gradients_and_their_telemetry_know_every_layout(
    layout: str, recompute: bool, tolerance: float, ranks: RankProcesses
) -> None:
    norms = []
    for count, settings in ((1, {}), (2, LAYOUTS[layout] | {"recompute": recompute})):
        with ranks.learners(WIDE, "mxfp4_g4", count, **settings) as learners:
            reports = learners.call("update", random_batch(24), Grpo(), 1e-3, True)
            assert len({frozenset(report.means) for report in reports}) == 1
            norms.append(reports[0].grad_norm)
            shares = ("scale_bias", "deadzone", "grid", "cross_scale_grid", "cross_scale_deadzone")
            for kind in ("weights", "activations", "gradients"):
                parts = [sum((r.means[f"quant/{share}/{kind}"] for r in reports), Mean(0, 0)) for share in shares]
                assert sum(part.value for part in parts) == pytest.approx(1, abs=1e-4)
    assert norms[1] == pytest.approx(norms[0], rel=tolerance)


def test_router_flips_are_counted_once_in_every_layout(ranks: RankProcesses) -> None:
    found = []
    for count, settings in ((1, {}), (2, LAYOUTS["PP2"]), (2, LAYOUTS["TP2 EP2"])):
        with ranks.learners(MOE, "mxfp4", count, **settings) as learners:
            reports = learners.call("update", random_batch(8, seed=3), Grpo(), 0.0, True)
            found.append(sum((report.means["router/flip_rate"] for report in reports), Mean(0, 0)))
    alone, pipelined, divided = found
    assert pipelined == alone
    assert divided.weight == pytest.approx(alone.weight, abs=2 * MOE.num_hidden_layers)  # up to one token of padding
    assert divided.value == pytest.approx(alone.value, abs=0.02)


def test_a_bfloat16_model_keeps_its_weights_in_float32_in_the_optimizer(ranks: RankProcesses) -> None:
    with ranks.learners(MOE.model_copy(update={"dtype": "bfloat16"}), "bf16", 2) as learners:
        learners.call("update", random_batch(), Grpo(), 1e-6)
        assert all(learners.run(masters_are_finer))


def masters_are_finer(worker: LearnerWorker) -> bool:
    """Whether the optimizer's weights are float32 and hold what bfloat16 cannot."""
    parts = worker._policy.optimizer.chained_optimizers
    masters = [weight for part in parts for group in part.optimizer.param_groups for weight in group["params"]]
    finer = [not torch.equal(weight, weight.bfloat16().float()) for weight in masters if weight.dtype == torch.float32]
    return len(finer) == len(masters) and any(finer)
