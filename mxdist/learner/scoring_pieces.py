"""What ``scoring`` needs of the distributions, by torch's operations, in pieces of a few tokens; on any device."""

import torch
from torch import Tensor

PIECE = 2**24
"""Elements of a piece of the distributions: 64 MiB in float32, of which a few copies exist at a time."""


def row_sums(logits: Tensor, places: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return m, s, sum (z - m) e^(z - m) and z(token) of each of ``places``, float32 [4, scored].

    z(token) is 0 where the token is not among these logits.
    """
    count, width = len(places), logits.shape[1]
    out = torch.empty(4, count, device=logits.device)
    for piece in _pieces(count, width):
        z = logits[places[piece]].float().div_(temperature)  # [piece, vocabulary]
        out[3, piece] = _at(z, tokens[piece])
        out[0, piece] = z.amax(-1)
        z.sub_(out[0, piece, None])
        exponential = z.exp()
        out[1, piece] = exponential.sum(-1)
        out[2, piece] = z.mul_(exponential).sum(-1)
    return out


def write_gradient(
    gradient: Tensor, logits: Tensor, places: Tensor, tokens: Tensor, shift: Tensor, scale: Tensor, temperature: float
) -> None:
    """Write scale (1(token) - e^(z - shift)) / temperature into ``gradient`` at ``places``; shift is m + log s."""
    width = logits.shape[1]
    for piece in _pieces(len(places), width):
        factor = scale[piece] / temperature  # [piece]
        z = logits[places[piece]].float().div_(temperature).sub_(shift[piece, None])
        part = z.exp_().mul_(-factor[:, None])
        here = _is_here(tokens[piece], width)
        part.scatter_add_(1, tokens[piece].clamp(0, width - 1)[:, None], (factor * here)[:, None])
        gradient[places[piece]] = part.to(logits.dtype)


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
