"""FP8 GEMMs of MXFP4 operands equal float64 products of the dequantised operands up to rounding the output."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant.kernels.forms import Form, Fp8Matrix
from mxdist.quant.kernels.gemm import accumulate, matmul, right
from mxdist.quant.kernels.quant_rows import quantise_rows
from mxdist.quant.kernels.quant_tiles import quantise_tiles
from mxdist.quant.kernels.quant_weight import quantise_weight
from mxdist.quant.recipe import Operand
from tests.quant.kernels.data import kind_of

PAIRS = [(Form.ROW, Form.ROW), (Form.TILE, Form.SQUARE), (Form.SQUARE, Form.TILE), (Form.TILE, Form.TILE)]
OPERAND = Operand()


def in_form(x: torch.Tensor, form: Form) -> Fp8Matrix:
    if form is Form.ROW:
        return quantise_rows(x, OPERAND)
    if form is Form.SQUARE:
        return quantise_weight(x, OPERAND).forward
    return quantise_tiles(x, OPERAND)[0]


def exact(a: Fp8Matrix, b: Fp8Matrix) -> torch.Tensor:
    return a.dequantise(torch.float64) @ b.dequantise(torch.float64).t()


@pytest.mark.parametrize("kind", ["gaussian", "outliers", "positive"])
@pytest.mark.parametrize("k", [768, 2048, 11008])
@pytest.mark.parametrize(("form_a", "form_b"), PAIRS)
def test_the_error_is_that_of_rounding_the_output(form_a: Form, form_b: Form, k: int, kind: str) -> None:
    a, b = in_form(kind_of(kind, 256, k), form_a), in_form(kind_of(kind, 384, k, seed=1), form_b)
    wanted = exact(a, b)
    rounding = (wanted.bfloat16().double() - wanted).norm()
    assert (matmul(a, b).double() - wanted).norm() <= 1.05 * rounding
    # With outliers a 32-product's small terms fall below the tensor core's 14 bits.
    kept = 0.15 if kind == "outliers" else 0.01
    assert (matmul(a, b, torch.float32).double() - wanted).norm() <= kept * rounding
    if kind == "positive":
        assert abs((matmul(a, b, torch.float32).double() - wanted).mean() / wanted.mean()) < 1e-6  # no truncation bias


@pytest.mark.parametrize("rows", [1, 3, 17, 130])
@pytest.mark.parametrize(("form_a", "form_b"), [(Form.ROW, Form.ROW), (Form.TILE, Form.SQUARE)])
def test_any_number_of_tokens_works(rows: int, form_a: Form, form_b: Form) -> None:
    a, b = in_form(kind_of("gaussian", rows, 640), form_a), in_form(kind_of("gaussian", 256, 640, seed=1), form_b)
    torch.testing.assert_close(matmul(a, b, torch.float32).double(), exact(a, b), rtol=1e-5, atol=1e-3)


def test_no_tokens_give_no_rows() -> None:
    a, b = quantise_rows(kind_of("gaussian", 1, 128)[:0], OPERAND), quantise_rows(kind_of("gaussian", 16, 128), OPERAND)
    assert matmul(a, b).shape == (0, 16)


def test_rotated_operands_multiply_to_the_product_of_the_originals() -> None:
    operand = Operand(hadamard="plain")
    x, dy = kind_of("outliers", 512, 256), kind_of("gaussian", 512, 128, seed=1)
    x_t = quantise_tiles(x, column=operand, column_form=Form.SQUARE)[1]
    dy_t = quantise_tiles(dy, column=operand)[1]
    product = matmul(dy_t, x_t, torch.float32)
    wanted = dy.double().t() @ x.double()
    assert (product - wanted).norm() < 0.25 * wanted.norm()  # quantisation noise only
    rotated = 32 * exact(dy_t, x_t)
    assert (product.double() - rotated).norm() <= 3e-4 * rotated.norm()


def test_micro_batches_add_up_in_float32() -> None:
    total = torch.zeros(128, 256, device="cuda")
    parts = []
    for seed in (0, 1):
        dy_t = quantise_tiles(kind_of("gaussian", 300, 128, seed), column=OPERAND)[1]
        x_t = quantise_tiles(kind_of("gaussian", 300, 256, seed + 9), column=OPERAND, column_form=Form.SQUARE)[1]
        accumulate(total, dy_t, right(x_t))
        parts.append(exact(dy_t, x_t))
    torch.testing.assert_close(total.double(), sum(parts), rtol=1e-5, atol=1e-3)


def test_operands_that_do_not_go_together_are_refused() -> None:
    a, b = kind_of("gaussian", 128, 128), kind_of("gaussian", 128, 256)
    with pytest.raises(ValueError, match="share a contraction axis"):
        matmul(quantise_rows(a, OPERAND), quantise_rows(b, OPERAND))
    with pytest.raises(ValueError, match="no FP8 GEMM of a row operand with a tile"):
        matmul(quantise_rows(a, OPERAND), quantise_tiles(a, OPERAND)[0])
