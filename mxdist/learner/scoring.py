"""Log-probabilities of given tokens, and the entropy of the distributions they were drawn from.

A vocabulary may have 150,000 tokens, so the distributions never exist as a whole: they are computed in pieces of a few
tokens, in float32, and again in the backward pass. Besides the logits only their gradient is as large as they are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from mxdist.messages import EntropyStatistics

PIECE = 2**24
"""Elements of a piece of the distributions: 64 MiB in float32, of which a few copies exist at a time."""


def token_scores(
    logits: Tensor, places: Tensor, tokens: Tensor, temperature: float, group: ProcessGroup | None = None
) -> tuple[Tensor, EntropyStatistics]:
    """Score tokens under softmax(logits / temperature), in float32.

    Args:
        logits: [places, vocabulary], of any float dtype. With ``group``, this rank's part of the vocabulary: its ranks
            hold equal parts, in order.
        places: int64 [scored], no place twice: where each token is predicted.
        tokens: int64 [scored].
        group: the tensor-parallel ranks; each gets the whole result, and the gradient of its own logits.
    Returns:
        Log-probabilities, float32 [scored], with gradient; and the entropy (nats) of the distributions at ``places``.
    """
    group = group if group is not None and group.size() > 1 else None
    logprobs, entropy = _Scores.apply(logits, places, tokens, temperature, group)
    return logprobs, EntropyStatistics(float(entropy), len(tokens))


class _Scores(torch.autograd.Function):
    """With z the logits over the temperature, m their maximum and s the sum of e^(z - m):

    log p(token) = z(token) - m - log s        its gradient in z: 1(token) - e^(z - m) / s
    entropy      = log s - sum (z - m) e^(z - m) / s
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, places: Tensor, tokens: Tensor, temperature: float, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        count, width = len(places), logits.shape[1]
        tokens = tokens - (0 if group is None else group.rank() * width)  # from the first of this rank's vocabulary
        largest = torch.full((count,), -torch.inf, device=logits.device)
        for piece in _pieces(count, width):
            largest[piece] = logits[places[piece]].amax(-1).float() / temperature
        if group is not None:
            all_reduce(largest, ReduceOp.MAX, group)
        sums = torch.zeros(3, count, device=logits.device)  # s, sum (z - m) e^(z - m), z(token) - m
        for piece in _pieces(count, width):
            z = logits[places[piece]].float().div_(temperature).sub_(largest[piece, None])  # [piece, vocabulary]
            sums[2, piece] = _at(z, tokens[piece])
            exponential = z.exp()
            sums[0, piece] = exponential.sum(-1)
            sums[1, piece] = z.mul_(exponential).sum(-1)
        if group is not None:
            all_reduce(sums, ReduceOp.SUM, group)
        log_sum = sums[0].log()
        entropy = (log_sum - sums[1] / sums[0]).sum()
        ctx.save_for_backward(logits, places, tokens, largest + log_sum)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return sums[2] - log_sum, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, places, tokens, shift = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        width = logits.shape[1]
        for piece in _pieces(len(places), width):
            scale = grads[0][piece] / ctx.temperature  # [piece]
            z = logits[places[piece]].float().div_(ctx.temperature).sub_(shift[piece, None])
            part = z.exp_().mul_(-scale[:, None])
            here = _is_here(tokens[piece], width)
            part.scatter_add_(1, tokens[piece].clamp(0, width - 1)[:, None], (scale * here)[:, None])
            gradient[places[piece]] = part.to(logits.dtype)
        return gradient, None, None, None, None


def _pieces(count: int, width: int) -> list[slice]:
    step = max(1, PIECE // width)
    return [slice(start, start + step) for start in range(0, count, step)]


def _at(z: Tensor, tokens: Tensor) -> Tensor:
    """z [rows, vocabulary] at each row's token; 0 where another rank has it."""
    width = z.shape[1]
    found = z.gather(1, tokens.clamp(0, width - 1)[:, None]).squeeze(1)
    return found.masked_fill(~_is_here(tokens, width), 0)


def _is_here(tokens: Tensor, width: int) -> Tensor:
    return (tokens >= 0) & (tokens < width)
