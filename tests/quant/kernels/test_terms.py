"""Kernels for every macro method and outlier fallback: values and packed bytes of the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant import reference
from mxdist.quant.e4m3 import to_e4m3
from mxdist.quant.kernels import quant_terms
from mxdist.quant.kernels.options import UnsupportedOperandError
from mxdist.quant.kernels.unpack import unpack
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Fallback, Macro, Operand
from mxdist.quant.transform import Frozen
from tests.quant.kernels.data import DEVICE, matrix
from tests.quant.kernels.test_quantisers import assert_same

FALLBACK, FLAGGED = Fallback(), Fallback(alpha=0.3, fraction=0.05)
STATIC, SEARCHED, FOLDED = Macro(), Macro(method="search", bits=4), Macro(method="folded")
OPERANDS = [
    Operand(),
    Operand(macro=SEARCHED),
    Operand(macro=FOLDED, scale_rule="even"),
    Operand(fallback=FALLBACK),
    Operand(macro=STATIC, fallback=FALLBACK),
    Operand(macro=SEARCHED, fallback=FALLBACK),
    Operand(macro=FOLDED, fallback=Fallback(alpha=0.3), scale_rule="floor"),
]


def same_bytes(x: torch.Tensor, operand: Operand, **arguments: object) -> None:
    got, wanted = quant_terms.quantise(x, operand, **arguments), reference.quantise(x, operand, **arguments)
    assert got.shape == wanted.shape
    for key, part in wanted.parts().items():
        assert torch.equal(got.parts()[key], part), key


@pytest.mark.parametrize("shape", [(40, 336), (3, 31)])
@pytest.mark.parametrize("operand", OPERANDS, ids=str)
def test_values_and_packed_bytes_are_the_references(shape: tuple[int, int], operand: Operand) -> None:
    x = matrix(*shape, spread=2.0)
    same_bytes(x, operand)
    assert_same(quant_terms.fake_quantise(x, operand), reference.fake_quantise(x, operand))


@pytest.mark.parametrize("frozen", [Frozen(threshold=2.5), Frozen(tiles=torch.tensor([2, 0]))], ids=["max", "listed"])
def test_only_flagged_tiles_have_a_residual(frozen: Frozen) -> None:
    x, operand = matrix(40, 420, spread=1.0), Operand(macro=STATIC, fallback=FLAGGED)
    same_bytes(x, operand, frozen=frozen)
    values = quant_terms.fake_quantise(x, operand, frozen=frozen)
    assert_same(values, reference.fake_quantise(x, operand, frozen=frozen))
    plain = reference.fake_quantise(x, Operand(macro=STATIC))
    changed = torch.nn.functional.pad(values != plain, (0, 92)).view(40, 4, 128).any(-1)
    assert changed.any()
    assert not changed.all()


def test_both_terms_draw_the_references_bits() -> None:
    x, operand = matrix(36, 200), Operand(rounding="stochastic", fallback=FALLBACK)
    draw = Draw(-5 * 2**40 + 3, 2, row=64, column=40, columns=999)
    same_bytes(x, operand, seed=draw)
    assert_same(quant_terms.fake_quantise(x, operand, seed=draw), reference.fake_quantise(x, operand, seed=draw))


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-130, 2.0**100, 2.0**124])
@pytest.mark.parametrize("operand", [OPERANDS[4], OPERANDS[5]], ids=str)
def test_magnitudes_at_the_ends_of_the_range_are_right(operand: Operand, scale: float) -> None:
    x = torch.randn(32, 128, generator=torch.Generator().manual_seed(1)).clamp(-4, 4).to(DEVICE) / 4 * scale
    same_bytes(x, operand)
    assert_same(quant_terms.fake_quantise(x, operand), reference.fake_quantise(x, operand))


def test_a_nonfinite_value_is_named_or_makes_its_block_nan_and_nothing_else() -> None:
    x, operand = matrix(33, 256), OPERANDS[4]
    x[3, 70] = torch.nan
    same_bytes(x, operand, nonfinite="propagate")
    wanted = reference.fake_quantise(x, operand, nonfinite="propagate")
    assert_same(quant_terms.fake_quantise(x, operand, nonfinite="propagate"), wanted)
    with pytest.raises(ValueError, match=r"hidden .* at position \(3, 70\)"):
        quant_terms.fake_quantise(x, operand, name="hidden")


def test_leading_axes_views_other_dtypes_and_empty_tensors_are_right() -> None:
    x, operand = matrix(24, 256, dtype=torch.float32), OPERANDS[4]
    for view in (x.view(2, 3, 4, 256), x[:, 64:192], x.t(), x.half(), x.double(), x[0]):
        assert_same(quant_terms.fake_quantise(view, operand), reference.fake_quantise(view, operand))
        same_bytes(view, operand)
    assert quant_terms.quantise(x[:0], operand).shape == (0, 256)
    rounded = quant_terms.fake_quantise(x, operand, dtype=torch.bfloat16)
    assert torch.equal(rounded, reference.fake_quantise(x, operand).bfloat16())


@pytest.mark.parametrize(
    ("operand", "message"),
    [(Operand(block=16), "blocks of 16"), (Operand(hadamard="plain"), "Hadamard"), (Operand(mean=True), "mean")],
)
def test_an_operand_beyond_the_kernels_names_the_backend_that_does_it(operand: Operand, message: str) -> None:
    with pytest.raises(UnsupportedOperandError, match=f"{message}.*reference backend"):
        quant_terms.quantise(matrix(32, 128), operand)


@pytest.mark.parametrize("macro", [None, STATIC, SEARCHED, FOLDED], ids=str)
def test_packed_bytes_become_the_references_bytes_of_e4m3(macro: Macro | None) -> None:
    mx = reference.quantise(matrix(70, 200, spread=2.0), Operand(macro=macro))
    got, (data, scale) = unpack(mx), to_e4m3(mx)
    assert torch.equal(got.data.view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(got.scale, scale)


def test_bytes_that_no_tile_of_e4m3_holds_are_refused() -> None:
    x = matrix(4, 256)
    for operand in (Operand(fallback=FALLBACK), Operand(block=16), Operand(macro=Macro(size=64))):
        with pytest.raises(ValueError, match="one term"):
            unpack(reference.quantise(x, operand))
    x[0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN blocks"):
        unpack(reference.quantise(x, Operand(), nonfinite="propagate"))
