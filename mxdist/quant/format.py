"""The MXFP4 format: E2M1 elements, E8M0 block scales, their bits, and the rule from block maximum to scale.

Facts (OCP MX v1.0; NUMERICS.md 1, 2): an element is 4 bits, sign + 2 exponent bits + 1 mantissa bit, with the
magnitudes of `E2M1_VALUES`; a block of 32 elements shares one E8M0 byte c, the scale 2^(c - 127); c = 255 is NaN.
This project stores zero as code 0 only (never code 8, minus zero): equal values then have equal bytes, which is
what checksums and the "codes changed" count compare.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mxdist.quant.recipe import ScaleRule

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of codes 0..7; bit 3 of a code is the sign."""
E2M1_MAX = 6.0

E8M0_BIAS = 127
E8M0_NAN = 255
E8M0_MIN, E8M0_MAX = 1, 252
"""Codes that are written: exponents -126..125, so that 6 * 2^e and 2^-e are normal float32 numbers."""

TILE = 128
"""Elements along K whose block scales are kept within `TILE_SPAN` binades of their largest."""
TILE_SPAN = 14
"""E2M1 * 2^r is an E4M3 number for 15 consecutive r, hence a whole tile is exact in E4M3 (NUMERICS.md 3)."""

FLOAT32_MANTISSA_BITS = 23

# As tensors, because torch converts a Python integer to one on every call, which on small inputs doubles the cost.
MANTISSA_SHIFT = torch.tensor(FLOAT32_MANTISSA_BITS, dtype=torch.int32)
EXPONENT_MASK = torch.tensor(0x7F800000, dtype=torch.int32)

SCALE_CARRY = {ScaleRule.FLOOR: 0, ScaleRule.CEIL: 0x3FFFFF, ScaleRule.EVEN: 0x200000}
"""Added to the bits of a block maximum m = 1.f * 2^E so that they carry into the exponent when the rule asks for the
next power of two: CEIL when 1.f > 1.5 (m > 6 scale units), EVEN when 1.f >= 1.75, FLOOR never. BEST starts as CEIL."""


def e8m0_from_absmax(absmax: Tensor, rule: ScaleRule) -> Tensor:
    """Return the int32 E8M0 codes, within [E8M0_MIN, E8M0_MAX], for block maxima (float32, finite, >= 0).

    Integer arithmetic on the float's bits: no logarithm, so the same on every device. Source: NUMERICS.md 2.
    """
    carry = _EXPONENT_CARRY[ScaleRule.CEIL if rule is ScaleRule.BEST else rule]
    codes = absmax.contiguous().view(torch.int32).add(carry).bitwise_right_shift_(MANTISSA_SHIFT)
    return codes.clamp_(E8M0_MIN, E8M0_MAX)


# The exponent of the scale is that of the maximum, carried as above, less the 2 of E2M1's largest value 1.5 * 2^2.
_EXPONENT_CARRY = {
    rule: torch.tensor(carry - (2 << FLOAT32_MANTISSA_BITS), dtype=torch.int32) for rule, carry in SCALE_CARRY.items()
}


def e8m0_decode(codes: Tensor) -> Tensor:
    """Return the float32 scales 2^(c - 127) of integer codes; code 0 is the subnormal 2^-127, 255 is NaN."""
    wide = codes.to(torch.int32)
    bits = wide << FLOAT32_MANTISSA_BITS
    bits = torch.where(wide == 0, 1 << (FLOAT32_MANTISSA_BITS - 1), bits)
    return torch.where(wide == E8M0_NAN, 0x7FC00000, bits).view(torch.float32)


def e2m1_encode(values: Tensor) -> Tensor:
    """Return the uint8 codes 0..15 of values on the E2M1 grid (float32), zero of either sign becoming 0.

    Times 2^-6 the grid's 1 is the smallest normal number of E4M3 and its 0.5 a subnormal one, so that the E4M3 byte is
    the sign followed by the code times 4. Values off the grid give a wrong code, not an error: round first.
    """
    byte = (values * 2.0**-6).add_(0.0).to(torch.float8_e4m3fn).view(torch.uint8)  # -0 + 0 is +0
    return (byte & 0x80).bitwise_right_shift_(4).bitwise_or_((byte >> 2) & 7)


def e2m1_decode_packed(packed: Tensor) -> Tensor:
    """Return the float32 values [..., 2n] of packed bytes [..., n]: one look-up for two elements."""
    pairs = _pair_table(packed.device).index_select(0, packed.flatten().to(torch.int32))
    return pairs.view(*packed.shape[:-1], 2 * packed.shape[-1])


@lru_cache
@torch.inference_mode(False)  # a table made inside inference mode could not be used outside it
def _pair_table(device: torch.device) -> Tensor:
    """The two values of each byte, float32 [256, 2]; code 8 is -0.0."""
    values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=device)
    byte = torch.arange(256, device=device)
    return values[torch.stack((byte & 0xF, byte >> 4), dim=-1)]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack uint8 codes [..., 2n] into bytes [..., n]: element 2j in the low nibble, 2j + 1 in the high one."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: bytes [..., n] to uint8 codes [..., 2n]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
