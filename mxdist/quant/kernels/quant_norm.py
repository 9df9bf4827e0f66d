"""RMSNorm and the quantiser of what it feeds, in one kernel: the normalised rows never exist in bfloat16.

They are computed in float32 and quantised without being rounded. A row is read twice, the second time from the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.kernels.forms import Form, Fp8Matrix, empty_tiles
from mxdist.quant.kernels.nonfinite import Flag
from mxdist.quant.kernels.options import Random, UnsupportedOperandError, options_of
from mxdist.quant.kernels.piece import quantise_piece
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Operand
from mxdist.quant.reference import NonFinite

SHAPE = (8, 512, 4)
"""Rows of a program, columns at a time, and warps."""


@triton.jit(do_not_specialize=["rows"])
def _quantise_norm_kernel(
    x, stride, weight, epsilon, rows, columns, flag, data, data_stride, scale, scale_stride, inverse,
    seed, stream, draw_row, first_call, calls_per_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, CARRY: tl.constexpr, SATURATE: tl.constexpr, MACRO_BITS: tl.constexpr,
    RANDOM: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    r, c = row + tl.arange(0, ROWS), tl.arange(0, COLS)
    source = x + r.to(tl.int64)[:, None] * stride + c[None, :]
    squares = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, columns, COLS):
        inside = (r < rows)[:, None] & (first + c < columns)[None, :]
        values = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
        squares += values * values
    rsqrt = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), tl.sqrt_rn(tl.sum(squares, 1) / columns + epsilon))
    tl.store(inverse + r, rsqrt, mask=r < rows)
    for first in range(0, columns, COLS):
        inside = (r < rows)[:, None] & (first + c < columns)[None, :]
        values = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(weight + first + c, mask=first + c < columns, other=0.0).to(tl.float32)
        quantise_piece(
            values * rsqrt[:, None] * gain[None, :], row, first, data, data_stride, scale, scale_stride, flag,
            rows, tl.cdiv(columns, 128) * 128, seed, stream, draw_row, first_call, calls_per_row,
            ROWS, COLS, CARRY, SATURATE, MACRO_BITS, RANDOM, CHECK,
        )  # fmt: skip


def quantise_norm(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    operand: Operand,
    *,
    draw: Draw | int | None = None,
    name: str = "tensor",
    nonfinite: NonFinite = "error",
) -> tuple[Fp8Matrix, Tensor]:
    """Return (Q(x / rms(x) * weight) form TILE [rows, K], 1 / rms(x) float32 [rows]), rms with `epsilon` added.

    x          float32 or bfloat16 [rows, K], last axis contiguous (otherwise copied).
    weight     [K]; a layer's noise may lie on it.
    nonfinite  as for `quant_tiles.quantise_tiles`; an error names where x, not its norm, is not finite.
    """
    options = options_of(operand)
    if options.hadamard:
        raise UnsupportedOperandError("the kernels rotate only operands of wgrad: the reference backend does others.")
    rows, k = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = empty_tiles(rows, k, Form.TILE, x.device)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    if x.numel():
        flag, random = Flag(x.device, nonfinite), Random.of(draw, k, options.stochastic)
        height, width, warps = SHAPE
        _quantise_norm_kernel[(triton.cdiv(rows, height),)](
            x, x.stride(0), weight, epsilon, rows, k, flag.pointer, out.data, out.data.stride(0),
            out.scale, out.scale.stride(1), inverse,
            random.seed, random.stream, random.row, random.first_call, random.calls_per_row,
            ROWS=height, COLS=width, CARRY=options.carry, SATURATE=options.saturate, MACRO_BITS=options.macro_bits,
            RANDOM=options.stochastic, CHECK=flag.checked, num_warps=warps,
        )  # fmt: skip
        flag.raise_if_set(x, name)
    return out, inverse
