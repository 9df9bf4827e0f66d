"""Random numbers that belong to elements, not to the order of computation: Philox 4x32-10 on torch integers.

An element's 16 random bits are a function of (seed, stream, purpose, its index in the whole tensor). How the tensor
is cut over chunks, devices or ranks changes nothing. Source: Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (SC 2011); eight elements share one call of four 32-bit words, as a GPU kernel would do it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ELEMENTS_PER_CALL = 8
ROUNDING, RESIDUAL_ROUNDING, SIGNS = 0, 1, 2
"""Purposes: what the bits of one (seed, stream) are drawn for."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Draw:
    """Where an operand's random numbers come from: a seed, and where this piece lies in the whole tensor.

    seed     any 64-bit integer; give every step and layer its own.
    stream   tells apart the tensors that share a seed.
    row, column   position of this piece's first element in the whole tensor seen as [rows, K]; column is a multiple
             of 8.
    columns  K of the whole tensor; None when this piece has whole rows.
    """

    seed: int
    stream: int = 0
    row: int = 0
    column: int = 0
    columns: int | None = None

    def __post_init__(self) -> None:
        if self.column % ELEMENTS_PER_CALL:
            raise ValueError(f"a shard's first column is a multiple of {ELEMENTS_PER_CALL}, not {self.column}.")

    def below(self, rows: int) -> Draw:
        """The same draw for the piece that starts `rows` further down."""
        return replace(self, row=self.row + rows)


def uniform(draw: Draw, purpose: int, rows: int, k: int, width: int, device: torch.device) -> Tensor:
    """Return float32 (r + 1/2) / 2^16 [rows, width], r the elements' 16 random bits, for a piece [rows, k].

    width is k padded to a multiple of 16; what is drawn for the padding has no meaning.
    """
    stride = -(-(draw.columns or k) // ELEMENTS_PER_CALL)  # calls per row of the whole tensor
    row = torch.arange(draw.row, draw.row + rows, device=device).unsqueeze(-1)
    first = draw.column // ELEMENTS_PER_CALL
    call = row * stride + torch.arange(first, first + width // ELEMENTS_PER_CALL, device=device)
    halves = [half for word in philox(draw.seed, call, draw.stream, purpose) for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).view(rows, width).to(torch.float32).add_(0.5).mul_(2.0**-16)


def random_signs(draw: Draw, width: int, device: torch.device) -> Tensor:
    """Return float32 +-1 [width], a function of the column only, so that all rows are rotated alike."""
    whole_row = Draw(draw.seed, draw.stream, 0, draw.column)
    return torch.where(uniform(whole_row, SIGNS, 1, width, width, device)[0] < 0.5, 1.0, -1.0)


def philox(seed: int | Tensor, counter: Tensor, stream: int, purpose: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words (int64 tensors in [0, 2^32)) of Philox 4x32-10.

    The key is the seed's two halves; the counter words are the low and high half of `counter` (int64, >= 0), stream
    and purpose. Several seeds are an int64 tensor that broadcasts with the counter.
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1 = counter & _WORD, counter >> 32
    c2, c3 = torch.full_like(counter, stream & _WORD), torch.full_like(counter, purpose)
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product of two 32-bit words.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32).bitwise_and_(_WORD), (p1 >> 32).bitwise_and_(_WORD)
        c0, c2 = high1.bitwise_xor_(c1).bitwise_xor_(k0), high0.bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(_WORD), p0.bitwise_and_(_WORD)
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3
