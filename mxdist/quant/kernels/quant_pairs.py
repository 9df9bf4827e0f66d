"""`quant_both` for bfloat16, two elements to an instruction.

A 32-bit word holds two neighbours of a row. Block maxima, scaling and rounding to the E2M1 grid work on words, in
bfloat16, which is exact: scales are powers of two, and adding 96 times an element's own power of two leaves one
mantissa bit of it. Only the cast to E4M3 takes elements apart. An element costs 17 instructions in place of 28, and a
program half the registers (sm_90a, both orientations).

These are PTX's packed instructions, which Triton's interpreter does not know: it runs `quant_both`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, bfloat16

from mxdist.quant.kernels.device import SPAN, TOP, power_of_two
from mxdist.quant.kernels.forms import Form, Fp8Matrix
from mxdist.quant.kernels.nonfinite import Flag
from mxdist.quant.kernels.options import Options

PARTS, WARPS = 1, 8
"""Loads for a block along rows, whose words lie in 4 threads or fewer; and warps."""

_ONES: tl.constexpr = tl.constexpr(0x00800080)
"""Times an exponent: a word of two powers of two."""
_NAN: tl.constexpr = tl.constexpr(0x7FC0)

# Words $x of elements, $p of what scales them to the unit, $s of the block's scale in units, to words y on the grid.
_ROUND = """
    mul.rn.bf16x2 y, {x}, {p};
    and.b32 w, y, 0x7F807F80;
    max.bf16x2 w, w, {s};
    fma.rn.bf16x2 y, w, up, y;
    fma.rn.bf16x2 y, w, down, y;
    shl.b32 {low}, y, 16;
    mov.b32 {high}, y;
"""
# As a float32 the upper half still has the lower one as its last bits: too few for the cast to E4M3 to round otherwise.
_BEGIN = """{
    .reg .b32 y, w, up, down, a<4>, b<4>;
    .reg .b16 g, h;
    mov.b32 up, 0x42C042C0;
    mov.b32 down, 0xC2C0C2C0;
"""


def _asm_along_rows() -> str:
    """Two words beside each other to four bytes."""
    first = _ROUND.format(x="$1", p="$3", s="$5", low="a0", high="b0")
    second = _ROUND.format(x="$2", p="$4", s="$6", low="a1", high="b1")
    cast = "cvt.rn.satfinite.e4m3x2.f32 g, b0, a0; cvt.rn.satfinite.e4m3x2.f32 h, b1, a1; mov.b32 $0, {g, h}; }"
    return _BEGIN + first + second + cast


def _asm_along_columns() -> str:
    """Four words below each other to four bytes of the left column and four of the right one."""
    rounds = "".join(_ROUND.format(x=f"${2 + i}", p="$6", s="$7", low=f"a{i}", high=f"b{i}") for i in range(4))
    casts = "".join(
        f"cvt.rn.satfinite.e4m3x2.f32 g, {c}1, {c}0; cvt.rn.satfinite.e4m3x2.f32 h, {c}3, {c}2; mov.b32 ${i}, {{g, h}};"
        for i, c in enumerate("ab")
    )
    return _BEGIN + rounds + casts + "}"


_ALONG_ROWS: tl.constexpr = tl.constexpr(_asm_along_rows())
_ALONG_COLUMNS: tl.constexpr = tl.constexpr(_asm_along_columns())


@triton.jit
def _larger(a, b):
    """Of words: the larger magnitudes, with signs that mean nothing; NaN where one is."""
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _code(bits, CARRY: tl.constexpr):
    """E8M0 code of a block with this maximum, and whether it is finite. bits are a float32's."""
    good = bits < 0x7F800000
    code = ((tl.where(good, bits, 0) + CARRY) >> 23) - 2
    return tl.minimum(tl.maximum(code, 1), 252), good


@triton.jit
def _found(r, rows, map):
    """Where rows r < `rows` of a matrix lie, int64, and whether they do: with a map where it says, -1 for nowhere."""
    if map is not None:
        r = tl.load(map + r)
        return r.to(tl.int64), r >= 0
    return r.to(tl.int64), r < rows


@triton.jit
def rows_of_pairs(
    x, stride, from_row, rows, map, word, words, flag, row, data_rows, data, data_stride, scale, scale_stride,
    PARTS: tl.constexpr, CARRY: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Quantise 128 x 64 words of x, at (from_row, word), along rows; returns the largest unit.

    Bytes and scales go to `row` and further of `data_rows` rows. Without a map rows from `rows` on are zeros.
    """
    n: tl.constexpr = 16 // PARTS
    place, there = _found(from_row + tl.arange(0, 128), rows, map)
    there = there[:, None, None]
    w = word + 16 * tl.arange(0, 4)[None, :, None] + tl.arange(0, n)[None, None, :]
    first = x + place[:, None, None] * stride + w
    xs = ()
    for i in tl.static_range(PARTS):
        xs += (tl.load(first + i * n, mask=there & (w + i * n < words), other=0),)
    largest = tl.reduce(xs[0], 2, _larger)
    for i in tl.static_range(1, PARTS):
        largest = _larger(largest, tl.reduce(xs[i], 2, _larger))
    code, good = _code(tl.maximum((largest & 0x7FFF) << 16, largest & 0x7FFF0000), CARRY)
    if CHECK and tl.min(tl.min(good.to(tl.int32), 1), 0) == 0:
        tl.atomic_or(flag, 1)
    top = tl.max(code, 1)
    unit = tl.maximum(top - TOP, 1)
    step = (tl.maximum(code, top[:, None] - SPAN) - unit[:, None] + 127) * _ONES
    per_unit = tl.where(good, (254 - unit)[:, None] * _ONES, _NAN * 0x10001)
    r = row + tl.arange(0, 128)
    kept = (r < data_rows)[:, None, None]
    to = data + r.to(tl.int64)[:, None, None] * data_stride + w
    for i in tl.static_range(PARTS):
        p, s = tl.broadcast_to(per_unit[:, :, None], xs[i].shape), tl.broadcast_to(step[:, :, None], xs[i].shape)
        y = tl.inline_asm_elementwise(
            _ALONG_ROWS, "=r,r,r,r,r,r,r", [xs[i], p, s], dtype=tl.int16, is_pure=True, pack=2
        )  # fmt: skip
        tl.store(to + i * n, y, mask=kept)
    tl.store(scale + (word // 64).to(tl.int64) * scale_stride + r, power_of_two(unit), mask=r < data_rows)
    return tl.max(unit)


@triton.jit
def _column(bits, unit, GIVEN: tl.constexpr, CARRY: tl.constexpr):
    """Of columns with these maxima [4, 64]: half words of what scales to the unit and of the scale; and the unit."""
    code, good = _code(bits, CARRY)
    top = tl.max(code, 0)
    own = unit + 0 * top if GIVEN else tl.maximum(top - TOP, 1)
    step = tl.maximum(tl.maximum(code, top[None, :] - SPAN) - own[None, :] + 127, 1) << 7
    return tl.where(good, (254 - own)[None, :] << 7, _NAN), step, own


@triton.jit
def columns_of_pairs(
    x, stride, from_row, rows, map, word, words, row, data, data_stride, scale, scale_stride, unit,
    SQUARES: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """Quantise them along columns, whose bytes and scales are stored transposed; see `runs`."""
    r, c = from_row + 32 * tl.arange(0, 4), word + tl.arange(0, 64)
    inside = (c < words)[None, :]
    xs = ()
    first = x + r.to(tl.int64)[:, None] * stride + c[None, :]
    for i in tl.static_range(32):
        place, there = _found(r + i, rows, map)
        at = first + i * stride if map is None else x + place[:, None] * stride + c[None, :]
        xs += (tl.load(at, mask=there[:, None] & inside, other=0),)
    largest = xs[0]
    for i in tl.static_range(1, 32):
        largest = _larger(largest, xs[i])
    p_left, s_left, unit_left = _column((largest & 0x7FFF) << 16, unit, SQUARES, CARRY)
    p_right, s_right, unit_right = _column(largest & 0x7FFF0000, unit, SQUARES, CARRY)
    p, s = p_left | (p_right << 16), s_left | (s_right << 16)
    left = ()
    right = ()
    for i in tl.static_range(8):
        a, b = tl.inline_asm_elementwise(
            _ALONG_COLUMNS, "=r,=r,r,r,r,r,r,r", [xs[4 * i], xs[4 * i + 1], xs[4 * i + 2], xs[4 * i + 3], p, s],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        left += (a,)
        right += (b,)
    y = tl.join(_join(left), _join(right))  # [blocks, words, 4 bytes each, columns of a word]
    y = tl.reshape(tl.permute(y, [1, 3, 0, 2]), [128, 32])
    column, byte = 2 * word + tl.arange(0, 128), row // 4 + tl.arange(0, 32)
    to = data + column.to(tl.int64)[:, None] * data_stride + byte[None, :]
    tl.store(to, y, mask=(column < 2 * words)[:, None])
    if SQUARES:
        tl.store(scale + (word // 64).to(tl.int64) * scale_stride + row // 128, power_of_two(unit))
    else:
        units = tl.reshape(tl.join(unit_left, unit_right), [128])
        to = scale + (row // 128).to(tl.int64) * scale_stride + column
        tl.store(to, power_of_two(units), mask=column < 2 * words)


@triton.jit
def _join(xs):
    """Eight tensors [4, 64] as one [4, 64, 8]."""
    even = tl.join(tl.join(xs[0], xs[4]), tl.join(xs[2], xs[6]))
    odd = tl.join(tl.join(xs[1], xs[5]), tl.join(xs[3], xs[7]))
    return tl.reshape(tl.join(even, odd), [4, 64, 8])


@triton.jit(do_not_specialize=["rows"])
def _quantise_pairs_kernel(
    x, stride, rows, words, flag, data, data_stride, scale, scale_stride, data_t, data_t_stride,
    scale_t, scale_t_stride,
    PARTS: tl.constexpr, SQUARES: tl.constexpr, CHECK: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    # Strides are of words, half words and words. Views of other dtypes would take the host as long as the launch.
    x_words, data_t_words = x.to(tl.pointer_type(tl.int32)), data_t.to(tl.pointer_type(tl.int32))
    data_halves = data.to(tl.pointer_type(tl.int16))
    row, word = tl.program_id(1) * 128, tl.program_id(0) * 64
    unit = rows_of_pairs(
        x_words, stride, row, rows, None, word, words, flag, row, rows, data_halves, data_stride, scale, scale_stride,
        PARTS, CARRY, CHECK,
    )  # fmt: skip
    columns_of_pairs(
        x_words, stride, row, rows, None, word, words, row, data_t_words, data_t_stride, scale_t, scale_t_stride, unit,
        SQUARES, CARRY,
    )  # fmt: skip


def pairs_fit(x: Tensor, row: Options, column: Options) -> bool:
    """True when this kernel does both operands of x: bfloat16 in whole words, rounded to nearest, nothing else."""
    for o in (row, column):
        if o.stochastic or o.saturate or o.macro_bits or o.hadamard:
            return False
    words = x.dtype == bfloat16 and x.is_cuda and not (x.shape[1] % 2 or x.stride(0) % 2 or x.data_ptr() % 4)
    return words and row.carry == column.carry


def launch_pairs(x: Tensor, by_row: Fp8Matrix, by_column: Fp8Matrix, options: Options, flag: Flag) -> None:
    """Quantise x [rows, K] into `by_row`, form TILE, and `by_column`, form TILE or SQUARE."""
    squares = by_column.form is Form.SQUARE
    rows, k = x.shape
    if not rows:
        return  # a grid of nothing is no launch
    _quantise_pairs_kernel[(-(-k // 128), -(-rows // 128))](
        x, x.stride(0) // 2, rows, k // 2, flag.pointer,
        by_row.data, by_row.data.stride(0) // 2, by_row.scale, by_row.scale.stride(1),
        by_column.data, by_column.data.stride(0) // 4, by_column.scale,
        by_column.scale.stride(0 if squares else 1),
        PARTS=PARTS, SQUARES=squares, CHECK=flag.checked, CARRY=options.carry, num_warps=WARPS,
    )  # fmt: skip
