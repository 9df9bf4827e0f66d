"""Drawing the next tokens: noise belongs to (seed, position, token), so that a sample depends on nothing else.

Gumbel-max: the token with the largest z - log(E) is a draw from softmax(z), where z are the tempered logits and E an
exponential variable for each token. E comes from the counter (token, position) of Philox with the sample's seed as its
key: no batch, worker or order of computation changes it, and a sample that is taken up again goes on where it was.
Source: Salmon et al., SC 2011, for the counters; Maddison et al., "A* sampling" (NeurIPS 2014), for the maximum.
"""

import torch
from torch import Tensor

from mxdist.quant.philox import philox

PURPOSE = 3
"""Of the random numbers, beside the purposes of quant.philox."""
WORDS_PER_CALL = 4  # 32-bit words that Philox gives at a time: one for each token
SMALL = 2.0**-8
"""Below it, -log(1 - u) is computed by its series: 1 - u would round the small values away."""
LARGEST = 1 - 2.0**-24


def sample(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of logits.

    Args:
        logits: [rows, vocabulary], floating point.
        temperature: float32 [rows]; 0 takes the most likely token, the first of several.
        seeds: int64 [rows], one per sample.
        positions: int64 [rows] in [0, 2^31), of the token in its answer.

    Returns:
        Tokens int32 [rows], and float32 [rows] their log-probabilities in softmax(logits / temperature); at
        temperature 0 in softmax(logits). They are NaN in a row that holds NaN.
    """
    if logits.is_cuda:
        from mxdist.rollout.sampling_kernel import launch

        return launch(logits, temperature, seeds, positions)
    return reference(logits, temperature, seeds, positions)


def reference(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`sample` in torch operations, on any device."""
    greedy = (temperature == 0).unsqueeze(-1)
    scaled = logits.float() * tempering(temperature).unsqueeze(-1)
    scores = scaled
    if not greedy.all():
        noise = exponential(seeds, positions, logits.shape[1]).log_()
        scores = torch.where(greedy, scaled, scaled - noise)
    tokens = scores.argmax(-1, keepdim=True)
    logprobs = scaled.gather(-1, tokens) - scaled.logsumexp(-1, keepdim=True)
    return tokens.squeeze(-1).int(), logprobs.squeeze(-1)


def tempering(temperature: Tensor) -> Tensor:
    """What logits are multiplied by."""
    return torch.where(temperature == 0, 1.0, 1 / temperature)


def exponential(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Exponential variables float32 [rows, vocabulary], of mean 1, all in [2^-33, 17]."""
    calls = torch.arange(-(-vocabulary // WORDS_PER_CALL), device=seeds.device)
    counter = (positions << 32).unsqueeze(-1) | calls  # [rows, calls]
    words = torch.stack(philox(seeds.unsqueeze(-1), counter, 0, PURPOSE), -1).flatten(1)[:, :vocabulary]
    u = words.float().add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST)
    series = u * (u * (u / 3 + 0.5) + 1)
    return torch.where(u < SMALL, series, -torch.log(1 - u))
