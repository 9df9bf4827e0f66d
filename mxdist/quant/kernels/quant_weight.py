"""Quantise a weight once and write both of its GEMM operands: W for the forward pass, W^T for dgrad.

Both hold the same bytes, so forward and backward see one function: a byte's unit is shared by a 128 x 128 square, or
by the whole weight, and either is the same for W and W^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.format import SCALE_CARRY, TILE, e8m0_from_absmax
from mxdist.quant.kernels import terms
from mxdist.quant.kernels.device import (
    SPAN,
    block_maxima,
    code_of,
    encode,
    load_patches,
    power_of_two,
    row_view,
    spread_codes,
    unit_of,
)
from mxdist.quant.kernels.forms import Form, Fp8Matrix, empty_tiles
from mxdist.quant.kernels.gemm import SQUARES, Blocks
from mxdist.quant.kernels.nonfinite import Flag
from mxdist.quant.kernels.options import UnsupportedOperandError, options_of
from mxdist.quant.recipe import Operand
from mxdist.quant.reference import NonFinite


def _whole_unit(weight: Tensor, operand: Operand) -> tuple[Tensor, Tensor]:
    """Return the code int32 [1] and the scale float32 [1] of one unit for the whole of a weight [N, K].

    A NaN or Inf anywhere in it spoils the unit, hence all values.
    """
    largest = torch.maximum(weight.amax(), -weight.amin()).float().nan_to_num(0.0).view(1)
    unit = (e8m0_from_absmax(largest, operand.scale_rule) - 6).clamp_(min=1)
    return unit, torch.ldexp(torch.ones_like(largest), unit - 127)


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A quantised weight [N, K]: `forward` is [N, K], `transposed` [K, N], with equal values.

    rights  both as right operands, where they were worked out for many weights at once
    """

    forward: Fp8Matrix
    transposed: Fp8Matrix
    rights: tuple[Blocks, Blocks] | None = None


@triton.jit
def _quantise_weight_kernel(
    w, stride, rows, columns, flag, rounded, reference, data, data_stride, scale, scale_stride,
    data_t, data_t_stride, scale_t, scale_t_stride, each, data_t_each, scale_t_each,
    SQUARE: tl.constexpr, WHOLE: tl.constexpr, FOLDED: tl.constexpr, CARRY: tl.constexpr, SATURATE: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(1) * 128, tl.program_id(0) * 128
    r, c = row + tl.arange(0, 128), column + tl.arange(0, 128)
    x = row_view(load_patches(w, stride, row, column, rows, columns, 128, 128), 128, 128)
    blocks = tl.reshape(x, [128, 1, 4, 32])
    absmax, bad = block_maxima(blocks)
    if CHECK and tl.max(tl.reshape(bad.to(tl.int32), [512])) > 0:
        tl.atomic_or(flag, 1)
    if SQUARE:
        squares = tl.max(tl.reshape(absmax, [4, 32, 4]), axis=1)
        absmax = tl.reshape(tl.broadcast_to(squares[:, None, :], [4, 32, 4]), [128, 1, 4])
    factor = 1.0
    if FOLDED:
        byte = terms.search(tl.where(bad[:, :, :, None], 0.0, blocks), absmax, terms.FOLDED, 0, CARRY, SATURATE)
        factor, g = terms.factors(byte, terms.FOLDED)
        absmax = absmax * factor[:, :, None]
    code = code_of(absmax, CARRY)
    tops = tl.max(code, axis=2)
    largest = tl.max(tl.reshape(tops, [128]))
    if SQUARE:
        tops = tops * 0 + largest
    code = spread_codes(code, absmax, tops[:, :, None])
    number = row // each  # of the weight among those that stand one below the other
    if rounded is not None:
        nonzero = absmax * 4.0 > power_of_two(code)  # beyond the tie between 0 and 0.5
        highest = tl.max(tl.reshape(tl.where(nonzero, code, 0), [512]))
        lowest = tl.min(tl.reshape(tl.where(nonzero, code, 255), [512]))
        # Three binades less beside a folded macro factor. Blocks of zeros have any code.
        if highest - lowest > (SPAN - 3 if FOLDED else SPAN):
            tl.atomic_or(rounded + number, 1)
    unit = tl.load(reference) if WHOLE else unit_of(largest)
    if FOLDED:
        unit += 1  # 1.5 * 6 * 2^5 = 288 is the largest byte
    y = encode(blocks, code, bad, factor, tops * 0 + unit, 0.0, SATURATE, FOLDED, False)
    if FOLDED:
        y = y * g[:, :, None, None]
    y = tl.reshape(y, [128, 128])
    inside = (r < rows)[:, None] & (c < tl.cdiv(columns, 128) * 128)[None, :]
    tl.store(data + r.to(tl.int64)[:, None] * data_stride + c[None, :], y.to(tl.float8e4nv), mask=inside)
    inside = (c < columns)[:, None] & (r < tl.cdiv(rows, 128) * 128)[None, :]
    # Cast once per orientation, of values the compiler takes for different (+ 0.0): from the bytes of one cast it
    # builds wrong ones for the other (Triton 3.6.0; the GPU tests compare both).
    y_t = (tl.trans(y) + 0.0).to(tl.float8e4nv)
    r = r - number * each
    to = data_t + number.to(tl.int64) * data_t_each
    tl.store(to + c.to(tl.int64)[:, None] * data_t_stride + r[None, :], y_t, mask=inside)
    if not WHOLE:
        tl.store(scale + tl.program_id(1) * scale_stride + tl.program_id(0), power_of_two(unit))
        to = scale_t + number.to(tl.int64) * scale_t_each + tl.program_id(0) * scale_t_stride
        tl.store(to + tl.program_id(1) - number * (each // 128), power_of_two(unit))


def quantise_weight(
    weight: Tensor,
    operand: Operand,
    *,
    form: Form = Form.SQUARE,
    out: Fp8Weight | None = None,
    name: str = "weight",
    nonfinite: NonFinite = "error",
) -> Fp8Weight:
    """Quantise a weight [N, K] along K; blocks 1 x 32, or 32 x 32 when `operand.square`.

    Macro factors of the method "folded" go into the bytes, form SQUARE: three mantissa bits hold 1.25 or 1.5 times an
    E2M1 value, and W^T has the same bytes. Values are then the reference's while codes span at most 11 binades.

    weight  float32 or bfloat16, last axis contiguous (otherwise copied); magnitudes up to 6 * 2^125.
    form    SQUARE: a scale per 128 x 128 square. ROW: one unit for the whole weight, written as equal row scales.

    out     where to write, of this shape and form; new matrices without.

    Values equal `reference.quantise` while the block codes of a square (or of the weight) span at most 14 binades.
    Raises `UnsupportedOperandError` for operands with other macro factors, ValueError for form TILE.
    """
    if form is Form.TILE:
        raise ValueError("tiles of W and of W^T share no scale: a weight is SQUARE or ROW.")
    n, k = weight.shape
    if out is None:
        out = Fp8Weight(empty_tiles(n, k, form, weight.device), empty_tiles(k, n, form, weight.device))
    unit = None
    if form is Form.ROW and weight.numel():
        unit, value = _whole_unit(weight.detach(), operand)
        out.forward.scale.copy_(value.expand(n, 1))
        out.transposed.scale.copy_(value.expand(k, 1))
    _launch(weight, operand, out, unit, name, nonfinite)
    return out


def quantise_weights(
    weights: Tensor, count: int, operand: Operand, name: str = "weight", nonfinite: NonFinite = "error",
    rounded: Tensor | None = None,
) -> list[Fp8Weight]:  # fmt: skip
    """`quantise_weight` of `count` equal weights that stand one below the other, [count * N, K], in one launch.

    Form SQUARE; N is a multiple of 128.

    rounded  int32 [count], contiguous: 1 is written for weights of which bytes have no room for all values, because
             the block codes of a square, but for blocks of zeros, span more binades than said there.
    """
    rows, k = weights.shape
    n = rows // count
    if rows % count or n % TILE:
        raise ValueError(f"{rows} rows are not {count} weights of whole squares.")
    forward = empty_tiles(rows, k, Form.SQUARE, weights.device)
    squares, down = n // TILE, -(-k // TILE)
    data = torch.empty(count, k, n, dtype=torch.float8_e4m3fn, device=weights.device)
    scale = torch.empty(count, down, -(-squares // 4) * 4, dtype=torch.float32, device=weights.device)
    transposed = Fp8Matrix(data, scale, Form.SQUARE, n)
    _launch(weights, operand, Fp8Weight(forward, transposed), None, name, nonfinite, n, rounded)
    by_weight = forward.data.view(count, n, -1), _with_padding(forward.scale).view(count, squares, -1), data, scale
    rights = [
        tuple(Blocks(w, [s], SQUARES) for w, s in ((w, s), (w_t, s_t)))
        for w, s, w_t, s_t in zip(*(each.transpose(1, 2).unbind() for each in by_weight), strict=True)
    ]
    parts = zip(forward.data.split(n), forward.scale.split(squares), data.unbind(), scale.unbind(), rights, strict=True)
    return [
        Fp8Weight(Fp8Matrix(w, s, Form.SQUARE, k), Fp8Matrix(w_t, s_t[:, :squares], Form.SQUARE, n), (both[0], both[1]))
        for w, s, w_t, s_t, both in parts
    ]


def _with_padding(scale: Tensor) -> Tensor:
    """Of a SQUARE's scales, all columns that they have in memory."""
    return scale.as_strided((len(scale), scale.stride(0)), (scale.stride(0), 1))


def _launch(
    weight: Tensor, operand: Operand, out: Fp8Weight, unit: Tensor | None, name: str, nonfinite: NonFinite,
    each: int | None = None, rounded: Tensor | None = None,
) -> None:  # fmt: skip
    """`each`: rows of one weight where several stand one below the other; `out.transposed` has an axis for them."""
    form = out.forward.form
    folded = operand.macro is not None and operand.macro.method == "folded" and operand.macro.size == TILE
    if operand.macro is not None and not (folded and form is Form.SQUARE and not operand.square):
        raise UnsupportedOperandError("macro factors of weights differ along N, so W^T cannot share their bytes.")
    options = options_of(Operand(scale_rule=operand.scale_rule, fallback=operand.fallback, block=operand.block))
    if not weight.numel():
        return
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    (n, k), forward, transposed = weight.shape, out.forward, out.transposed
    flag = Flag(weight.device, nonfinite)
    _quantise_weight_kernel[(triton.cdiv(k, TILE), triton.cdiv(n, TILE))](
        weight, weight.stride(0), n, k, flag.pointer, rounded, unit,
        forward.data, forward.data.stride(0), forward.scale, forward.scale.stride(0),
        transposed.data, transposed.data.stride(-2), transposed.scale, transposed.scale.stride(-2),
        each or triton.cdiv(n, TILE) * TILE, transposed.data.stride(0) if each else 0,
        transposed.scale.stride(0) if each else 0,
        SQUARE=operand.square, WHOLE=form is Form.ROW, FOLDED=folded, CARRY=SCALE_CARRY[operand.scale_rule],
        SATURATE=options.saturate, CHECK=flag.checked, num_warps=8, enable_fp_fusion=not folded,
    )  # fmt: skip
    flag.raise_if_set(weight, name)
