"""Outlier fallback of listed tiles as a longer FP8 GEMM, and weights whose macro factors lie in their bytes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant.e4m3 import to_e4m3
from mxdist.quant.kernels.forms import Form
from mxdist.quant.kernels.options import UnsupportedOperandError
from mxdist.quant.kernels.quant_residual import quantise_with_residual, repeat_tiles, room_for_tiles
from mxdist.quant.kernels.quant_weight import quantise_weight
from mxdist.quant.recipe import Fallback, Macro, Operand
from mxdist.quant.reference import fake_quantise, quantise
from mxdist.quant.transform import Frozen
from tests.quant.kernels.data import DEVICE, matrix
from tests.quant.kernels.test_quantisers import assert_same

STATIC, SEARCHED, FOLDED = Macro(), Macro(method="search", bits=4), Macro(method="folded")
FLAGGED = Fallback(fraction=0.3)


@pytest.mark.parametrize("macro", [None, STATIC, SEARCHED, FOLDED], ids=str)
def test_tiles_have_the_references_bytes_and_scales(macro: Macro | None) -> None:
    x, operand = matrix(70, 200, spread=2.0), Operand(macro=macro)
    data, scale = to_e4m3(quantise(x, operand))
    got = quantise_with_residual(x, operand)
    assert torch.equal(got.data.view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(got.scale, scale)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_listed_tiles_are_appended_with_their_residual(rounding: str) -> None:
    tiles = torch.tensor([1, 3], device=DEVICE)
    operand = Operand(macro=STATIC, fallback=FLAGGED, rounding=rounding)
    x = matrix(70, 500)
    got = quantise_with_residual(x, operand, tiles, draw=5).dequantise()
    assert got.shape == (70, 6 * 128)
    assert_same(got[:, :500], fake_quantise(x, Operand(macro=STATIC, rounding=rounding), seed=5))
    total = got[:, :512].reshape(70, 4, 128).clone()
    total[:, tiles] += got[:, 512:].view(70, 2, 128)
    wanted = fake_quantise(x, operand, frozen=Frozen(tiles=tiles), seed=5)
    torch.testing.assert_close(total.view(70, 512)[:, :500], wanted, rtol=2**-22, atol=0.0)


@pytest.mark.parametrize("form", [Form.TILE, Form.SQUARE])
def test_the_longer_product_is_that_of_the_references_values(form: Form) -> None:
    tiles = torch.tensor([2, 0], device=DEVICE)
    x_operand, w_operand = Operand(macro=STATIC, fallback=FLAGGED), Operand(macro=FOLDED)
    x, w = matrix(20, 384), matrix(48, 384, seed=1)
    full, own = room_for_tiles(48, 384, form, 2, w.device)
    if form is Form.TILE:
        quantise_with_residual(w, w_operand, out=own)
    else:
        both = quantise_weight(w, w_operand)
        own.data.copy_(both.forward.data)
        own.scale.copy_(both.forward.scale)
    repeat_tiles(full, tiles)
    got = quantise_with_residual(x, x_operand, tiles).dequantise(torch.float64) @ full.dequantise(torch.float64).t()
    x_q = fake_quantise(x, x_operand, frozen=Frozen(tiles=tiles)).double()
    torch.testing.assert_close(got, x_q @ fake_quantise(w, w_operand).double().t(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", ["ceil", "even"])
def test_folded_factors_lie_in_the_bytes_of_a_weight_and_of_its_transpose(rule: str) -> None:
    w, operand = matrix(160, 336, dtype=torch.float32), Operand(macro=FOLDED, scale_rule=rule)
    both, wanted = quantise_weight(w, operand), fake_quantise(w, operand)
    assert len(quantise(w, operand).macro.unique()) == 3
    assert_same(both.forward.dequantise(), wanted)
    assert_same(both.transposed.dequantise(), wanted.t())


def test_other_macro_factors_of_a_weight_have_no_bytes_that_the_transpose_shares() -> None:
    with pytest.raises(UnsupportedOperandError, match="differ along N"):
        quantise_weight(matrix(32, 128), Operand(macro=SEARCHED))


def test_a_nonfinite_value_is_named() -> None:
    x = matrix(33, 256)
    x[3, 70] = torch.nan
    with pytest.raises(ValueError, match=r"hidden .* at position \(3, 70\)"):
        quantise_with_residual(x, Operand(macro=STATIC), name="hidden")
