"""Counter-based random numbers: the published generator, and independence of tiling and layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mxdist.quant.philox import ROUNDING, SIGNS, Draw, philox, random_signs, uniform

CPU = torch.device("cpu")


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 in Python integers."""
    c, k, word = list(counter), list(key), (1 << 32) - 1
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & word, (p0 >> 32) ^ c[3] ^ k[1], p0 & word]
        k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
    return c


def test_the_scalar_reference_gives_the_published_answers() -> None:
    # Known-answer tests that accompany the paper's library (Random123, kat_vectors, philox4x32 10).
    assert scalar_philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert scalar_philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert scalar_philox([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]) == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    ]  # fmt: skip


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2))
def test_philox_on_tensors_is_philox(seed: int, counter: int, stream: int, purpose: int) -> None:
    words = philox(seed, torch.tensor([counter]), stream, purpose)
    low = (1 << 32) - 1
    expected = scalar_philox([counter & low, counter >> 32, stream, purpose], [seed & low, seed >> 32])
    assert [word.item() for word in words] == expected


@given(st.data(), st.integers(1, 9), st.integers(1, 12))
def test_an_element_keeps_its_number_however_the_tensor_is_cut(data: st.DataObject, rows: int, eighths: int) -> None:
    columns = 8 * eighths - data.draw(st.integers(0, 7))
    whole = uniform(Draw(7, stream=3), ROUNDING, rows, columns, 8 * eighths, CPU)
    row = data.draw(st.integers(0, rows - 1))
    column = 8 * data.draw(st.integers(0, eighths - 1))
    width = 8 * eighths - column
    shard = Draw(7, stream=3, row=row, column=column, columns=columns)
    piece = uniform(shard, ROUNDING, rows - row, columns - column, width, CPU)
    assert torch.equal(piece, whole[row:, column:])


def test_numbers_are_uniform_and_streams_purposes_and_seeds_differ() -> None:
    draws = [
        uniform(Draw(1), ROUNDING, 64, 512, 512, CPU),
        uniform(Draw(2), ROUNDING, 64, 512, 512, CPU),
        uniform(Draw(1, stream=1), ROUNDING, 64, 512, 512, CPU),
        uniform(Draw(1), SIGNS, 64, 512, 512, CPU),
    ]
    for numbers in draws:
        assert 0 < numbers.min() < 0.001
        assert 0.999 < numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / numbers.numel()) ** 0.5
        assert torch.histc(numbers, 16, 0, 1).sub(2048).abs().max() < 5 * 2048**0.5
    correlations = torch.corrcoef(torch.stack([numbers.flatten() for numbers in draws])) - torch.eye(4)
    assert correlations.abs().max() < 5 / numbers.numel() ** 0.5


def test_signs_depend_on_the_column_alone() -> None:
    signs = random_signs(Draw(5), 256, CPU)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert 96 < (signs > 0).sum() < 160
    assert torch.equal(random_signs(Draw(5, row=17, column=64), 192, CPU), signs[64:])


def test_a_shard_starts_at_a_multiple_of_eight() -> None:
    with pytest.raises(ValueError, match="multiple of 8, not 12"):
        Draw(0, column=12)
