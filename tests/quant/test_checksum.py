"""Checksums add over shards and see every kind of damage."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mxdist.quant.checksum import Spans, checksum, checksums, combine, mix64

BYTES = st.lists(st.integers(0, 255), min_size=1, max_size=300)


def as_bytes(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def test_the_value_is_fixed_for_all_time() -> None:
    def scalar_mix(key: int) -> int:  # splitmix64 in Python integers
        mask = (1 << 64) - 1
        z = (key + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert scalar_mix(0) == 0xE220A8397B1DCDAF  # the published first output of splitmix64 seeded with 0
    assert mix64(torch.tensor([0, 7])).tolist() == [
        v - (1 << 64) if v >> 63 else v for v in (scalar_mix(0), scalar_mix(7))
    ]
    data = [3, 1, 4, 1, 5, 255]
    expected = sum(scalar_mix(256 * (9 + i) + b) for i, b in enumerate(data)) % (1 << 64)
    assert checksum(as_bytes(data), offset=9) == expected


@given(BYTES, st.data())
def test_checksums_of_shards_add_to_the_checksum_of_the_whole(values: list, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(values)))
    offset = data.draw(st.integers(0, 2**40))
    whole = as_bytes(values)
    parts = [checksum(whole[cut:], offset + cut), checksum(whole[:cut], offset)]
    assert combine(parts) == checksum(whole, offset)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
def test_shards_along_the_last_axis_add_too(rows: int, left: int, right: int) -> None:
    whole = torch.randint(0, 256, (rows, left + right), generator=torch.Generator().manual_seed(rows)).byte()
    width = left + right
    parts = [
        checksum(whole[:, :left], 0, row_stride=width),
        checksum(whole[:, left:], left, row_stride=width),
    ]
    assert combine(parts) == checksum(whole)


@given(BYTES, st.data())
def test_a_flipped_bit_is_seen(values: list, data: st.DataObject) -> None:
    index, bit = data.draw(st.integers(0, len(values) - 1)), data.draw(st.integers(0, 7))
    damaged = values.copy()
    damaged[index] ^= 1 << bit
    assert checksum(as_bytes(damaged)) != checksum(as_bytes(values))


@given(BYTES, st.data())
def test_a_swap_of_two_different_bytes_is_seen(values: list, data: st.DataObject) -> None:
    i, j = (data.draw(st.integers(0, len(values) - 1)) for _ in range(2))
    assume(values[i] != values[j])
    swapped = values.copy()
    swapped[i], swapped[j] = values[j], values[i]
    assert checksum(as_bytes(swapped)) != checksum(as_bytes(values))


@given(BYTES, st.integers(1, 1000))
def test_a_shift_is_seen(values: list, shift: int) -> None:
    assert checksum(as_bytes(values), shift) != checksum(as_bytes(values), 0)


def test_any_dtype_is_read_as_its_bytes_and_long_tensors_in_chunks() -> None:
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    assert checksum(x) == checksum(x.view(torch.uint8))
    assert combine([checksum(x[:70_001]), checksum(x[70_001:], 4 * 70_001)]) == checksum(x)
    assert checksum(torch.empty(0)) == 0
    assert checksum(x.view(1, -1).expand(2, -1)) == checksum(torch.stack((x, x)))


def test_overlapping_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="row_stride 3 is smaller"):
        checksum(torch.zeros(2, 4, dtype=torch.uint8), row_stride=3)


def test_words_are_numbered_by_their_place_and_add_over_shards() -> None:
    data = torch.arange(64, dtype=torch.int32).view(4, 16) * -123456789
    words = [int(word) & 0xFFFFFFFF for word in data.flatten()]
    keys = torch.tensor([(i << 32) + word - ((1 << 64) if i << 32 >= 1 << 63 else 0) for i, word in enumerate(words)])
    assert checksum(data, unit=4) == int(mix64(keys).sum()) & (1 << 64) - 1
    parts = [checksum(data[:, :4], 0, 64, unit=4), checksum(data[:, 4:], 16, 64, unit=4)]
    assert combine(parts) == checksum(data, unit=4)
    with pytest.raises(ValueError, match="no multiple of the unit 4"):
        checksum(torch.zeros(6, dtype=torch.uint8), unit=4)


def test_ranges_of_a_buffer_have_the_checksums_of_the_tensors_they_are() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    spans = Spans(np.array([0, 40, 999]), np.array([40, 900, 1]))
    pieces = [x[:40], x[40:940], x[999:]]
    for buffer, unit, whole in ((x, 4, pieces), (x.bfloat16(), 4, [piece.bfloat16().float() for piece in pieces])):
        assert [int(v) & (1 << 64) - 1 for v in checksums(buffer, spans)] == [checksum(p, unit=unit) for p in whole]


def test_ranges_that_are_shards_add_to_the_checksum_of_the_whole() -> None:
    whole = torch.randint(-(2**31), 2**31 - 1, (6, 20), generator=torch.Generator().manual_seed(0)).int()
    top, bottom = Spans(np.array([0]), np.array([40])), Spans(np.array([40]), np.array([80]), np.array([40]))
    by_row = [checksums(whole.flatten(), spans) for spans in (top, bottom)]
    left, right = whole[:, :8].flatten(), whole[:, 8:].flatten()
    by_column = [
        checksums(left, Spans(np.array([0]), np.array([48]), np.array([0]), 8, 20)),
        checksums(right, Spans(np.array([0]), np.array([72]), np.array([8]), 12, 20)),
    ]
    for parts in (by_row, by_column):
        assert combine(int(part) for part in parts) == checksum(whole, unit=4)
