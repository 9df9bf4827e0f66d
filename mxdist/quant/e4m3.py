"""MXFP4 as E4M3 bytes with one float32 scale per 1 x 128 tile: how Hopper's FP8 tensor cores multiply MXFP4 exactly.

A code's value times 2^r is an E4M3 number for r = -8..6, fifteen exponents. With r = (block code) - (largest code of
the tile) + 6 a tile whose codes span at most 14 binades loses nothing, and the quantiser guarantees that span
(`scaling.block_codes`). The macro factor goes into the tile's scale. Source: NUMERICS.md 3; arXiv 2603.02731.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.format import E8M0_BIAS, E8M0_MIN, E8M0_NAN, TILE, e2m1_decode_packed
from mxdist.quant.layout import as_rows, group_max
from mxdist.quant.rounding import scale_of
from mxdist.quant.scaling import macro_factors
from mxdist.quant.tensor import MXTensor

TOP_EXPONENT = 6
"""6 * 2^6 = 384 is the largest E2M1 value times a power of two that E4M3 (at most 448) holds."""


def to_e4m3(mx: MXTensor) -> tuple[Tensor, Tensor]:
    """Return (bytes float8_e4m3fn [rows, tiles * 128], scales float32 [rows, tiles]) of an `MXTensor`.

    byte * scale is the tensor's value, exactly while the codes of a tile span at most 14 binades; beyond that small
    values are rounded to multiples of 2^-9 of the byte's unit, zeros staying zero. Padding is zeros.

    ValueError for tensors with an outlier fallback (z1 + alpha z2 does not fit one byte, NUMERICS.md 6), with macro
    blocks of 64 (two factors in one tile), or with NaN blocks.
    """
    operand = mx.operand
    if operand.fallback is not None:
        raise ValueError("a tensor with outlier fallback does not fit E4M3: convert its two terms one by one.")
    if operand.macro is not None and operand.macro.size != TILE:
        raise ValueError(f"an E4M3 tile has one scale for {TILE} elements, not {operand.macro.size} per macro block.")
    codes = as_rows(mx.scales).to(torch.int32)  # [rows, blocks]
    if (codes == E8M0_NAN).any():
        raise ValueError("a tensor with NaN blocks cannot be converted to E4M3.")
    rows, blocks = codes.shape
    values = e2m1_decode_packed(as_rows(mx.codes)).view(rows, blocks, operand.block)
    pad = -blocks % (TILE // operand.block)
    values, codes = F.pad(values, (0, 0, 0, pad)), F.pad(codes, (0, pad), value=E8M0_MIN)
    unit = (group_max(codes, TILE, operand.block) - TOP_EXPONENT).clamp_(min=E8M0_MIN)  # [rows, tiles]
    shift = codes - unit.repeat_interleave(TILE // operand.block, dim=-1)
    powers = scale_of((shift + E8M0_BIAS).clamp_(min=E8M0_MIN))
    stored = (values * powers).to(torch.float8_e4m3fn).flatten(1)
    scales = scale_of(unit).squeeze(-1)
    if mx.macro is not None and operand.macro is not None:
        scales = scales * macro_factors(operand.macro, as_rows(mx.macro))[1]
    return stored, scales
