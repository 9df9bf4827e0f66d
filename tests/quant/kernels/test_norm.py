"""RMSNorm fused with the quantiser writes what quantising its float32 result writes, bit for bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant.kernels.quant_norm import quantise_norm
from mxdist.quant.recipe import Macro, Operand
from mxdist.quant.reference import fake_quantise
from tests.quant.kernels.data import DEVICE, matrix
from tests.quant.kernels.test_quantisers import assert_same

OPERANDS = [Operand(), Operand(macro=Macro(), scale_rule="even"), Operand(rounding="stochastic")]


@pytest.mark.parametrize("shape", [(10, 640), (3, 200)])
@pytest.mark.parametrize("operand", OPERANDS, ids=str)
def test_normalised_rows_are_quantised_as_they_are_computed(shape: tuple[int, int], operand: Operand) -> None:
    x, weight = matrix(*shape, spread=1.0), matrix(5, shape[1], seed=1)[0]
    got, inverse = quantise_norm(x, weight, 1e-6, operand, draw=5)
    wanted = torch.rsqrt(x.double().square().mean(1) + 1e-6)
    torch.testing.assert_close(inverse.double(), wanted, rtol=1e-6, atol=0.0)
    produced = x.float() * inverse[:, None] * weight.float()
    assert_same(got.dequantise(), fake_quantise(produced, operand, seed=5))


def test_a_nonfinite_value_is_named_and_no_rows_give_no_rows() -> None:
    x, weight = matrix(4, 256), torch.ones(256, device=DEVICE)
    assert quantise_norm(x[:0], weight, 1e-6, OPERANDS[0])[0].dequantise().shape == (0, 256)
    x[1, 70] = torch.nan
    with pytest.raises(ValueError, match=r"hidden .* at position \(1, 70\)"):
        quantise_norm(x, weight, 1e-6, OPERANDS[0], name="hidden")
