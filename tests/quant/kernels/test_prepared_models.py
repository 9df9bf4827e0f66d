"""A model on a device with the kernels: weights are prepared once per step, as what is packed, and refused when stale.

The device is a CPU that says it has FP8 tensor cores; the kernels are interpreted.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.model.quantised_weight import QuantisedWeight, requantise
from mxdist.quant import backend
from mxdist.quant.kernels.plan import Gemm
from mxdist.quant.kernels.prepared import HopperWeight
from mxdist.quant.linear import mx_linear
from mxdist.quant.recipe import get_recipe
from tests.quant.kernels.data import DEVICE, matrix


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "quantisers_lack", lambda _: None)
    monkeypatch.setattr(backend.plan, "device_lacks", lambda _: None)


class Linear(QuantisedWeight, nn.Linear):
    """As the learner's, without a layout."""


def model(recipe: str, *rows: int) -> nn.ModuleList:
    linears = nn.ModuleList(Linear(128, count, bias=False, device=DEVICE, dtype=torch.bfloat16) for count in rows)
    for seed, linear in enumerate(linears):
        linear.weight.data.copy_(matrix(len(linear.weight), 128, seed=seed))
        linear.recipe = get_recipe(recipe)
    return linears


@pytest.mark.parametrize("recipe", ["mxfp4_g4", "mxfp4_mbs", "mxfp4_of"])
def test_products_multiply_the_packed_weight_and_its_values_are_read_from_what_they_multiply(recipe: str) -> None:
    linears = model(recipe, 128, 256, 100)
    requantise(linears)
    x = matrix(3, 128)
    for linear in linears:
        values = linear.quantised().dequantise(torch.bfloat16)
        assert torch.equal(linear.quantised_values(), values)
        y = mx_linear(x, linear.weight, linear.prepared(), linear.recipe, seed=1)
        wanted = mx_linear(x, linear.weight, values, linear.recipe, seed=1)
        assert (y.float() - wanted.float()).norm() <= 1e-2 * wanted.float().norm()  # values round macro factors
    # Bytes, but for two terms, which are multiplied as values.
    assert (linears[0].prepared().forward is None) == (recipe == "mxfp4_of")
    kinds = [type(linear.prepared()) for linear in linears]
    # 100 rows fit no FP8 GEMM; two terms are multiplied as values, by the kernels' linear.
    assert kinds == [HopperWeight, HopperWeight, HopperWeight if recipe == "mxfp4_of" else torch.Tensor]


def test_a_weight_whose_bytes_would_round_is_multiplied_as_values_and_others_are_not() -> None:
    linears = model("mxfp4", 128, 128)
    linears[1].weight.data[7] *= 2.0**-24
    requantise(linears)
    assert [linear.prepared().plan.forward.gemm for linear in linears] == [Gemm.BLOCK, Gemm.BF16]
    for linear in linears:
        assert torch.equal(linear.quantised_values(), linear.quantised().dequantise(torch.bfloat16))


def test_operands_of_a_changed_weight_are_refused() -> None:
    (linear,) = linears = model("mxfp4", 128)
    requantise(linears)
    with torch.no_grad():
        linear.weight.add_(1)
    for read in (linear.prepared, linear.quantised_values, linear.quantised):
        with pytest.raises(RuntimeError, match="requantise"):
            read()
    requantise(linears)
    linear.weight.data.add_(1)  # behind its back: the packed form looks at the bits
    with pytest.raises(RuntimeError, match="requantise"):
        linear.quantised()
