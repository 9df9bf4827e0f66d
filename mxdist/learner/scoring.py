"""Log-probabilities of given tokens, and the entropy of the distributions they were drawn from."""

import torch
from torch import Tensor

from mxdist.messages import EntropyStatistics


def token_scores(logits: Tensor, tokens: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, EntropyStatistics]:
    """Score the tokens of ``mask`` under softmax(logits / temperature), in float32.

    Args:
        logits: [sequences, length, vocabulary]; those at t predict token t + 1.
        tokens: int64 [sequences, length].
        mask: bool [sequences, length], the tokens to score. The first token of a sequence has no prediction and is
            left out.
    Returns:
        Log-probabilities, float32 [sequences, length], 0 outside the mask, with gradient; and the entropy (nats) of
        the distributions at the tokens of the mask.
    """
    rows, before = mask[:, 1:].nonzero(as_tuple=True)
    distribution = torch.log_softmax(logits[rows, before].float() / temperature, dim=-1)  # [scored, vocabulary]
    chosen = distribution.gather(1, tokens[rows, before + 1].unsqueeze(1)).squeeze(1)  # [scored]
    logprobs = torch.zeros(mask.shape, device=logits.device).index_put((rows, before + 1), chosen)
    with torch.no_grad():
        entropy = -(distribution.exp() * distribution).sum()
    return logprobs, EntropyStatistics(float(entropy), len(rows))
