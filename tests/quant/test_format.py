"""E2M1 and E8M0: ties, packing, scale rules."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from mxdist.quant.format import (
    E2M1_VALUES,
    E8M0_NAN,
    e2m1_decode_packed,
    e2m1_encode,
    e8m0_decode,
    e8m0_from_absmax,
    pack_nibbles,
    unpack_nibbles,
)
from mxdist.quant.recipe import ScaleRule
from mxdist.quant.rounding import round_fast, round_plain

TIES = ((0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0))
"""E2M1's seven decision points, and the magnitude that each rounds to: the one whose code is even."""


def round_at_scale_one(values: list[float]) -> list[float]:
    x = torch.tensor(values).view(1, 1, -1)
    codes = torch.full((1, 1), 127, dtype=torch.int32)
    plain, fast = round_plain(x, codes), round_fast(x, codes, saturate=True, wide=False)
    assert torch.equal(plain, fast)
    return plain.flatten().tolist()


def test_ties_go_to_the_even_code_and_one_ulp_decides() -> None:
    codes = {value: code for code, value in enumerate(E2M1_VALUES)}
    for tie, winner in TIES:
        below, above = (torch.tensor(tie).nextafter(torch.tensor(to)).item() for to in (0.0, 9.0))
        lower = max(v for v in E2M1_VALUES if v < tie)
        upper = min(v for v in E2M1_VALUES if v > tie)
        assert codes[winner] % 2 == 0
        assert round_at_scale_one([below, tie, above]) == [lower, winner, upper]
        assert round_at_scale_one([-below, -tie, -above]) == [-lower, -winner, -upper]


def test_magnitudes_above_six_saturate() -> None:
    assert round_at_scale_one([6.0, 6.99, 7.0, 7.5, 100.0, -1e30]) == [6.0, 6.0, 6.0, 6.0, 6.0, -6.0]


def test_every_code_survives_decoding_and_encoding_and_minus_zero_becomes_zero() -> None:
    values = e2m1_decode_packed(pack_nibbles(torch.arange(16, dtype=torch.uint8)))
    assert values.tolist() == [*E2M1_VALUES, *(-value for value in E2M1_VALUES)]
    assert values[8].signbit()
    assert e2m1_encode(values).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 12, 13, 14, 15]


def test_packing_puts_the_first_element_in_the_low_nibble_and_round_trips_all_bytes() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    codes = unpack_nibbles(packed)
    assert codes[:4].tolist() == [0, 0, 1, 0]
    assert codes[-2:].tolist() == [15, 15]
    assert torch.equal(pack_nibbles(codes), packed)
    values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])
    assert torch.equal(e2m1_decode_packed(packed), values[codes.int()])


def test_e8m0_codes_are_the_powers_of_two_and_255_is_nan() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    scales = e8m0_decode(codes)
    assert scales[:255].tolist() == [2.0 ** (c - 127) for c in range(255)]
    assert scales[E8M0_NAN].isnan()


EXPONENT_OF_RULE = {
    ScaleRule.FLOOR: lambda m: m[1] - 3,  # m = mantissa in [0.5, 1) * 2^exponent
    ScaleRule.CEIL: lambda m: m[1] - 3 + (m[0] > 0.75),
    ScaleRule.EVEN: lambda m: m[1] - 3 + (m[0] >= 0.875),
}


@given(st.floats(2.0**-140, 2.0**127, width=32), st.sampled_from(list(EXPONENT_OF_RULE)))
def test_scale_exponents_follow_their_rule_within_the_allowed_range(absmax: float, rule: ScaleRule) -> None:
    expected = min(max(EXPONENT_OF_RULE[rule](math.frexp(absmax)), -126), 125)
    assert e8m0_from_absmax(torch.tensor([absmax]), rule).item() - 127 == expected


@given(st.integers(-100, 100), st.sampled_from([1.0, 1.5, 1.75, 1.25]), st.sampled_from([-1, 0, 1]))
def test_ceil_is_the_smallest_power_of_two_that_does_not_saturate(exponent: int, factor: float, ulp: int) -> None:
    absmax = torch.tensor(factor * 2.0**exponent)
    absmax = absmax.nextafter(torch.tensor(0.0 if ulp < 0 else torch.inf)) if ulp else absmax
    scale = 2.0 ** (e8m0_from_absmax(absmax.view(1), ScaleRule.CEIL).item() - 127)
    assert 3.0 < absmax.item() / scale <= 6.0
