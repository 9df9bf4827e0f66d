"""The two terms of an operand, z = Q(f u) and its residual, with every way of choosing the macro factor f.

What `reference.Job` does, on blocks float32 [ROWS, TILES, 4, 32]. Terms come in units of 2^(unit - 127), one unit per
tile, as E4M3 bytes want them: every magnitude is 448 or below, so that nothing overflows.

Launch with enable_fp_fusion=False: a fused multiply-add would round squared errors and sums once where the reference
rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxdist.quant.kernels.device import (
    MACRO_LIMIT,
    block_maxima,
    code_of,
    power_of_two,
    round_nearest,
    round_random,
    spread_codes,
    static_factor,
    uniform,
    unit_of,
)

NO_FACTOR, STATIC, SEARCHED, FOLDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def tile_noise(seed, stream, purpose, row, tile, first_call, calls_per_row, ROWS: tl.constexpr):
    """Noise [ROWS, 1, 4, 32] for the rows from `row` of a tile along K; see device.uniform."""
    noise = uniform(seed, stream, purpose, row, tile * 16, first_call, calls_per_row, ROWS, 16)
    return tl.reshape(noise, [ROWS, 1, 4, 32])


@triton.jit
def tree_sum(values, LOG: tl.constexpr):
    """Sum the last axis of [M, 2^LOG] by halving, in the order of scaling.tree_sum."""
    for _ in tl.static_range(LOG):
        halves = tl.reshape(values, [values.shape[0], 2, values.shape[1] // 2])
        first, second = tl.split(tl.permute(halves, [0, 2, 1]))
        values = first + second
    return tl.reshape(values, [values.shape[0]])


@triton.jit
def factors(byte, METHOD: tl.constexpr):
    """Encode factor f and decode factor g of macro bytes int32 (scaling.macro_factors)."""
    one = tl.full(byte.shape, 1.0, tl.float32)
    if METHOD == FOLDED:
        g = 1.0 + byte.to(tl.float32) * 0.25
        f = tl.div_rn(one, g)
    else:
        f = 1.0 + byte.to(tl.float32) * 0.00390625
        g = tl.div_rn(one, f)
    return f, g


@triton.jit
def scales_of(absmax, CARRY: tl.constexpr):
    """Codes [ROWS, TILES, 4] and units [ROWS, TILES] of block maxima (scaling.codes_from_maxima)."""
    code = code_of(absmax, CARRY)
    top = tl.max(code, axis=2)
    return spread_codes(code, absmax, top[:, :, None]), unit_of(top)


@triton.jit
def in_units(values, unit):
    """Values [ROWS, TILES, 4, 32] over 2^(unit - 127)."""
    return values * power_of_two(254 - unit)[:, :, None, None]


@triton.jit
def round_in_units(y, code, unit, noise, SATURATE: tl.constexpr, RANDOM: tl.constexpr):
    """Round values in units to E2M1 times the scales of `code`."""
    scale = power_of_two(tl.maximum(code - unit[:, :, None] + 127, 1))[:, :, :, None]
    return round_random(y, scale, noise) if RANDOM else round_nearest(y, scale, SATURATE)


@triton.jit
def search(blocks, absmax, METHOD: tl.constexpr, BITS: tl.constexpr, CARRY: tl.constexpr, SATURATE: tl.constexpr):
    """Macro bytes of least squared error (scaling._search_macro); the first of equals wins."""
    ROWS: tl.constexpr = blocks.shape[0]
    TILES: tl.constexpr = blocks.shape[1]
    count: tl.constexpr = 3 if METHOD == FOLDED else 1 << BITS
    step: tl.constexpr = 1 if METHOD == FOLDED else 256 >> BITS
    best = tl.zeros([ROWS, TILES], tl.int32)
    best_error = tl.zeros([ROWS, TILES], tl.float32)
    for index in range(count):
        byte = tl.zeros([ROWS, TILES], tl.int32) + index * step
        f, g = factors(byte, METHOD)
        code, unit = scales_of(absmax * f[:, :, None], CARRY)
        y = in_units(blocks * f[:, :, None, None], unit)
        error = (round_in_units(y, code, unit, 0.0, SATURATE, False) - y) * power_of_two(unit)[:, :, None, None]
        sums = tree_sum(tl.reshape(error * error, [ROWS * TILES * 4, 32]), 5)
        sums = tl.reshape(tree_sum(tl.reshape(sums, [ROWS * TILES, 4]), 2), [ROWS, TILES]) * (g * g)
        better = (sums < best_error) | (byte == 0)
        best = tl.where(better, byte, best)
        best_error = tl.where(better, sums, best_error)
    return tl.where(tl.max(absmax, axis=2) >= MACRO_LIMIT, 0, best)


@triton.jit
def first_term(
    blocks, noise, METHOD: tl.constexpr, BITS: tl.constexpr, CARRY: tl.constexpr, SATURATE: tl.constexpr,
    RANDOM: tl.constexpr,
):  # fmt: skip
    """Quantise blocks: what is left in units, z1 in units, codes, units, macro bytes, g, bad blocks, tile maxima."""
    absmax, bad = block_maxima(blocks)
    blocks = tl.where(bad[:, :, :, None], 0.0, blocks)
    tile_max = tl.max(absmax, axis=2)
    byte = tl.zeros(tile_max.shape, tl.int32)
    g = tl.full(tile_max.shape, 1.0, tl.float32)
    if METHOD != NO_FACTOR:
        if METHOD == STATIC:
            byte, _ = static_factor(tile_max, BITS)
        else:
            byte = search(blocks, absmax, METHOD, BITS, CARRY, SATURATE)
        f, g = factors(byte, METHOD)
        blocks = blocks * f[:, :, None, None]
        absmax = absmax * f[:, :, None]
    code, unit = scales_of(absmax, CARRY)
    scaled = in_units(blocks, unit)
    y = round_in_units(scaled, code, unit, noise, SATURATE, RANDOM)
    return scaled - y, y, code, unit, byte, g, bad, tile_max


@triton.jit
def second_term(left, unit, noise, CARRY: tl.constexpr, SATURATE: tl.constexpr, RANDOM: tl.constexpr):
    """Quantise what the first term left, in units of `unit`: z2 in its own units, codes and units."""
    left = left * power_of_two(unit)[:, :, None, None]
    code, unit = scales_of(tl.max(tl.abs(left), axis=3), CARRY)
    return round_in_units(in_units(left, unit), code, unit, noise, SATURATE, RANDOM), code, unit


@triton.jit
def nibbles(y, code, unit):
    """E2M1 codes of a term in units, packed: uint8 [ROWS, TILES, 4, 16], the first of two in the low nibble."""
    value = y * power_of_two(unit[:, :, None] - code + 127)[:, :, :, None]
    magnitude = tl.abs(value)
    number = (magnitude.to(tl.int32, bitcast=True) >> 22) - 252  # 1, 1.5, 2, .. are codes 2, 3, 4, ..
    number = tl.where(magnitude < 1.0, (magnitude > 0.0).to(tl.int32), number) + tl.where(value < 0.0, 8, 0)
    low, high = tl.split(tl.reshape(number, [y.shape[0], y.shape[1], 4, 16, 2]))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def e2m1_values(codes):
    """The float32 values of E2M1 codes 0..15, int32: 2, 3, 4, .. are 1, 1.5, 2, .. by their place in a float's bits."""
    number = codes & 7
    value = tl.where(number < 2, number.to(tl.float32) * 0.5, ((number + 252) << 22).to(tl.float32, bitcast=True))
    return tl.where(codes > 7, -value, value)
