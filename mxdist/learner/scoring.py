"""Log-probabilities of given tokens, and the entropy of the distributions they were drawn from.

A vocabulary may have 150,000 tokens, so the distributions never exist as a whole: they are computed in float32 by
kernels that keep sums alone (``scoring_kernel``) or in pieces of a few tokens (``scoring_pieces``), and again in the
backward pass. Besides the logits only their gradient is as large as they are.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from mxdist.learner import scoring_pieces
from mxdist.quant.backend import quantisers_lack


def token_scores(
    logits: Tensor, places: Tensor, tokens: Tensor, temperature: float, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Score tokens under softmax(logits / temperature), in float32.

    Args:
        logits: [places, vocabulary], of any float dtype. With ``group``, this rank's part of the vocabulary: its ranks
            hold equal parts, in order.
        places: int64 [scored], no place twice: where each token is predicted.
        tokens: int64 [scored].
        group: the tensor-parallel ranks; each gets the whole result, and the gradient of its own logits.
    Returns:
        Log-probabilities, float32 [scored], with gradient; and the sum of the entropies (nats) of the distributions at
        ``places``, float32 [], without.
    """
    group = group if group is not None and group.size() > 1 else None
    return _Scores.apply(logits, places, tokens, temperature, group)


class _Scores(torch.autograd.Function):
    """With z the logits over the temperature, m their maximum and s the sum of e^(z - m):

    log p(token) = z(token) - m - log s        its gradient in z: 1(token) - e^(z - m) / s
    entropy      = log s - sum (z - m) e^(z - m) / s
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, places: Tensor, tokens: Tensor, temperature: float, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        tokens = tokens - (0 if group is None else group.rank() * logits.shape[1])  # from this rank's first
        largest, total, weighted, chosen = _by(logits).row_sums(logits, places, tokens, temperature)
        if group is not None:
            own = largest.clone()
            all_reduce(largest, ReduceOp.MAX, group)
            fall = own - largest
            sums = torch.stack((total * fall.exp(), (weighted + fall * total) * fall.exp(), chosen))
            all_reduce(sums, ReduceOp.SUM, group)
            total, weighted, chosen = sums
        log_sum = total.log()
        entropy = (log_sum - weighted / total).sum()
        shift = largest + log_sum
        ctx.save_for_backward(logits, places, tokens, shift)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return chosen - largest - log_sum, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, places, tokens, shift = ctx.saved_tensors
        gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format)
        _by(logits).write_gradient(gradient, logits, places, tokens, shift, grads[0].contiguous(), ctx.temperature)
        return gradient, None, None, None, None


def _by(logits: Tensor) -> ModuleType:
    if logits.stride(1) != 1 or quantisers_lack(logits.device) is not None:
        return scoring_pieces
    from mxdist.learner import scoring_kernel

    return scoring_kernel
