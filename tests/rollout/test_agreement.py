"""Learner and engine give an answer's tokens the same log-probabilities, up to the rounding of their arithmetic."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mxdist.config.schema import Config, ModelConfig
from mxdist.messages import Noise, Prompt, RolloutRequest, SamplingSettings, TrainBatch
from mxdist.sync.parity import compare_checksums, compare_modules
from mxdist.sync.payload import learner_checksums
from tests.model.ranks import DENSE, RankProcesses, shape_of
from tests.rollout.engine_process import EngineProcess

WIDE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128, "rope_theta": 1e4, "initializer_range": 0.2}
QWEN2 = DENSE.model_copy(update=WIDE | {"family": "qwen2", "tie_word_embeddings": True})
PROMPTS = tuple(Prompt(f"train-{i}", (1, *[3 + (5 * i + j * j) % 30 for j in range(4 + i)]), "") for i in range(8))
LENGTH, ANSWER = 24, 12


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    processes = RankProcesses(1)
    yield processes
    processes.close()


def differences(ranks: RankProcesses, model: ModelConfig, recipe: str, folder: Path) -> np.ndarray:
    """Learner minus engine, nats, for every token of sampled answers."""
    config = Config(model=model, recipe=recipe, learner={"expert_parallel": 1})
    engine = EngineProcess(config, shape_of(model), folder)
    with ranks.learners(model, recipe) as learners:
        payloads = learners.call("export", 0)
        compare_modules(learners.reports[0].quantised_modules, engine.report.quantised_modules, recipe != "bf16")
        compare_checksums(learner_checksums(payloads), engine.load(payloads))
        result = engine.generate(RolloutRequest(0, PROMPTS, SamplingSettings(2, 0.8, ANSWER, 0), Noise(0.0, 0)))
        samples = [(group.prompt.tokens, sample) for group in result.groups for sample in group.samples]
        tokens = np.zeros((len(samples), LENGTH), dtype=np.int64)
        mask, rollout = np.zeros(tokens.shape, dtype=bool), np.zeros(tokens.shape, dtype=np.float32)
        for row, (prompt, sample) in enumerate(samples):
            end = len(prompt) + len(sample.tokens)
            tokens[row, :end] = [*prompt, *sample.tokens]
            mask[row, len(prompt) : end] = True
            rollout[row, len(prompt) : end] = sample.logprobs
        none = np.zeros(len(samples), dtype=np.float32)
        [scored] = learners.call("score", TrainBatch(tokens, mask, rollout, none, none, 0.8))
    engine.close()
    return (scored - rollout)[mask]


def test_log_probabilities_agree(ranks: RankProcesses, tmp_path: Path) -> None:
    """Without quantisers, which would hide small differences; tests/e2e/test_commands.py has them, and experts."""
    found = np.abs(differences(ranks, QWEN2, "bf16", tmp_path))
    assert len(found) > 60
    assert found.max() < 2e-5
