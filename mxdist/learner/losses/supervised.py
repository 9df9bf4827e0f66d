"""Negative log-likelihood of given answers, mean over their tokens: the warm start."""

import numpy as np
import torch

from mxdist.learner.losses.base import LossInputs, LossOutput, Objective, response_sum


class SupervisedObjective(Objective):
    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        return np.zeros_like(rewards, dtype=np.float32)

    def token_weights(self, lengths: np.ndarray, max_new_tokens: int) -> np.ndarray:  # noqa: ARG002
        return np.full(len(lengths), 1.0 / max(int(lengths.sum()), 1), dtype=np.float32)

    def loss(self, inputs: LossInputs) -> LossOutput:
        token_loss = torch.where(inputs.mask, -inputs.logprobs, 0.0)
        return LossOutput(
            (token_loss * inputs.weights.unsqueeze(-1)).sum(),
            {"warm_start/loss": response_sum(-inputs.logprobs, inputs)},
        )
