"""Where the rows of experts lie: sorted by expert, every expert's rows filled up to whole tiles of 128.

Filling up makes every expert's rows and columns whole tiles, so that one launch quantises for all experts and every
GEMM's operand is aligned. Rows that fill up hold zeros. Matrices over these rows:

    by row     data [rows, K]; the scales of expert e are [K tiles, its rows] from K tiles * 128 * first[e] on
    by column  expert e has data [K, its rows] from K * 128 * first[e] on, and scales [its tiles, K] from K * first[e]
               on, or per square [K tiles, its tiles filled up to 4] from K tiles * fourths[e] on
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from mxdist.quant.format import TILE
from mxdist.quant.kernels.forms import Form, Fp8Matrix


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """The layout of one batch of tokens over the local experts.

    sizes    rows of each expert
    first    its first tile, in tiles from the start
    tiles    its number of tiles
    fourths  like first, with every expert's tiles filled up to a multiple of four
    table    int32 [tiles, 5], on the device: of every tile its expert's first, tiles, fourths, number and size
    source   int32 [rows]: the token that a row is a copy of, -1 for a row that fills up
    slots    int32 [tokens, copies]: the row of each copy of a token, -1 where its expert is not here
    """

    sizes: tuple[int, ...]
    first: tuple[int, ...]
    tiles: tuple[int, ...]
    fourths: tuple[int, ...]
    table: Tensor
    source: Tensor
    slots: Tensor

    @classmethod
    def of(cls, experts: Tensor, count: int) -> Segments:
        """Return the layout for the chosen experts int [tokens, copies], 0..count - 1; others are not here.

        Waits for the device once, for the sizes.
        """
        flat = experts.flatten()
        here = (flat >= 0) & (flat < count)
        order = torch.where(here, flat, count).argsort(stable=True)
        sizes = tuple(torch.bincount(flat[here], minlength=count).tolist())
        tiles = tuple(-(-size // TILE) for size in sizes)
        first = tuple(accumulate(tiles, initial=0))[:-1]
        fourths = tuple(accumulate((-(-n // 4) * 4 for n in tiles), initial=0))[:-1]
        lines = [
            (first[e], tiles[e], fourths[e], e, sizes[e]) for e in range(count) for _ in range(tiles[e])
        ]  # fmt: skip
        device, rows = experts.device, sum(sizes)
        order = order[:rows]
        chosen = flat[order]
        start = torch.tensor((0, *accumulate(sizes)), device=device)[chosen]
        slot = torch.tensor((*first, 0), device=device)[chosen] * TILE + torch.arange(rows, device=device) - start
        source = torch.full((sum(tiles) * TILE,), -1, dtype=torch.int32, device=device)
        source[slot] = (order // experts.shape[1]).to(torch.int32)
        slots = torch.full(flat.shape, -1, dtype=torch.int32, device=device)
        slots[order] = slot.to(torch.int32)
        table = torch.tensor(lines, dtype=torch.int32, device=device).view(-1, 5)
        return cls(sizes, first, tiles, fourths, table, source, slots.view(experts.shape))

    @property
    def rows(self) -> int:
        """All rows, those that fill up included."""
        return self.source.shape[0]

    def span(self, expert: int) -> slice:
        """The rows of an expert, those that fill up included."""
        start = TILE * self.first[expert]
        return slice(start, start + TILE * self.tiles[expert])

    def spread(self, values: Tensor) -> Tensor:
        """Return float32 [rows] of values [tokens, copies]: each copy's at its row, 0 elsewhere."""
        out = torch.zeros(self.rows + 1, dtype=torch.float32, device=values.device)  # the last is for copies elsewhere
        return out.scatter_(0, self.slots.flatten().long() % (self.rows + 1), values.flatten().float())[:-1]

    def collect(self, values: Tensor) -> Tensor:
        """Return [tokens, copies] of values [rows]: inverse of `spread`, 0 for copies elsewhere."""
        padded = torch.cat((values, values.new_zeros(1)))
        return padded[self.slots.long()]


@dataclass(frozen=True, slots=True, eq=False)
class ByRow:
    """Rows of all experts quantised along K, form TILE; see the module."""

    data: Tensor
    scale: Tensor
    k: int

    @classmethod
    def empty(cls, segments: Segments, k: int) -> ByRow:
        """Uninitialised; k is a multiple of 128."""
        device = segments.source.device
        data = torch.empty(segments.rows, k, dtype=torch.float8_e4m3fn, device=device)
        return cls(data, torch.empty(segments.rows * (k // TILE), dtype=torch.float32, device=device), k)

    def expert(self, segments: Segments, index: int) -> Fp8Matrix:
        """View of one expert's rows."""
        span, tiles = segments.span(index), self.k // TILE
        rows = span.stop - span.start
        scale = self.scale[tiles * span.start : tiles * span.stop].view(tiles, rows).t()
        return Fp8Matrix(self.data[span], scale, Form.TILE, self.k)


@dataclass(frozen=True, slots=True, eq=False)
class ByColumn:
    """Rows of all experts quantised along tokens, transposed: [features, tokens] for each expert; see the module."""

    data: Tensor
    scale: Tensor
    features: int
    form: Form
    rotated: bool

    @classmethod
    def empty(cls, segments: Segments, features: int, form: Form, rotated: bool) -> ByColumn:
        """Uninitialised; form TILE or SQUARE, features a multiple of 128."""
        device = segments.source.device
        tiles = len(segments.table)
        data = torch.empty(tiles * TILE * features, dtype=torch.float8_e4m3fn, device=device)
        count = tiles * features
        if form is Form.SQUARE:
            count = sum(-(-n // 4) * 4 for n in segments.tiles) * (features // TILE)
        return cls(data, torch.empty(count, dtype=torch.float32, device=device), features, form, rotated)

    def expert(self, segments: Segments, index: int) -> Fp8Matrix:
        """View of one expert's columns."""
        first, tiles = segments.first[index], segments.tiles[index]
        k = TILE * tiles
        data = self.data[TILE * first * self.features :][: k * self.features].view(self.features, k)
        if self.form is Form.SQUARE:
            padded, squares = -(-tiles // 4) * 4, self.features // TILE
            scale = self.scale[segments.fourths[index] * squares :][: padded * squares].view(squares, padded)
            return Fp8Matrix(data, scale[:, :tiles], Form.SQUARE, k, self.rotated)
        scale = self.scale[first * self.features :][: tiles * self.features].view(tiles, self.features).t()
        return Fp8Matrix(data, scale, Form.TILE, k, self.rotated)
