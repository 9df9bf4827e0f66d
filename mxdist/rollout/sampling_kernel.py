"""`sampling.sample` on a GPU: one pass over the logits in pieces, and one over what was found in each piece.

No noise and no probabilities are written to memory. The log-probability comes from the same pass, by a running sum of
exp(z - the piece's maximum).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.kernels.device import philox_words
from mxdist.rollout import sampling

_PURPOSE = tl.constexpr(sampling.PURPOSE)
_SMALL = tl.constexpr(sampling.SMALL)
_LARGEST = tl.constexpr(sampling.LARGEST)
PIECE, WARPS = 2048, 4
"""Tokens of the vocabulary that a program looks at."""


@triton.jit
def _exponential(seed, position, first, TOKENS: tl.constexpr):
    """sampling.exponential, float32 [TOKENS] for the tokens from `first`, a multiple of 4."""
    call = first // 4 + tl.arange(0, TOKENS // 4)
    a, b, c, d = philox_words(seed, (position << 32) | call.to(tl.int64), 0, _PURPOSE)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [TOKENS])  # token 4 call + 2 i + j
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, _LARGEST)
    series = u * (u * (u * 0.3333333432674408 + 0.5) + 1.0)
    return tl.where(u < _SMALL, series, -tl.log(1.0 - u))


@triton.jit
def _look(logits, stride, temperatures, seeds, positions, found, best_tokens, columns, count, PIECE: tl.constexpr):
    """Of a piece of a row: the best score, its z, the largest z and the sum of exp(z - largest); and the best token."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = piece * PIECE + tl.arange(0, PIECE)
    inside = token < columns
    z = tl.load(logits + row * stride + token, mask=inside, other=-float("inf")).to(tl.float32)
    warmth = tl.load(temperatures + row)
    score = z
    if warmth > 0:
        z = z * tl.div_rn(1.0, warmth)
        noise = _exponential(tl.load(seeds + row), tl.load(positions + row), piece * PIECE, PIECE)
        score = z - tl.log(noise)
    score = tl.where(inside, score, -float("inf"))
    best, place = tl.max(score, 0, return_indices=True)
    largest = tl.maximum(tl.max(z, 0), -1e30)  # finite, where a piece has no possible token
    total = tl.sum(tl.exp(z - largest), 0)
    chosen = tl.sum(tl.where(token == piece * PIECE + place, z, 0.0), 0)
    out = found + (row * 4) * count + piece
    tl.store(out, best)
    tl.store(out + count, chosen)
    tl.store(out + 2 * count, largest)
    tl.store(out + 3 * count, total)
    tl.store(best_tokens + row * count + piece, piece * PIECE + place)


@triton.jit
def _decide(found, best_tokens, drawn, logprobs, columns, count, PIECES: tl.constexpr):
    """Of a row: the best token of all pieces, and its log-probability."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PIECES)
    inside = piece < count
    place = found + (row * 4) * count + piece
    score = tl.load(place, mask=inside, other=-float("inf"))
    chosen = tl.load(place + count, mask=inside, other=0.0)
    largest = tl.load(place + 2 * count, mask=inside, other=-1e30)
    total = tl.load(place + 3 * count, mask=inside, other=0.0)
    _, best = tl.max(score, 0, return_indices=True)
    top = tl.max(largest, 0)
    every = tl.sum(total * tl.exp(largest - top), 0)
    z = tl.sum(tl.where(piece == best, chosen, 0.0), 0)
    token = tl.load(best_tokens + row * count + tl.minimum(best, count - 1))
    tl.store(drawn + row, tl.minimum(token, columns - 1))  # a row of NaN must name a token as well
    tl.store(logprobs + row, z - top - tl.log(every))


def launch(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`sampling.sample`, of tensors on one GPU."""
    rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        raise ValueError("the logits of a row must lie side by side")
    pieces = triton.cdiv(vocabulary, PIECE)
    found = torch.empty(rows, 4, pieces, dtype=torch.float32, device=logits.device)
    best_tokens = torch.empty(rows, pieces, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _look[rows, pieces](
        logits, logits.stride(0), temperature, seeds, positions, found, best_tokens, vocabulary, pieces, PIECE,
        num_warps=WARPS,
    )  # fmt: skip
    _decide[(rows,)](
        found, best_tokens, tokens, logprobs, vocabulary, pieces, triton.next_power_of_2(pieces), num_warps=1
    )
    return tokens, logprobs
