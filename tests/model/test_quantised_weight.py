"""How much is quantised in one call: it changes the memory taken, never the bits."""

import pytest
import torch
from torch import nn

from mxdist.model import quantised_weight
from mxdist.model.quantised_weight import QuantisedWeight, requantise
from mxdist.quant.backend import QuantisedWeights
from mxdist.quant.recipe import get_recipe


class Linear(QuantisedWeight, nn.Linear):
    recipe = get_recipe("mxfp4_mbs_of")


def model() -> nn.ModuleList:
    generator = torch.Generator().manual_seed(0)
    linears = nn.ModuleList(Linear(128, rows, bias=False) for rows in (3, 5, 40, 2, 2))
    for linear in linears:
        nn.init.normal_(linear.weight, generator=generator)
    return linears


@pytest.mark.parametrize("together", [1, 128 * 8, 2**26])
def test_weights_are_the_same_however_many_are_quantised_in_a_call(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = model(), []
    requantise(whole)
    quantise = quantised_weight.quantise_weights

    def counted(weights: torch.Tensor, *about: object, **options: object) -> QuantisedWeights:
        calls.append(len(weights))
        return quantise(weights, *about, **options)

    monkeypatch.setattr(quantised_weight, "TOGETHER", together)
    monkeypatch.setattr(quantised_weight, "quantise_weights", counted)
    parts = model()
    requantise(parts)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.quantised_values(), other.quantised_values())
        assert all(torch.equal(one.quantised().parts()[key], part) for key, part in other.quantised().parts().items())
    assert calls == ([3, 5, 40, 2, 2] if together == 1 else [3, 5, 40, 4])


def test_a_weight_that_is_not_finite_is_named_and_the_model_refuses_to_compute() -> None:
    linears = model()
    requantise(linears)
    for index, linear in enumerate(linears):
        linear.name = f"layers.{index}"
    with torch.no_grad():
        linears[4].weight[1, 7] = float("nan")
    with pytest.raises(ValueError, match=r"the weight of layers\.4 .*holds nan at position \(1, 7\)"):
        requantise(linears)
    with pytest.raises(RuntimeError, match="stale"):
        linears[0].quantised_values()
