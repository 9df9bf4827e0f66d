"""Every quantiser kernel writes the values of the reference, bit for bit: on a GPU, or interpreted on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant.e4m3 import to_e4m3
from mxdist.quant.hadamard import rotate_back
from mxdist.quant.kernels.dequantise import dequantise
from mxdist.quant.kernels.forms import Form
from mxdist.quant.kernels.options import UnsupportedOperandError
from mxdist.quant.kernels.quant_rows import quantise_rows
from mxdist.quant.kernels.quant_tiles import quantise_tiles
from mxdist.quant.kernels.quant_weight import quantise_weight
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Fallback, Macro, Operand
from mxdist.quant.reference import fake_quantise, quantise
from tests.quant.kernels.data import DEVICE, matrix

PLAIN = Operand()
NEAREST = [Operand(scale_rule=rule) for rule in ("ceil", "even", "floor")]
SHAPES = [(130, 336), (1, 128), (129, 40), (5, 31)]


def assert_same(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    different = (got != wanted) & ~(got.isnan() & wanted.isnan())
    assert not different.any(), f"{int(different.sum())} of {got.numel()} values differ"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operand", [*NEAREST, Operand(macro=Macro()), Operand(macro=Macro(bits=3))], ids=str)
def test_tiles_by_row_and_column_have_the_references_bytes_and_scales(shape: tuple[int, int], operand: Operand) -> None:
    x = matrix(*shape, spread=2.0)  # codes of a tile differ by more than 14 binades
    for matrix8, wanted in zip(quantise_tiles(x, operand, operand), (x, x.t()), strict=True):
        data, scale = to_e4m3(quantise(wanted, operand))
        assert matrix8 is not None
        assert torch.equal(matrix8.data.view(torch.uint8), data.view(torch.uint8))
        assert torch.equal(matrix8.scale, scale)


def test_one_direction_alone_equals_both_at_once() -> None:
    x = matrix(200, 256)
    by_row, by_column = quantise_tiles(x, PLAIN, PLAIN)
    assert_same(quantise_tiles(x, PLAIN)[0].dequantise(), by_row.dequantise())
    assert_same(quantise_tiles(x, column=PLAIN)[1].dequantise(), by_column.dequantise())
    assert quantise_tiles(x, PLAIN)[1] is quantise_tiles(x, column=PLAIN)[0] is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operand", NEAREST, ids=str)
def test_rows_and_squares_have_the_references_values(shape: tuple[int, int], operand: Operand) -> None:
    x = matrix(*shape)
    assert_same(quantise_rows(x, operand).dequantise(), fake_quantise(x, operand))
    squares = quantise_tiles(x, column=operand, column_form=Form.SQUARE)[1]
    assert_same(squares.dequantise(), fake_quantise(x.t(), operand))


@pytest.mark.parametrize("row", [PLAIN, Operand(macro=Macro())], ids=["plain", "macro"])
def test_squares_from_the_same_read_as_rows_have_the_references_values(row: Operand) -> None:
    x = matrix(130, 336)
    by_row, squares = quantise_tiles(x, row, PLAIN, column_form=Form.SQUARE)
    assert_same(by_row.dequantise(), fake_quantise(x, row))
    assert_same(squares.dequantise(), fake_quantise(x.t(), PLAIN))


def test_rows_too_long_for_registers_are_read_twice_and_right() -> None:
    for k in (17000, 25000):  # held, read again
        x = matrix(2, k)
        assert_same(quantise_rows(x, PLAIN).dequantise(), fake_quantise(x, PLAIN))


def test_a_row_spanning_more_than_14_binades_loses_at_most_2_to_the_minus_17_of_its_maximum() -> None:
    x = matrix(8, 512, spread=4.0)
    error = (quantise_rows(x, PLAIN).dequantise() - fake_quantise(x, PLAIN)).abs()
    assert (error <= x.float().abs().amax(1, keepdim=True) * 2.0**-17).all()


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("form", [Form.SQUARE, Form.ROW])
@pytest.mark.parametrize("shape", [(160, 336), (1, 128), (300, 64)])
def test_a_weight_and_its_transpose_share_the_references_values(
    shape: tuple[int, int], form: Form, square: bool
) -> None:
    w = matrix(*shape, dtype=torch.float32)
    operand = Operand(square=square)
    both, wanted = quantise_weight(w, operand, form=form), fake_quantise(w, operand)
    assert_same(both.forward.dequantise(), wanted)
    assert_same(both.transposed.dequantise(), wanted.t())


@pytest.mark.parametrize("operand", NEAREST, ids=str)
def test_quantising_a_quantised_weight_changes_nothing(operand: Operand) -> None:
    once = fake_quantise(matrix(96, 256), operand)
    assert_same(quantise_weight(once, operand).forward.dequantise(), once)


def test_stochastic_rounding_draws_the_references_bits_wherever_the_shard_lies() -> None:
    x, operand = matrix(136, 336), Operand(rounding="stochastic")
    draw = Draw(-5 * 2**40 + 3, 2, row=64, column=40, columns=999)
    by_row, by_column = quantise_tiles(x, operand, operand, row_draw=draw, column_draw=7)
    assert_same(by_row.dequantise(), fake_quantise(x, operand, seed=draw))
    assert_same(by_column.dequantise(), fake_quantise(x.t(), operand, seed=7))
    assert_same(quantise_rows(x, operand, draw=draw).dequantise(), fake_quantise(x, operand, seed=draw))


def test_hadamard_along_columns_adds_in_the_references_order() -> None:
    x, operand = matrix(160, 72), Operand(hadamard="plain")
    rotated = quantise_tiles(x, column=operand)[1]
    padded = rotated.data.float() * rotated.scale.repeat_interleave(128, 1)
    assert_same(rotate_back(padded, None)[:, :160], fake_quantise(x.t(), operand))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_nonfinite_value_is_named_or_makes_its_block_nan_and_nothing_else(bad: float) -> None:
    x = matrix(130, 256)
    x[3, 70] = bad
    if DEVICE.type == "cuda":  # the interpreter casts NaN to an ordinary E4M3 number
        wanted = quantise(x, PLAIN, nonfinite="propagate").dequantise()
        by_row, by_column = quantise_tiles(x, PLAIN, PLAIN, nonfinite="propagate")
        assert_same(by_row.dequantise(), wanted)
        assert_same(by_column.dequantise(), quantise(x.t(), PLAIN, nonfinite="propagate").dequantise())
        assert_same(quantise_rows(x, PLAIN, nonfinite="propagate").dequantise(), wanted)
    for quantiser in (quantise_rows, quantise_tiles, quantise_weight):
        with pytest.raises(ValueError, match=r"hidden .* at position \(3, 70\)"):
            quantiser(x, PLAIN, name="hidden")


def test_views_float32_and_empty_matrices_are_right() -> None:
    x = matrix(64, 512, dtype=torch.float32)
    for view in (x[:, 128:384], x.t(), x[::2]):
        assert_same(quantise_rows(view, PLAIN).dequantise(), fake_quantise(view, PLAIN))
        assert_same(quantise_tiles(view, column=PLAIN)[1].dequantise(), fake_quantise(view.t(), PLAIN))
    assert quantise_rows(x[:0], PLAIN).dequantise().shape == (0, 512)
    assert quantise_tiles(x[:0], PLAIN, PLAIN)[1].dequantise().shape == (512, 0)


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-120, 2.0**100, 2.0**124])
def test_magnitudes_at_the_ends_of_the_range_are_right(scale: float) -> None:
    x = torch.randn(32, 128, generator=torch.Generator().manual_seed(1)).clamp(-4, 4).to(DEVICE) / 4 * scale
    for operand in NEAREST:
        assert_same(quantise_rows(x, operand).dequantise(), fake_quantise(x, operand))


def test_dequantising_gives_the_values_in_every_form() -> None:
    x = matrix(150, 260)
    weight = quantise_weight(x, PLAIN)
    forms = [quantise_rows(x, PLAIN), *quantise_tiles(x, Operand(macro=Macro()), PLAIN), weight.forward]
    for each in forms:
        assert_same(dequantise(each, torch.float32), each.dequantise())


@pytest.mark.parametrize(
    ("operand", "message"),
    [
        (Operand(block=16), "blocks of 16"),
        (Operand(fallback=Fallback()), "outlier fallback"),
        (Operand(macro=Macro(method="search", bits=4)), "searched macro factors"),
        (Operand(mean=True), "mean removal"),
    ],
)
def test_an_operand_beyond_the_kernels_names_the_backend_that_does_it(operand: Operand, message: str) -> None:
    with pytest.raises(UnsupportedOperandError, match=f"{message}.*reference backend"):
        quantise_tiles(matrix(32, 128), operand)
