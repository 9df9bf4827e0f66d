"""DAPO (arXiv 2503.14476): GRPO's advantage and clipping, but every token of the batch weighs the same.

Dynamic sampling, its other half, is where groups are collected: ``mxdist.control.collect``.
"""

import numpy as np

from mxdist.learner.losses.grpo import GrpoObjective


class DapoObjective(GrpoObjective):
    def token_weights(self, lengths: np.ndarray, max_new_tokens: int) -> np.ndarray:  # noqa: ARG002
        return np.full(len(lengths), 1.0 / max(int(lengths.sum()), 1), dtype=np.float32)
