"""Weights in the form that is sent and kept, read by kernels: nibbles, E8M0 codes, macro bytes, residuals.

    load_values   a piece as float32 in registers, for `decode`
    expand        all of it as values, for a GEMM in high precision

`unpack` makes E4M3 bytes of them, for an FP8 GEMM. Values are those of `MXTensor.dequantise`, bit for bit. Launch with
enable_fp_fusion=False: a fused multiply-add would round a sum of two terms once where the reference rounds twice.
Weights with NaN blocks are not read: a sync refuses them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.format import TILE
from mxdist.quant.kernels.device import INTERPRETED, power_of_two
from mxdist.quant.kernels.options import METHODS, UnsupportedOperandError, missing_in_packed
from mxdist.quant.kernels.terms import factors
from mxdist.quant.tensor import MXTensor

_ROWS, _WARPS = 32, 4
_DEPTH = 128
TO_ONE = tl.constexpr(2.0**126)
UNSHIFT = tl.constexpr(2.0**63)
"""What shifted values are too small by."""


@triton.jit
def _nibbles(codes, HIGH: tl.constexpr):
    """2^-126 of the E2M1 values of the low or the high nibbles of bytes, float32."""
    bits = codes.to(tl.int32)
    # The sign goes to bit 31 and, past copies of it, exponent and mantissa to bits 24..22. Right for 0.5 as well, which
    # is subnormal in E2M1 and so is 2^-127 in float32.
    bits = (bits << 24 if HIGH else bits << 28) >> 6
    return (bits & -0x7E400000).to(tl.float32, bitcast=True)


@triton.jit
def _term(
    codes, scales, row, first, code_width, scale_width, DEPTH: tl.constexpr, BLOCK: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Even and odd elements of one term, float32 [ROWS, DEPTH / BLOCK, BLOCK / 2] each."""
    rows: tl.constexpr = row.shape[0]
    n, b = first // 2 + tl.arange(0, DEPTH // 2), first // BLOCK + tl.arange(0, DEPTH // BLOCK)
    byte = tl.load(codes + row[:, None] * code_width + n[None, :], mask=(n < code_width)[None, :], other=0)
    code = tl.load(scales + row[:, None] * scale_width + b[None, :], mask=(b < scale_width)[None, :], other=0)
    byte = tl.reshape(byte, [rows, DEPTH // BLOCK, BLOCK // 2])
    even, odd = _nibbles(byte, False), _nibbles(byte, True)
    if SHIFTED:  # one multiplication for an element; a code above 191 becomes infinite
        scale = power_of_two(tl.minimum(code.to(tl.int32) + 63, 255))[:, :, None]
        return even * scale, odd * scale
    scale = power_of_two(code.to(tl.int32))[:, :, None]
    return even * TO_ONE * scale, odd * TO_ONE * scale


@triton.jit
def _macro(macro, row, first, macro_width, DEPTH: tl.constexpr, METHOD: tl.constexpr, MACRO: tl.constexpr):
    """Decode factors float32 [ROWS, DEPTH / MACRO]."""
    t = first // MACRO + tl.arange(0, DEPTH // MACRO)
    byte = tl.load(macro + row[:, None] * macro_width + t[None, :], mask=(t < macro_width)[None, :], other=0)
    _, g = factors(byte.to(tl.int32), METHOD)
    return g


@triton.jit
def load_values(
    codes, scales, macro, residual_codes, residual_scales, alpha, row, first, code_width, scale_width, macro_width,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, METHOD: tl.constexpr, MACRO: tl.constexpr, FALLBACK: tl.constexpr,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    """Even and odd elements from `first` to `first` + DEPTH of rows `row` int64 [ROWS]: float32 [ROWS, DEPTH / 2] each.

    Zeros beyond the end of a row; alpha weights the residual. SHIFTED values are 2^-63 of what they stand for, for
    block scales up to 2^64: they take fewer instructions.
    """
    rows: tl.constexpr = row.shape[0]
    even, odd = _term(codes, scales, row, first, code_width, scale_width, DEPTH, BLOCK, SHIFTED)
    if FALLBACK:
        second = _term(residual_codes, residual_scales, row, first, code_width, scale_width, DEPTH, BLOCK, SHIFTED)
        even += second[0] * alpha
        odd += second[1] * alpha
    if METHOD != 0:
        g = _macro(macro, row, first, macro_width, DEPTH, METHOD, MACRO)[:, :, None]
        even = tl.reshape(even, [rows, DEPTH // MACRO, MACRO // 2]) * g
        odd = tl.reshape(odd, [rows, DEPTH // MACRO, MACRO // 2]) * g
    return tl.reshape(even, [rows, DEPTH // 2]), tl.reshape(odd, [rows, DEPTH // 2])


@dataclass(frozen=True, slots=True)
class Source:
    """A weight [rows, K] as kernel arguments."""

    pointers: tuple[Tensor | None, ...]  # codes, scales, macro, residual codes, residual scales
    alpha: float
    widths: tuple[int, int, int]  # bytes of a row of codes, scales and macro bytes
    constants: dict[str, int]

    @classmethod
    def of(cls, weight: MXTensor) -> Source:
        """Raises `UnsupportedOperandError` for operands these kernels do not read; `missing_in_packed` says which."""
        operand = weight.operand
        missing = missing_in_packed(operand)
        if missing is not None:
            raise UnsupportedOperandError(f"the kernels do not read {missing} from packed bytes: the reference does.")
        pointers = (weight.codes, weight.scales, weight.macro, weight.residual_codes, weight.residual_scales)
        if not all(part is None or part.is_contiguous() for part in pointers):
            raise ValueError("packed weights are read from contiguous parts.")
        macro, fallback = operand.macro, operand.fallback
        constants = {
            "BLOCK": operand.block,
            "METHOD": METHODS[macro.method] if macro else 0,
            "MACRO": macro.size if macro else TILE,
            "FALLBACK": fallback is not None,
        }
        macro_width = 0 if weight.macro is None else weight.macro.shape[-1]
        widths = (weight.codes.shape[-1], weight.scales.shape[-1], macro_width)
        return cls(pointers, fallback.alpha if fallback else 0.0, widths, constants)


@triton.jit(do_not_specialize=["rows"])
def _expand_kernel(
    codes, scales, macro, residual_codes, residual_scales, alpha, values, rows, k, code_width, scale_width, macro_width,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, METHOD: tl.constexpr, MACRO: tl.constexpr,
    FALLBACK: tl.constexpr,
):  # fmt: skip
    r, first = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * DEPTH
    even, odd = load_values(
        codes, scales, macro, residual_codes, residual_scales, alpha, (r % rows).to(tl.int64), first,
        code_width, scale_width, macro_width, DEPTH, BLOCK, METHOD, MACRO, FALLBACK, False,
    )  # fmt: skip
    c = first + tl.arange(0, DEPTH)
    to = values + r.to(tl.int64)[:, None] * k + c[None, :]
    tl.store(to, tl.interleave(even, odd), mask=(r < rows)[:, None] & (c < k)[None, :])


def expand(weight: MXTensor, dtype: torch.dtype) -> Tensor:
    """Return the values [rows, K] of a packed matrix: `weight.dequantise(dtype)` in one kernel."""
    source, (rows, k) = Source.of(weight), weight.shape
    # The interpreter casts to bfloat16 by cutting bits off.
    out = torch.empty(rows, k, dtype=torch.float32 if INTERPRETED.value else dtype, device=weight.codes.device)
    if out.numel():
        _expand_kernel[(triton.cdiv(k, _DEPTH), triton.cdiv(rows, _ROWS))](
            *source.pointers, source.alpha, out, rows, k, *source.widths, ROWS=_ROWS, DEPTH=_DEPTH,
            **source.constants, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out.to(dtype)
