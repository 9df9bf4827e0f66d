"""GEMMs on packed MXFP4 equal float64 products of the oracle's values; the NVFP4 form holds the same numbers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant.format import e2m1_decode_packed
from mxdist.quant.kernels.dot_scaled import matmul, operand_of
from mxdist.quant.recipe import Fallback, Macro, Operand
from mxdist.quant.reference import quantise
from tests.quant.kernels.data import DEVICE, matrix

PLAIN, FOLDED = Operand(), Operand(macro=Macro(method="folded"), scale_rule="even")


@pytest.mark.parametrize("operand", [PLAIN, FOLDED], ids=["mxfp4", "nvfp4"])
def test_products_are_those_of_the_oracles_values(operand: Operand) -> None:
    if operand is FOLDED and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("Triton 3.6 compiles NVFP4 products for Blackwell only")
    a, b = quantise(matrix(70, 256), operand), quantise(matrix(40, 256, seed=1), operand)
    wanted = a.dequantise().double() @ b.dequantise().double().t()
    got = matmul(operand_of(a), operand_of(b), torch.float32)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)


def test_folded_factors_are_exact_in_the_scales_of_nvfp4() -> None:
    mx = quantise(matrix(64, 512, spread=1.0), FOLDED)
    packed = operand_of(mx)
    assert packed.factor is not None
    assert mx.macro is not None
    assert len(mx.macro.unique()) == 3
    scales = packed.scales.float().repeat_interleave(16, 1) * packed.factor[:, None]
    assert torch.equal(e2m1_decode_packed(packed.codes) * scales, mx.dequantise())


def test_operands_that_no_fp4_form_holds_are_refused() -> None:
    x = matrix(4, 256)
    for operand in (Operand(fallback=Fallback()), Operand(macro=Macro()), Operand(block=16)):
        with pytest.raises(ValueError, match="FP4"):
            operand_of(quantise(x, operand))
    with pytest.raises(ValueError, match="different forms"):
        matmul(operand_of(quantise(x, PLAIN)), operand_of(quantise(x, FOLDED)))


def test_no_rows_give_no_rows() -> None:
    a, b = quantise(matrix(4, 128), PLAIN), quantise(matrix(16, 128), PLAIN)
    assert matmul(operand_of(a[:0]), operand_of(b)).shape == (0, 16)
