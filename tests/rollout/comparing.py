"""What tests of engines do again and again: give weights, read answers, and hold them against a reference model."""

import numpy as np
import torch

from mxdist.messages import RolloutResult
from mxdist.model.recipes import model_recipes
from mxdist.sync.parity import compare_checksums
from mxdist.sync.payload import learner_checksums
from tests.rollout.engine_process import EngineProcess
from tests.rollout.reference_model import answer_logprobs, payloads, random_tensors, reference_model


def sync(engine: EngineProcess, seed: int, version: int) -> dict[str, torch.Tensor]:
    tensors = random_tensors(engine.shape, seed)
    sent = payloads(tensors, model_recipes(engine.config), version)
    compare_checksums(learner_checksums(sent), engine.load(sent))
    return tensors


def answers(result: RolloutResult) -> list[tuple[list[int], list[float]]]:
    return [(s.tokens.tolist(), s.logprobs.tolist()) for group in result.groups for s in group.samples]


def logprob_differences(
    engine: EngineProcess, tensors: dict[str, torch.Tensor], result: RolloutResult, temperature: float
) -> np.ndarray:
    """Of every sampled token, from what the reference model with these weights gives it."""
    model = reference_model(engine.shape, tensors, model_recipes(engine.config))
    return np.concatenate(
        [
            sample.logprobs - answer_logprobs(model, group.prompt.tokens, sample.tokens.tolist(), temperature).numpy()
            for group in result.groups
            for sample in group.samples
        ]
    )
