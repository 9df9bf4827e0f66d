"""GEMMs on packed MXFP4 with tl.dot_scaled: FP4 tensor cores on Blackwell, emulated in bfloat16 by Triton elsewhere.

    MXFP4   an E8M0 scale per 32                                                     tcgen05 kind mxf4
    NVFP4   an E4M3 scale per 16, each written twice, and a float32 factor per row   tcgen05 kind mxf4nvf4

The second holds macro factors of the method "folded": a decode factor of {1, 1.25, 1.5} times a power of two is an
E4M3 number. It compiles for Blackwell only (Triton 3.6). No Blackwell GPU has run this yet: compiled for sm_100a and
interpreted, both in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.format import E8M0_NAN, TILE, e8m0_decode
from mxdist.quant.kernels.device import INTERPRETED, power_of_two
from mxdist.quant.kernels.terms import e2m1_values
from mxdist.quant.layout import per_block
from mxdist.quant.scaling import FOLDED_DECODE
from mxdist.quant.tensor import MXTensor

BLOCK = (128, 128, 128)
WARPS, STAGES = 8, 3
TOP_EXPONENT = 8
"""1.5 * 2^8 = 384 is the largest folded scale that E4M3 (at most 448) holds."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """The operand of `matmul`, [rows, K].

    codes   uint8 [rows, K / 2], low nibble first
    scales  uint8 E8M0 [rows, K / 32], or float8_e4m3fn [rows, K / 16]
    factor  float32 [rows], or None for ones
    """

    codes: Tensor
    scales: Tensor
    factor: Tensor | None


def operand_of(mx: MXTensor) -> PackedMatrix:
    """Return a quantised matrix [rows, K], K a multiple of 128, as an operand: NVFP4 with folded macro factors.

    ValueError for what neither form holds: fallback, other macro factors and macro blocks, NaN blocks. Folded scales
    are exact while a row's codes span at most 15 binades; beyond, to about 2^-17 of the row's largest.
    """
    operand = mx.operand
    if len(mx.shape) != 2 or mx.shape[1] % TILE or operand.block != 32:
        raise ValueError(f"FP4 GEMMs take matrices with K in multiples of {TILE} and blocks of 32, not {mx.shape}.")
    if operand.fallback is not None or (
        operand.macro and (operand.macro.method, operand.macro.size) != ("folded", TILE)
    ):
        raise ValueError("one FP4 operand holds neither a fallback nor macro factors other than folded ones per 128.")
    if (mx.scales == E8M0_NAN).any():
        raise ValueError("a tensor with NaN blocks is no FP4 operand.")
    if mx.macro is None:
        return PackedMatrix(mx.codes, mx.scales, None)
    top = mx.scales.amax(1, keepdim=True).int()
    shifted = torch.ldexp(torch.ones_like(mx.scales, dtype=torch.float32), mx.scales.int() - top + TOP_EXPONENT)
    decode = torch.tensor(FOLDED_DECODE, device=mx.macro.device)[mx.macro.long()]
    scales = shifted * per_block(decode, TILE, 32, mx.scales.shape[1])
    factor = e8m0_decode(top.squeeze(1)) * 2.0**-TOP_EXPONENT
    return PackedMatrix(mx.codes, scales.to(torch.float8_e4m3fn).repeat_interleave(2, 1), factor)


@triton.jit
def _values(packed, scale, GROUP: tl.constexpr):
    """What packed codes [ROWS, K / 2] and their scales [ROWS, K / GROUP] stand for, float32 [ROWS, K]."""
    rows: tl.constexpr = packed.shape[0]
    codes = tl.reshape(tl.join(packed & 15, packed >> 4), [rows, 2 * packed.shape[1]]).to(tl.int32)
    value = e2m1_values(codes)
    factor = power_of_two(scale.to(tl.int32)) if scale.dtype == tl.uint8 else scale.to(tl.float32)
    groups = tl.reshape(value, [rows, scale.shape[1], GROUP]) * factor[:, :, None]
    return tl.reshape(groups, [rows, 2 * packed.shape[1]])


@triton.jit(do_not_specialize=["m"])
def _dot_scaled_kernel(
    a, a_scale, a_factor, b, b_scale, b_factor, c, m, n, k,
    GROUP: tl.constexpr, FACTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    packed, groups = tl.arange(0, BK // 2), tl.arange(0, BK // GROUP)
    row, column = (rows % m).to(tl.int64)[:, None], (columns % n).to(tl.int64)[:, None]  # beyond the end, any will do
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, k, BK):
        left = tl.load(a + row * (k // 2) + (first // 2 + packed)[None, :])
        right = tl.load(b + column * (k // 2) + (first // 2 + packed)[None, :])
        left_scale = tl.load(a_scale + row * (k // GROUP) + (first // GROUP + groups)[None, :])
        right_scale = tl.load(b_scale + column * (k // GROUP) + (first // GROUP + groups)[None, :])
        if INTERPRETED:
            total += tl.dot(_values(left, left_scale, GROUP), tl.trans(_values(right, right_scale, GROUP)))
        else:
            total = tl.dot_scaled(left, left_scale, "e2m1", tl.trans(right), right_scale, "e2m1", acc=total)
    if FACTORS:
        total = total * tl.load(a_factor + rows % m)[:, None] * tl.load(b_factor + columns % n)[None, :]
    at = c + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(at, total.to(c.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


def matmul(a: PackedMatrix, b: PackedMatrix, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a b^T [a.rows, b.rows] of `dtype`; both operands of one form, ValueError otherwise."""
    if a.codes.shape[1] != b.codes.shape[1] or a.scales.dtype != b.scales.dtype:
        raise ValueError("FP4 operands of different K or of different forms do not multiply.")
    m, n, k = a.codes.shape[0], b.codes.shape[0], 2 * a.codes.shape[1]
    out = torch.zeros(m, n, dtype=dtype, device=a.codes.device)
    if out.numel() and k:
        height, width, depth = BLOCK
        _dot_scaled_kernel[(triton.cdiv(m, height), triton.cdiv(n, width))](
            a.codes, a.scales, a.factor, b.codes, b.scales, b.factor, out, m, n, k,
            GROUP=32 if a.factor is None else 16, FACTORS=a.factor is not None, BM=height, BN=width, BK=depth,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out
