"""Building blocks of the quantiser kernels: block scales, rounding to the E2M1 grid, random bits, Hadamard.

A piece of a matrix is float32 [ROWS, COLS], COLS a multiple of 128 along the contraction axis; seen as blocks it is
[ROWS, TILES, 4, 32]. Codes are E8M0 codes as int32. Inputs are loaded as float32 before anything else: the
interpreter that runs these kernels on a CPU computes wrongly in bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXPONENT_MASK = tl.constexpr(0x7F800000)
MAGIC = tl.constexpr(1.5 * 2.0**22)
SPAN = tl.constexpr(14)
MACRO_LIMIT = tl.constexpr(2.0**126)
"""Tiles whose maximum reaches this keep f = 1, so that f x stays finite (scaling.MACRO_LIMIT)."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""True in Triton's interpreter, which walks through a reduction's own function element by element, hence slowly."""
TOP = tl.constexpr(6)
"""The E4M3 unit lies this many binades below the group's largest code: 6 * 2^6 = 384 <= 448."""


@triton.jit
def power_of_two(code):
    """2^(code - 127) for codes 1..254."""
    return (code << 23).to(tl.float32, bitcast=True)


@triton.jit
def code_of(absmax, CARRY: tl.constexpr):
    """E8M0 codes of block maxima >= 0, finite (format.e8m0_from_absmax)."""
    code = ((absmax.to(tl.int32, bitcast=True) + CARRY) >> 23) - 2
    return tl.minimum(tl.maximum(code, 1), 252)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_or_nan(magnitudes, AXIS: tl.constexpr):
    """The largest of magnitudes >= 0 along an axis, not finite when one of them is not."""
    if INTERPRETED:
        return tl.max(tl.where(magnitudes == magnitudes, magnitudes, float("inf")), AXIS)
    return tl.reduce(magnitudes, AXIS, _larger_or_nan)


@triton.jit
def block_maxima(blocks):
    """Largest magnitude of blocks [ROWS, TILES, 4, 32] and whether one is NaN or Inf; the maximum is then 0."""
    absmax = largest_or_nan(tl.abs(blocks), 3)
    good = absmax < float("inf")
    return tl.where(good, absmax, 0.0), good == 0


@triton.jit
def static_factor(tile_max, BITS: tl.constexpr):
    """Macro byte and encode factor f in [1, 2) of tiles with this maximum (scaling.static_macro)."""
    ratio = tl.div_rn(tl.full(tile_max.shape, 6.0, tl.float32), tl.maximum(tile_max, 1e-12))
    byte = (ratio.to(tl.int32, bitcast=True) >> 15) & (0x100 - (1 << (8 - BITS)))
    byte = tl.where(tile_max >= MACRO_LIMIT, 0, byte)
    return byte, 1.0 + byte.to(tl.float32) * 0.00390625


@triton.jit
def spread_codes(code, absmax, top):
    """Raise codes to their tile's largest minus 14; blocks of zeros take the largest (scaling.codes_from_maxima)."""
    return tl.where(absmax == 0.0, top, tl.maximum(code, top - SPAN))


@triton.jit
def round_nearest(y, scale, SATURATE: tl.constexpr):
    """Round to E2M1 times `scale`, ties to even, without dividing: rounding.round_fast. Zero comes out as +0."""
    power = (y.to(tl.int32, bitcast=True) & EXPONENT_MASK).to(tl.float32, bitcast=True)
    magic = tl.maximum(power, scale) * MAGIC
    rounded = (y + magic) - magic
    if SATURATE:
        rounded = tl.minimum(tl.maximum(rounded, -6.0 * scale), 6.0 * scale)
    return rounded


@triton.jit
def round_random(y, scale, noise):
    """Round to one of the two neighbours in E2M1 times `scale` (rounding.round_stochastic); noise in (0, 1)."""
    power = (y.to(tl.int32, bitcast=True) & EXPONENT_MASK).to(tl.float32, bitcast=True)
    power = tl.maximum(power, scale)
    per_step = (0x7F800000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)  # 2 / power
    steps = tl.floor(tl.abs(y) * per_step + noise)
    sign = y.to(tl.int32, bitcast=True) & -0x80000000
    step = ((power * 0.5).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return steps * step + 0.0  # -0 + 0 is +0


@triton.jit
def philox_words(seed, counter, stream, purpose):
    """The four uint32 words of philox.philox for int64 counters."""
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, (high * 0 + stream).to(tl.uint32), (high * 0 + purpose).to(tl.uint32))


@triton.jit
def noise_of(bits):
    """(r + 1/2) / 2^16 float32 for the 16 bits r that lie at bit 7 and above.

    They become the float 1 + (r + 1/2) / 2^16 by their place in its mantissa: converting integers is slow.
    """
    return ((bits & 0x7FFF80) | 0x3F800040).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def uniform(seed, stream, purpose, row, call, first_call, calls_per_row, ROWS: tl.constexpr, CALLS: tl.constexpr):
    """Noise (r + 1/2) / 2^16 float32 [ROWS, 8 CALLS] of philox.uniform: rows from `row`, calls from `call`."""
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)
    counter = rows[:, None] * calls_per_row + (first_call + call + tl.arange(0, CALLS))[None, :]
    a, b, c, d = philox_words(seed, counter, stream, purpose)
    even = tl.join(tl.join(a << 7, c << 7), tl.join(b << 7, d << 7))
    odd = tl.join(tl.join(a >> 9, c >> 9), tl.join(b >> 9, d >> 9))
    bits = tl.reshape(tl.join(even, odd), [ROWS, 8 * CALLS])  # element 8 call + 4 i + 2 j + k
    return noise_of(bits)


@triton.jit
def load_patches(pointer, stride, row, column, rows, columns, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Load the piece [ROWS, COLS] at (row, column) as [ROWS / 8, COLS, 8], zero outside [rows, columns].

    Eight loads, joined, so that a thread holds eight rows of its columns: both the row view and the transposed view
    then move several bytes at a time between threads. Transposing a plainly loaded piece moves single bytes and is
    three times slower.
    """
    r, c = row + 8 * tl.arange(0, ROWS // 8), column + tl.arange(0, COLS)
    first = pointer + r.to(tl.int64)[:, None] * stride + c[None, :]
    inside = (c < columns)[None, :]
    xs = ()
    for i in tl.static_range(8):
        xs += (tl.load(first + i * stride, mask=(r + i < rows)[:, None] & inside, other=0.0),)
    even = tl.join(tl.join(xs[0], xs[4]), tl.join(xs[2], xs[6]))
    odd = tl.join(tl.join(xs[1], xs[5]), tl.join(xs[3], xs[7]))
    return tl.reshape(tl.join(even, odd), [ROWS // 8, COLS, 8])


@triton.jit
def row_view(patches, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Patches as float32 [ROWS, COLS]."""
    return tl.reshape(tl.permute(patches, [0, 2, 1]), [ROWS, COLS]).to(tl.float32)


@triton.jit
def tile_scales(blocks, CARRY: tl.constexpr, MACRO_BITS: tl.constexpr):
    """Of blocks [ROWS, TILES, 4, 32]: codes and bad [ROWS, TILES, 4], macro byte, factor f and top [ROWS, TILES]."""
    absmax, bad = block_maxima(blocks)
    tile_max = tl.max(absmax, axis=2)
    byte, factor = static_factor(tile_max, MACRO_BITS if MACRO_BITS > 0 else 8)
    if MACRO_BITS > 0:
        absmax = absmax * factor[:, :, None]
    code = code_of(absmax, CARRY)
    top = tl.max(tl.where(absmax == 0.0, 1, code), axis=2)
    return spread_codes(code, absmax, top[:, :, None]), bad, byte, factor, top


@triton.jit
def encode(blocks, code, bad, factor, unit, noise, SATURATE: tl.constexpr, MACRO: tl.constexpr, RANDOM: tl.constexpr):
    """Round blocks [ROWS, TILES, 4, 32] and return them in units of 2^(unit - 127), ready for an exact E4M3 cast.

    unit is int32 [ROWS, TILES]. Working in units keeps every magnitude at 448 or below, so nothing overflows. A bad
    block's multiplier is NaN, which makes all of it NaN at no cost per element.
    """
    if MACRO:
        blocks = blocks * factor[:, :, None, None]
    per_unit = power_of_two(254 - unit)[:, :, None] + tl.where(bad, float("nan"), 0.0)
    y = blocks * per_unit[:, :, :, None]
    scale = power_of_two(tl.maximum(code - unit[:, :, None] + 127, 1))[:, :, :, None]
    if RANDOM:
        return round_random(y, scale, noise)
    return round_nearest(y, scale, SATURATE)


@triton.jit
def scale_of(unit, factor, MACRO: tl.constexpr):
    """The float32 scale of bytes in units of 2^(unit - 127), divided by the macro factor f where there is one."""
    value = power_of_two(unit)
    if MACRO:
        value = value * tl.div_rn(tl.full(factor.shape, 1.0, tl.float32), factor)
    return value


@triton.jit
def unit_of(top):
    """The code of an E4M3 byte's unit in a group whose largest code is `top`."""
    return tl.maximum(top - TOP, 1)
