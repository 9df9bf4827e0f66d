"""Dr. GRPO (arXiv 2503.20783): neither the group's deviation nor the answer's length divides anything."""

import numpy as np

from mxdist.learner.losses.grpo import GrpoObjective


class DrGrpoObjective(GrpoObjective):
    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        return (rewards - rewards.mean(axis=1, keepdims=True)).astype(np.float32)

    def token_weights(self, lengths: np.ndarray, max_new_tokens: int) -> np.ndarray:
        return np.full(len(lengths), 1.0 / (len(lengths) * max_new_tokens), dtype=np.float32)
