"""What an algorithm is: advantages and token weights (controller, numpy) and a loss (learner, torch)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mxdist.messages import Mean


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch. Index t of every [sequences, length] tensor belongs to token t."""

    logprobs: Tensor  # float32 [sequences, length], of the current policy, with gradient
    old_logprobs: Tensor  # float32 [sequences, length], of the learner before this batch's first update
    rollout_logprobs: Tensor  # float32 [sequences, length], of the engine that sampled the tokens
    advantages: Tensor  # float32 [sequences]
    mask: Tensor  # bool [sequences, length], True on response tokens
    weights: Tensor  # float32 [sequences], weight of each of the sequence's response tokens


@dataclass(frozen=True)
class LossOutput:
    loss: Tensor  # scalar: the sum over the micro-batch of weight * token loss
    metrics: dict[str, Mean]


class Objective(ABC):
    """One algorithm. ``algorithm`` is its configuration section."""

    def __init__(self, algorithm) -> None:  # type: ignore[no-untyped-def]  # each subclass has its own section
        self.algorithm = algorithm

    @abstractmethod
    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """Advantage of each sample from the rewards of its group.

        Args:
            rewards: float [groups, samples].
        Returns:
            float32 [groups, samples].
        """

    @abstractmethod
    def token_weights(self, lengths: np.ndarray, max_new_tokens: int) -> np.ndarray:
        """Weight of each response token, by sequence, so that the update's objective is the plain sum of
        weight * token loss over all its micro-batches and ranks.

        Args:
            lengths: int [sequences], response tokens of every sequence of one optimizer update.
            max_new_tokens: the longest response that could have been sampled.
        Returns:
            float32 [sequences].
        """

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutput:
        """Loss of one micro-batch."""


def masked_mean(values: Tensor, mask: Tensor) -> Mean:
    """Mean over the tokens of ``mask``, as a sum and a count that add up over micro-batches and ranks."""
    selected = values.detach()[mask]
    return Mean(float(selected.sum()), float(selected.numel()))


def truncated_importance_weights(inputs: LossInputs, cap: float | None) -> Tensor:
    """min(pi_learner / pi_rollout, cap) of each token, without gradient; ones where ``cap`` is None.

    Corrects for the engine that sampled not being the learner that trains: other kernels, stale weights, noise.
    """
    if cap is None:
        return torch.ones_like(inputs.logprobs)
    return (inputs.old_logprobs - inputs.rollout_logprobs).detach().exp().clamp(max=cap)


def mismatch_metrics(inputs: LossInputs, tis_weights: Tensor, cap: float | None) -> dict[str, Mean]:
    """How far the learner before this update is from the engine that sampled, over response tokens."""
    difference = (inputs.old_logprobs - inputs.rollout_logprobs).detach()
    metrics = {
        "rollout_corr/kl": masked_mean(-difference, inputs.mask),
        "rollout_corr/k3_kl": masked_mean(difference.exp() - 1 - difference, inputs.mask),
        "rollout_corr/logprob_abs_diff": masked_mean(difference.abs(), inputs.mask),
    }
    if cap is not None:
        metrics["rollout_corr/tis_weight"] = masked_mean(tis_weights, inputs.mask)
        metrics["rollout_corr/tis_capped"] = masked_mean((tis_weights >= cap).float(), inputs.mask)
    return metrics
