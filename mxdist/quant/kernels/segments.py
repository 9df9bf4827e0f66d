"""Where the rows of experts lie: sorted by expert, every expert's rows filled up to whole tiles of 128.

Filling up makes every expert's rows and columns whole tiles, so that one launch quantises for all experts and every
GEMM's operand is aligned. Rows that fill up hold zeros. Matrices over these rows:

    by row     data [rows, K]; the scales of expert e are [K tiles, its rows] from K tiles * 128 * first[e] on
    by column  expert e has data [K, its rows] from K * 128 * first[e] on, and scales [its tiles, K] from K * first[e]
               on, or per square [K tiles, its tiles filled up to 4] from K tiles * fourths[e] on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mxdist.quant.format import TILE
from mxdist.quant.kernels.forms import Form, Fp8Matrix
from mxdist.quant.kernels.gemm import ROTATION_GAIN, SQUARES, TILES, Blocks
from mxdist.quant.transfer import sent


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """The layout of one batch of rows over the local experts.

    sizes    rows of each expert
    first    its first tile, in tiles from the start
    tiles    its number of tiles
    fourths  like first, with every expert's tiles filled up to a multiple of four
    table    int32 [tiles, 5], on the device: of every tile its expert's first, tiles, fourths, number and size
    source   int32 [rows]: where each row stands among those without filling, -1 for a row that fills up
    slots    int32 [R]: the inverse, the row of each of those without filling
    """

    sizes: tuple[int, ...]
    first: tuple[int, ...]
    tiles: tuple[int, ...]
    fourths: tuple[int, ...]
    table: Tensor
    source: Tensor
    slots: Tensor

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], device: torch.device) -> Segments:
        """Return the layout of R rows, sorted by expert, `sizes` of each on the host. Never waits for the device."""
        # numpy on the host: a dozen operations on a few numbers take torch longer than the device takes for a layer.
        count = np.asarray(sizes, dtype=np.int64)
        tiles = -(-count // TILE)
        first, fourths, start = (_before(each) for each in (tiles, -(-tiles // 4) * 4, count))
        rows, expert = int(count.sum()), np.arange(len(count)).repeat(tiles)
        within = TILE * (np.arange(len(expert)) - first[expert])  # of every tile its first row in its expert
        table = np.stack((first[expert], tiles[expert], fourths[expert], expert, count[expert]), 1)
        numbers = np.concatenate((table.ravel(), start[expert] + within, count[expert] - within)).astype(np.int32)
        on_device = sent(torch.from_numpy(numbers), device)
        at, left = on_device[5 * len(expert) :].view(2, -1, 1)
        lanes = torch.arange(TILE, dtype=torch.int32, device=device)
        source = torch.where(lanes < left, at + lanes, -1).flatten()
        slots = torch.empty(rows + 1, dtype=torch.int32, device=device)  # the last is for rows that fill up
        places = torch.arange(len(source), dtype=torch.int32, device=device)
        slots.scatter_(0, torch.where(source < 0, rows, source).long(), places)
        return cls(
            tuple(sizes), tuple(first.tolist()), tuple(tiles.tolist()), tuple(fourths.tolist()),
            on_device[: 5 * len(expert)].view(-1, 5), source, slots[:-1],
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """All rows, those that fill up included."""
        return self.source.shape[0]

    def span(self, expert: int) -> slice:
        """The rows of an expert, those that fill up included."""
        start = TILE * self.first[expert]
        return slice(start, start + TILE * self.tiles[expert])


def _before(counts: np.ndarray) -> np.ndarray:
    """Of each the sum of those before it."""
    return counts.cumsum(0) - counts


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

    def lefts(self, segments: Segments) -> list[Blocks]:
        """Every expert's rows as left operands."""
        tiles, scale, lengths = self.k // TILE, self.scale, [TILE * count for count in segments.tiles]
        parts = zip(self.data.split(lengths), lengths, segments.first, strict=True)
        # One view each, not a part's shape and its transpose: there are hundreds of them.
        return [
            Blocks(data, [scale.as_strided((rows, tiles), (1, rows), TILE * tiles * first)], TILES)
            for data, rows, first in parts
        ]

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

    def lefts(self, segments: Segments) -> list[Blocks]:
        """Every expert's columns, form TILE, as left operands."""
        assert self.form is Form.TILE
        data, features = self.data, self.features
        scale = self.scale * ROTATION_GAIN if self.rotated else self.scale
        return [
            Blocks(
                data.as_strided((features, TILE * tiles), (TILE * tiles, 1), TILE * features * first),
                [scale.as_strided((features, tiles), (1, features), features * first)],
                TILES,
            )
            for tiles, first in zip(segments.tiles, segments.first, strict=True)
        ]

    def rights(self, segments: Segments) -> list[Blocks]:
        """Every expert's columns, form SQUARE, as right operands."""
        assert self.form is Form.SQUARE
        data, scale, features, squares = self.data, self.scale, self.features, self.features // TILE
        padded = [-(-tiles // 4) * 4 for tiles in segments.tiles]
        return [
            Blocks(
                data.as_strided((TILE * tiles, features), (1, TILE * tiles), TILE * features * first),
                [scale.as_strided((height, squares), (1, height), squares * fourth)],
                SQUARES,
            )
            for tiles, first, height, fourth in zip(
                segments.tiles, segments.first, padded, segments.fourths, strict=True
            )
        ]

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
