"""What an algorithm is: advantages and token weights (controller, numpy) and a loss (learner, torch).

A loss reads nothing back from the device, or the host would wait for it in every micro-batch: what is reported stays
there until ``policy`` reads all of an update at once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch. Index t of every [sequences, length] tensor belongs to token t."""

    logprobs: Tensor  # float32 [sequences, length], of the current policy, with gradient
    old_logprobs: Tensor  # float32 [sequences, length], of the learner before this batch's first update
    rollout_logprobs: Tensor  # float32 [sequences, length], of the engine that sampled the tokens
    advantages: Tensor  # float32 [sequences]
    mask: Tensor  # bool [sequences, length], True on response tokens
    places: tuple[Tensor, Tensor]  # int64 [tokens] each: rows and columns of those, in order
    weights: Tensor  # float32 [sequences], weight of each of the sequence's response tokens


@dataclass(frozen=True)
class TokenSum:
    """A sum over tokens, float32 [] on the device, and their number: a mean that adds up over micro-batches."""

    total: Tensor
    tokens: int


@dataclass(frozen=True)
class LossOutput:
    loss: Tensor  # scalar: the sum over the micro-batch of weight * token loss
    metrics: dict[str, TokenSum]


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


def response_sum(values: Tensor, inputs: LossInputs) -> TokenSum:
    """Of ``values`` [sequences, length] on the response tokens, without gradient."""
    selected = values.detach()[inputs.places]  # by the mask, the host would wait to learn how many they are
    return TokenSum(selected.sum(), selected.numel())


def truncated_importance_weights(inputs: LossInputs, cap: float | None) -> Tensor:
    """min(pi_learner / pi_rollout, cap) of each token, without gradient; ones where ``cap`` is None.

    Corrects for the engine that sampled not being the learner that trains: other kernels, stale weights, noise.
    """
    if cap is None:
        return torch.ones_like(inputs.logprobs)
    return (inputs.old_logprobs - inputs.rollout_logprobs).detach().exp().clamp(max=cap)


def mismatch_metrics(inputs: LossInputs, tis_weights: Tensor, cap: float | None) -> dict[str, TokenSum]:
    """How far the learner before this update is from the engine that sampled, over response tokens."""
    difference = (inputs.old_logprobs - inputs.rollout_logprobs).detach()
    metrics = {
        "rollout_corr/kl": response_sum(-difference, inputs),
        "rollout_corr/k3_kl": response_sum(difference.exp() - 1 - difference, inputs),
        "rollout_corr/logprob_abs_diff": response_sum(difference.abs(), inputs),
    }
    if cap is not None:
        metrics["rollout_corr/tis_weight"] = response_sum(tis_weights, inputs)
        metrics["rollout_corr/tis_capped"] = response_sum((tis_weights >= cap).float(), inputs)
    return metrics
