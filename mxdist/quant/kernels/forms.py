"""An MXFP4 matrix as E4M3 bytes and float32 scales: the operand of an FP8 GEMM. No Triton here.

value = byte * scale. A byte holds an E2M1 value times 2^(block code - reference), so nothing is lost while the
scale's group spans at most 14 binades (`mxdist.quant.e4m3`); the quantiser guarantees that span per 1 x 128 tile.
Wider groups than a tile (a row, a 128 x 128 square, a whole weight) are exact for all data seen so far; beyond the
span the smallest values are rounded to multiples of 2^-9 of the byte's unit, at most 2^-17 of the group's maximum.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.format import TILE


class Form(StrEnum):
    """What shares a scale, for a matrix [rows, K] with K the contraction axis.

    ROW     each row: scale [rows, 1], contiguous
    TILE    each 1 x 128 tile: scale [rows, tiles] in memory [tiles, rows]
    SQUARE  each 128 x 128 square: scale [row tiles, tiles], in memory [row tiles, tiles rounded up to 4]
    """

    ROW = "row"
    TILE = "tile"
    SQUARE = "square"


class Fp8Matrix(NamedTuple):
    """E4M3 bytes and their scales.

    data      float8_e4m3fn [rows, tiles * 128], contiguous; K is padded with zeros to whole tiles
    scale     float32, see `Form`
    form      what shares a scale
    k         the contraction length before padding
    rotated   the values are H x / 32 per run of 32 along K; two rotated operands multiply to 1/32 of the product
    """

    data: Tensor
    scale: Tensor
    form: Form
    k: int
    rotated: bool = False

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.data.shape[0]

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values [rows, k], rotated ones still rotated; computed in float32."""
        scale = self.scale
        if self.form is Form.SQUARE:
            scale = scale.repeat_interleave(TILE, 0)[: self.rows]
        if self.form is not Form.ROW:
            scale = scale.repeat_interleave(TILE, 1)
        return (self.data.float() * scale)[:, : self.k].to(dtype)


def empty_tiles(rows: int, k: int, form: Form, device: torch.device, rotated: bool = False) -> Fp8Matrix:
    """Return an uninitialised matrix [rows, k] of `form`; a TILE with room for `filled_up`."""
    tiles, filled = -(-k // TILE), -(-rows // 4) * 4 if form is Form.TILE else rows
    data = torch.empty(filled, tiles * TILE, dtype=torch.float8_e4m3fn, device=device)
    if filled > rows:
        data = data[:rows]
    if form is Form.ROW:
        scale = torch.empty(rows, 1, dtype=torch.float32, device=device)
    elif form is Form.TILE:
        scale = torch.empty_strided((filled, tiles), (1, filled), dtype=torch.float32, device=device)
        if filled > rows:
            scale = scale[:rows]
    else:
        padded = -(-tiles // 4) * 4
        scale = torch.empty(-(-rows // TILE), padded, dtype=torch.float32, device=device)
        if padded > tiles:
            scale = scale[:, :tiles]
    return Fp8Matrix(data, scale, form, k, rotated)


def filled_up(matrix: Fp8Matrix) -> tuple[Tensor, Tensor]:
    """Data and scales of a TILE with rows added up to a multiple of four; what those hold means nothing."""
    data, scale, rows = matrix.data, matrix.scale, -(-matrix.rows // 4) * 4
    width, tiles = data.shape[1], scale.shape[1]
    has_room = data.untyped_storage().nbytes() >= data.storage_offset() + rows * width
    if has_room and data.is_contiguous() and scale.stride() == (1, rows):
        return data.as_strided((rows, width), (width, 1)), scale.as_strided((rows, tiles), (1, rows))
    more = rows - matrix.rows
    padded = F.pad(data.view(torch.uint8), (0, 0, 0, more)).view(data.dtype)
    return padded, F.pad(scale.t(), (0, more)).t()
