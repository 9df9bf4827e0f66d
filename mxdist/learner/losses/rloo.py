"""RLOO (arXiv 2402.14740): REINFORCE on whole answers, each compared with the mean of the others in its group."""

import numpy as np
import torch

from mxdist.learner.losses.base import (
    LossInputs,
    LossOutput,
    Objective,
    mismatch_metrics,
    response_sum,
    truncated_importance_weights,
)


class RlooObjective(Objective):
    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        samples = rewards.shape[1]
        others = (rewards.sum(axis=1, keepdims=True) - rewards) / (samples - 1)
        return (rewards - others).astype(np.float32)

    def token_weights(self, lengths: np.ndarray, max_new_tokens: int) -> np.ndarray:  # noqa: ARG002
        return np.full(len(lengths), 1.0 / len(lengths), dtype=np.float32)

    def loss(self, inputs: LossInputs) -> LossOutput:
        # The importance ratio keeps the gradient unbiased over several updates of one batch; it is 1 at the first.
        ratio = (inputs.logprobs - inputs.old_logprobs).exp()
        tis_weights = truncated_importance_weights(inputs, self.algorithm.tis_cap)
        token_loss = torch.where(inputs.mask, -ratio * inputs.advantages.unsqueeze(-1) * tis_weights, 0.0)
        metrics = {
            "actor/ppo_kl": response_sum(inputs.old_logprobs - inputs.logprobs, inputs),
            **mismatch_metrics(inputs, tis_weights, self.algorithm.tis_cap),
        }
        return LossOutput((token_loss * inputs.weights.unsqueeze(-1)).sum(), metrics)
