"""GRPO (arXiv 2402.03300): group-normalised advantages, every sequence weighs the same; decoupled clipping."""

import numpy as np

from mxdist.learner.losses.base import LossInputs, LossOutput, Objective
from mxdist.learner.losses.clipped import clipped_surrogate, token_log_ratio


def normalise_by_group(rewards: np.ndarray) -> np.ndarray:
    """(reward - mean) / standard deviation (of the group as the population) in each group; zeros where all are equal.

    Args:
        rewards: float [groups, samples].
    Returns:
        float32 [groups, samples].
    """
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    deviation = rewards.std(axis=1, keepdims=True)
    return np.divide(centred, deviation, out=np.zeros_like(centred, dtype=np.float64), where=deviation > 1e-8).astype(
        np.float32
    )


class GrpoObjective(Objective):
    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        return normalise_by_group(rewards)

    def token_weights(self, lengths: np.ndarray, max_new_tokens: int) -> np.ndarray:  # noqa: ARG002
        return (1.0 / (len(lengths) * np.maximum(lengths, 1))).astype(np.float32)

    def loss(self, inputs: LossInputs) -> LossOutput:
        algorithm = self.algorithm
        return clipped_surrogate(
            inputs, token_log_ratio(inputs), algorithm.clip_low, algorithm.clip_high, algorithm.tis_cap
        )
