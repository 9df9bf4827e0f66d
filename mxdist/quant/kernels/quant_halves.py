"""Quantise few rows for `decode_halves`: to float16 in units of a power of two a row, which holds them exactly.

float16 has 11 bits and 30 binades of normal numbers, so E2M1 times any of a row's block scales fits, as does bfloat16.
Macro factors and residuals are rounded to those 11 bits; blocks more than 2^36 below a row's maximum lose bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxdist.quant.kernels import terms
from mxdist.quant.kernels.device import EXPONENT_MASK, power_of_two
from mxdist.quant.kernels.options import TermOptions, missing_in_terms
from mxdist.quant.recipe import Operand

_WIDTHS, _WARPS = (512, 2048), (4, 8)
"""Columns of a program, one row high, for few and for many of them; its warps, for short and for long rows."""
_MANY = 264
_READ = 2048
_TOP = tl.constexpr(13)
"""A row's maximum lies at 2^13 or above in its units: quantised it stays below 2^15.6."""


@triton.jit
def _row_code(x, columns, READS: tl.constexpr, READ: tl.constexpr):
    """The E8M0 code of a row's unit: its largest finite magnitude comes to [2^13, 2^14) in units."""
    c = tl.arange(0, READ)
    largest = tl.zeros([READ], tl.float32)
    for i in tl.static_range(READS):
        values = tl.abs(tl.load(x + i * READ + c, mask=i * READ + c < columns, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(values < float("inf"), values, 0.0))
    bits = tl.max(largest, 0).to(tl.int32, bitcast=True) & EXPONENT_MASK
    return tl.maximum((bits >> 23) - _TOP, 1)


@triton.jit
def _to_halves(
    x, stride, columns, alpha, values, values_stride, units,
    READS: tl.constexpr, READ: tl.constexpr, WIDTH: tl.constexpr, QUANTISE: tl.constexpr, METHOD: tl.constexpr,
    BITS: tl.constexpr, CARRY: tl.constexpr, SATURATE: tl.constexpr, FALLBACK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(1)
    source, c = x + row.to(tl.int64) * stride, tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    z = tl.load(source + c, mask=c < columns, other=0.0).to(tl.float32)
    row_code = _row_code(source, columns, READS, READ)
    if QUANTISE:
        blocks = tl.reshape(z, [1, WIDTH // 128, 4, 32])
        left, y, _, unit, _, g, bad, _ = terms.first_term(blocks, 0.0, METHOD, BITS, CARRY, SATURATE, False)
        z = y * power_of_two(unit)[:, :, None, None]
        if FALLBACK:
            y_2, _, unit_2 = terms.second_term(left, unit, 0.0, CARRY, SATURATE, False)
            z += y_2 * power_of_two(unit_2)[:, :, None, None] * alpha
        if METHOD != terms.NO_FACTOR:
            z = z * g[:, :, None, None]
        z = tl.reshape(tl.where(bad[:, :, :, None], float("nan"), z), [WIDTH])
    z = z * power_of_two(254 - row_code)
    # Of eight: 0, 2, 4, 6, 1, 3, 5, 7, as words of packed weights fall apart.
    to = (c & -8) | ((c & 1) << 2) | ((c >> 1) & 3)
    tl.store(values + row.to(tl.int64) * values_stride + to, z.to(tl.float16), mask=to < values_stride)
    if tl.program_id(0) == 0:
        tl.store(units + row, power_of_two(row_code))


def takes(operand: Operand) -> bool:
    """True when `quantise_halves` can quantise with this operand."""
    flags = operand.fallback is not None and operand.fallback.fraction is not None
    return missing_in_terms(operand) is None and operand.rounding == "nearest" and not flags


def quantise_halves(x: Tensor, operand: Operand | None, width: int, early: bool = False) -> tuple[Tensor, Tensor]:
    """Return (values float16 [rows, width], units float32 [rows]) of x [rows, K], quantised unless operand is None.

    Elements are of their row's unit; every eight stand in the order 0, 2, 4, 6, 1, 3, 5, 7; zeros from K on. NaN and
    Inf make their block NaN. `takes` says which operands; width is a multiple of 128, at least K. An early kernel
    starts before the one ahead of it ends, waits for it, and lets the next one do the same.
    """
    rows, k = x.shape
    options = TermOptions.of(operand or Operand())
    values = torch.empty(rows, width, dtype=torch.float16, device=x.device)
    units = torch.empty(rows, dtype=torch.float32, device=x.device)
    columns = _WIDTHS[rows * triton.cdiv(width, _WIDTHS[0]) > _MANY]  # every program looks at all of its row
    _to_halves[(triton.cdiv(width, columns), rows)](
        x, x.stride(0), k, options.alpha, values, width, units,
        READS=triton.cdiv(k, _READ), READ=_READ, WIDTH=columns, QUANTISE=operand is not None, METHOD=options.method,
        BITS=options.bits, CARRY=options.carry, SATURATE=options.saturate, FALLBACK=options.fallback,
        EARLY=early, num_warps=_WARPS[k > 2 * _READ], enable_fp_fusion=False, launch_pdl=early,
    )  # fmt: skip
    return values, units
