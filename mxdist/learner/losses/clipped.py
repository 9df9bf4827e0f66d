"""The clipped surrogate that GRPO, DAPO, Dr. GRPO and GSPO share (PPO, arXiv 1707.06347, equation 7)."""

import torch
from torch import Tensor

from mxdist.learner.losses.base import (
    LossInputs,
    LossOutput,
    mismatch_metrics,
    response_sum,
    truncated_importance_weights,
)


def clipped_surrogate(
    inputs: LossInputs, log_ratio: Tensor, low: float, high: float, tis_cap: float | None
) -> LossOutput:
    """-min(r A, clip(r, 1 - low, 1 + high) A), times the truncated importance weight, summed with token weights.

    Args:
        log_ratio: float32 [sequences, length], log r of each token, with gradient.
    """
    ratio = log_ratio.exp()
    advantages = inputs.advantages.unsqueeze(-1)  # [sequences, 1]
    clipped = ratio.clamp(1 - low, 1 + high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)  # [sequences, length]
    tis_weights = truncated_importance_weights(inputs, tis_cap)
    token_loss = torch.where(inputs.mask, -surrogate * tis_weights, 0.0)
    is_clipped = clipped * advantages < ratio * advantages
    metrics = {
        "actor/pg_clipfrac": response_sum(is_clipped.float(), inputs),
        "actor/ppo_kl": response_sum(inputs.old_logprobs - inputs.logprobs, inputs),
        **mismatch_metrics(inputs, tis_weights, tis_cap),
    }
    return LossOutput((token_loss * inputs.weights.unsqueeze(-1)).sum(), metrics)


def token_log_ratio(inputs: LossInputs) -> Tensor:
    """log(pi / pi_old) of each token, [sequences, length]."""
    return inputs.logprobs - inputs.old_logprobs


def sequence_log_ratio(inputs: LossInputs) -> Tensor:
    """Mean over a sequence's response of log(pi / pi_old), given to each of its tokens, [sequences, length]."""
    difference = torch.where(inputs.mask, inputs.logprobs - inputs.old_logprobs, 0.0)
    lengths = inputs.mask.sum(-1, keepdim=True).clamp(min=1)
    return (difference.sum(-1, keepdim=True) / lengths).expand_as(inputs.logprobs)
