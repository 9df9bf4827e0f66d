"""Products of few rows with packed weights, for decoding: weights are read once, as nibbles, and expanded in registers.

    y = Q(x) W^T    x [M, K], W packed; float32 accumulation, rounded once

With few rows a product takes as long as reading W, so a quarter of the bytes counts and arithmetic on x does not.
`decode_tiles` multiplies 16-bit x that it quantises with weights of one term in FP8; `decode_halves` very few rows with
few outputs, those that come quantised, experts, and weights of two terms, in blocks of 32; the kernel here does all
else, float32 x and blocks of 16, and rounds weights to x's dtype first. All add partial sums in a fixed order: the same
x gives the same y.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.format import TILE
from mxdist.quant.kernels import decode_halves, quant_terms
from mxdist.quant.kernels.decode_tiles import multiply_tiles, tile_shape_of
from mxdist.quant.kernels.device import INTERPRETED
from mxdist.quant.kernels.groups import Groups, tile_height
from mxdist.quant.kernels.options import runs_in_tiles
from mxdist.quant.kernels.packed import UNSHIFT, Source, load_values
from mxdist.quant.kernels.plan import device_lacks
from mxdist.quant.kernels.quant_halves import takes
from mxdist.quant.recipe import Operand
from mxdist.quant.tensor import MXTensor

__all__ = ["Groups", "multiply", "multiply_experts", "quantises"]

WIDTH, DEPTH = 64, 128
"""Outputs of a program, and elements along K that it takes at a time."""
WARPS, STAGES = 4, 4
PROGRAMS_PER_MULTIPROCESSOR = 3
HALVES_ROWS = 8
"""Rows up to which `decode_halves` is faster than `decode_tiles` for few outputs, where both can."""


@triton.jit
def _rounded(values, like):
    """Values rounded to like's dtype, as float32: the interpreter cuts bits off instead."""
    if like.dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return bits.to(tl.float32, bitcast=True)
    return values


@triton.jit
def _add_product(x, w, total):
    """total [BM, BN] + x [BM, n] w [BN, n]^T, w float32 rounded to x's dtype first."""
    if INTERPRETED:
        return total + tl.dot(x.to(tl.float32), tl.trans(_rounded(w, x)), input_precision="ieee")
    return tl.dot(x, tl.trans(w.to(x.dtype)), total, input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])
def _decode_values_kernel(
    x, x_stride, table, codes, scales, macro, residual_codes, residual_scales, alpha, out, rows, outputs, k,
    code_width, scale_width, macro_width,
    LENGTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
    METHOD: tl.constexpr, MACRO: tl.constexpr, FALLBACK: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(1), tl.program_id(2)
    expert, start, stop = 0, tile * BM, rows
    if table is not None:
        expert, start, stop = tl.load(table + 3 * tile), tl.load(table + 3 * tile + 1), tl.load(table + 3 * tile + 2)
        if start >= stop:
            return
    column, r = tl.program_id(0) * BN + tl.arange(0, BN), start + tl.arange(0, BM)
    weight_row = (expert * outputs + column % outputs).to(tl.int64)  # beyond the end, any will do
    inside, left = (r < stop)[:, None], x + r.to(tl.int64)[:, None] * x_stride
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(0, LENGTH, DEPTH):  # past the end of a row all are zeros
        first = part * LENGTH + step
        even, odd = load_values(
            codes, scales, macro, residual_codes, residual_scales, alpha, weight_row, first,
            code_width, scale_width, macro_width, DEPTH, BLOCK, METHOD, MACRO, FALLBACK, True,
        )  # fmt: skip
        c = first + tl.arange(0, DEPTH)
        pairs = tl.load(left + c[None, :], mask=inside & (c < k)[None, :], other=0.0)
        x_even, x_odd = tl.split(tl.reshape(pairs, [BM, DEPTH // 2, 2]))
        total = _add_product(x_odd, odd, _add_product(x_even, even, total))
    to = out + (part * rows + r).to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(to, (total * UNSHIFT).to(out.dtype.element_ty), mask=inside & (column < outputs)[None, :])


def multiply(x: Tensor, weight: MXTensor, bias: Tensor | None = None, operand: Operand | None = None) -> Tensor:
    """Return Q(x) W^T + bias [M, N] of x's dtype, rounded once, for x [M, K] and W packed [N, K].

    operand  how x is quantised first, see `quantises`; None multiplies x as it is. NaN and Inf propagate.

    Raises `UnsupportedOperandError` for weights that `options.missing_in_packed` names.
    """
    return _launch(x, weight, weight.shape[0], None, bias, operand)


def multiply_experts(x: Tensor, weight: MXTensor, groups: Groups, operand: Operand | None = None) -> Tensor:
    """Return [rows, N]: x [rows, K], grouped by expert, group e times W_e^T; otherwise as `multiply`.

    weight  packed [experts * N, K], expert after expert; those without rows are not read.
    """
    return _launch(x, weight, weight.shape[0] // groups.experts, groups, None, operand)


def quantises(operand: Operand) -> bool:
    """True when products can be given x before it is quantised."""
    return takes(operand)


def _launch(
    x: Tensor, weight: MXTensor, outputs: int, groups: Groups | None, bias: Tensor | None, operand: Operand | None
) -> Tensor:
    source, (rows, k), device = Source.of(weight), x.shape, x.device
    if k != weight.shape[1]:
        raise ValueError(f"x [{rows}, {k}] and a weight {list(weight.shape)} share no contraction axis.")
    if not rows or not k or not outputs:
        return torch.zeros(rows, outputs, dtype=x.dtype, device=device)
    if x.stride(1) != 1:
        x = x.contiguous()
    if groups is None and operand is not None and _in_tiles(x, weight, operand):
        cut = tile_shape_of(rows, outputs, k // TILE, _multiprocessors(device))
        return multiply_tiles(x, weight, bias, operand, cut)
    height = groups.height if groups else tile_height(rows)
    table, tiles = (groups.table, len(groups.table)) if groups else (None, triton.cdiv(rows, height))
    if x.dtype in (torch.bfloat16, torch.float16) and source.constants["BLOCK"] == decode_halves.BLOCK:
        residual = source.constants["FALLBACK"]
        shape = decode_halves.shape_of(height, outputs, k, tiles, _multiprocessors(device), residual)
        return decode_halves.multiply_halves(x, source, outputs, height, table, bias, operand, shape)
    if operand is not None:
        x = quant_terms.fake_quantise(x, operand, nonfinite="propagate", dtype=x.dtype)
    height, columns = max(height, 16), triton.cdiv(outputs, WIDTH)
    parts, length = _split(k, columns * tiles, _multiprocessors(device))
    # The interpreter casts to bfloat16 by cutting bits off.
    wide = parts > 1 or bias is not None or INTERPRETED.value
    out = torch.empty(parts, rows, outputs, dtype=torch.float32 if wide else x.dtype, device=device)
    _decode_values_kernel[(columns, tiles, parts)](
        x, x.stride(0), table, *source.pointers, source.alpha, out, rows, outputs, k, *source.widths,
        LENGTH=length, BM=height, BN=WIDTH, DEPTH=DEPTH, **source.constants, num_warps=WARPS, num_stages=STAGES,
        enable_fp_fusion=False,
    )  # fmt: skip
    total = out[0] if parts == 1 else out.sum(0)
    return (total if bias is None else total + bias).to(x.dtype)


def _in_tiles(x: Tensor, weight: MXTensor, operand: Operand) -> bool:
    """True where FP8 tensor cores are there and faster: not for few rows and outputs, which they leave half idle."""
    (rows, k), device = x.shape, x.device
    if x.dtype not in (torch.bfloat16, torch.float16) or not runs_in_tiles(weight.operand, k, operand):
        return False
    narrow = decode_halves.is_narrow(tile_height(rows), weight.shape[0], k, 1, _multiprocessors(device))
    return device_lacks(device) is None and not (narrow and rows <= HALVES_ROWS)


def _split(k: int, tiles: int, multiprocessors: int) -> tuple[int, int]:
    """Parts of the contraction, and elements of one: enough parts that `tiles` output tiles fill the GPU."""
    steps = triton.cdiv(k, DEPTH)
    parts = min(steps, max(1, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // tiles))
    length = triton.cdiv(steps, parts)
    return triton.cdiv(steps, length), length * DEPTH


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
