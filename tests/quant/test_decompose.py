"""The three-way decomposition: exact in float64, the published Gaussian figures, and the streaming sums."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxdist.quant.decompose import Components, components, ideal_values, measure
from mxdist.quant.format import E2M1_VALUES
from mxdist.quant.moments import Moments
from mxdist.quant.recipe import Fallback, Macro, Operand, ScaleRule
from mxdist.quant.reference import fake_quantise
from mxdist.quant.transform import Frozen
from tests.quant.distributions import sample
from tests.quant.strategies import operands, tensors


def energy(part: Tensor) -> float:
    return part.square().sum().item()


def shares(parts: Components) -> tuple[float, float, float, float]:
    total, cross = energy(parts.error), (parts.scale * parts.grid).sum().item()
    scale, deadzone, grid = (energy(p) for p in (parts.scale, parts.deadzone, parts.grid))
    return scale / total, deadzone / total, grid / total, cross / math.sqrt(scale * grid)


@settings(max_examples=100)
@given(tensors(), operands())
def test_the_three_parts_add_to_the_error_bit_for_bit(x: Tensor, operand: Operand) -> None:
    parts = components(x, operand)
    assert torch.equal(parts.error, fake_quantise(x, operand).double() - x.double())
    assert torch.equal(parts.scale + parts.deadzone + parts.grid, parts.error)


@given(tensors(), operands())
def test_deadzone_and_grid_never_meet_and_do_not_depend_on_the_quantiser(x: Tensor, operand: Operand) -> None:
    parts = components(x, operand)
    assert not ((parts.deadzone != 0) & (parts.grid != 0)).any()
    plain = components(x, Operand(block=operand.block))
    assert torch.equal(parts.deadzone, plain.deadzone)
    assert torch.equal(parts.grid, plain.grid)


@given(tensors(), st.sampled_from((16, 32)))
def test_under_the_ceil_rule_the_scale_error_vanishes_in_the_deadzone(x: Tensor, block: int) -> None:
    parts = components(x, Operand(block=block))
    assert not ((parts.deadzone != 0) & (parts.scale != 0)).any()


@pytest.mark.parametrize("method", ["static", "search", "folded"])
def test_a_macro_factor_under_the_ceil_rule_keeps_the_scale_error_out_of_the_deadzone(method: str) -> None:
    """s >= f m / 6 still, so the step s / f that x sees is no finer than the ideal one."""
    x = sample("gaussian")[:256]
    parts = components(x, Operand(macro=Macro(method=method, bits=4)))
    assert not ((parts.deadzone != 0) & (parts.scale != 0)).any()


@pytest.mark.parametrize("operand", [Operand(fallback=Fallback()), Operand(hadamard="plain")])
def test_fallback_and_rotation_rescue_elements_of_the_deadzone(operand: Operand) -> None:
    x = sample("gaussian")[:256]
    rescued = measure(x, operand)
    assert rescued.zeroed < 0.5 * rescued.dead
    assert rescued.report()["cross_scale_deadzone"] < -0.02


@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.EVEN, ScaleRule.BEST])
def test_under_other_rules_the_scale_error_meets_the_deadzone_and_the_cross_term_is_reported(rule: ScaleRule) -> None:
    x = sample("gaussian")[:64]
    parts = components(x, Operand(scale_rule=rule))
    cross = (parts.scale * parts.deadzone).sum().item()
    assert cross < -1e-3 * energy(parts.error)
    report = measure(x, Operand(scale_rule=rule)).report()
    assert report["cross_scale_deadzone"] == pytest.approx(2 * cross / energy(parts.error), rel=1e-3)
    assert report["closure"] == pytest.approx(1, abs=1e-5)
    without = report["closure"] - report["cross_scale_deadzone"]
    assert without > 1.001  # hiding the term would leave the sum open


@given(tensors(max_k=200))
def test_the_ideal_quantiser_is_e2m1_with_a_sixth_of_the_block_maximum_as_scale(x: Tensor) -> None:
    ideal = ideal_values(x, 32)
    grid = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    for values, quantised in zip(x.double().split(32, -1), ideal.split(32, -1), strict=True):
        unit = values.abs().amax(-1, keepdim=True) / 6
        candidates = (grid * unit.unsqueeze(-1)).float()
        nearest = (values.abs().unsqueeze(-1) - grid * unit.unsqueeze(-1)).abs().amin(-1)
        assert ((quantised.abs().unsqueeze(-1) == candidates).any(-1)).all()
        error = (quantised.double().abs() - values.abs()).abs()
        assert (error <= nearest + quantised.double().abs() * 2.0**-23 + 2.0**-149).all()


EXPECTED = {
    "gaussian": (1.774, 0.021, 0.746, -0.670),
    "laplace": (1.575, 0.051, 0.551, -0.632),
    "student-t5": (1.564, 0.048, 0.538, -0.627),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_shares_of_the_error_match_the_published_row(name: str) -> None:
    scale, deadzone, grid, cosine = EXPECTED[name]
    report = measure(sample(name), Operand()).report()
    tolerance = 0.01 if name == "gaussian" else 0.02  # heavier tails are noisier; the deadzone's share has two digits
    assert report["scale"] == pytest.approx(scale, rel=tolerance)
    assert report["deadzone"] == pytest.approx(deadzone, abs=0.0006 if name == "gaussian" else 0.0015)
    assert report["grid"] == pytest.approx(grid, rel=tolerance)
    assert report["cos_scale_grid"] == pytest.approx(cosine, rel=tolerance)
    assert report["cross_scale_deadzone"] == 0.0
    assert report["closure"] == pytest.approx(1, abs=1e-5)


def test_gaussian_gain_zeros_and_gamma_match_the_published_figures() -> None:
    report = measure(sample("gaussian"), Operand()).report()
    assert report["gain"] == pytest.approx(0.990, abs=0.0006)
    assert report["zeroed"] == pytest.approx(0.107, rel=0.01)
    assert report["dead"] == pytest.approx(0.078, rel=0.01)
    assert report["delta"] == pytest.approx(0.453, rel=0.01)
    assert report["delta_std"] == pytest.approx(0.252, rel=0.01)
    assert report["saturated"] == 0.0
    floor = measure(sample("gaussian"), Operand(scale_rule="floor")).report()
    assert floor["gain"] == pytest.approx(0.980, abs=0.001)
    assert 0.2 < floor["saturated"] < 0.6


@given(tensors(), operands())
def test_streaming_sums_agree_with_the_exact_parts(x: Tensor, operand: Operand) -> None:
    x = torch.where(x.abs() < 2.0**-120, 0.0, x)  # below, rounding Q* to a subnormal float32 is itself an error
    exact, sums = components(x, operand), measure(x, operand)
    assert sums.elements == x.numel()
    total = energy(exact.error)
    # Decisions within a float32 rounding of a tie may fall the other way: allow a small share of the largest part,
    # and float32 roundings of ||x|| beside it.
    part, whole = max(total, energy(exact.scale), energy(exact.grid)), energy(x.double())
    slack = 1e-4 * part + 1e-6 * math.sqrt(part * whole) + 1e-12 * whole
    assert sums.energy == pytest.approx(energy(x.double()), rel=1e-5, abs=1e-300)
    assert sums.error == pytest.approx(total, rel=1e-4, abs=slack)
    assert sums.scale == pytest.approx(energy(exact.scale), rel=1e-3, abs=slack)
    assert sums.deadzone == pytest.approx(energy(exact.deadzone), rel=1e-3, abs=slack)
    assert sums.grid == pytest.approx(energy(exact.grid), rel=1e-3, abs=slack)
    assert sums.scale_grid == pytest.approx((exact.scale * exact.grid).sum().item(), rel=1e-3, abs=slack)
    values = fake_quantise(x, operand)
    assert sums.zeroed == int(((values == 0) & (x != 0)).sum())


def test_zeros_of_the_tensor_itself_count_neither_as_dead_nor_as_zeroed() -> None:
    x = sample("gaussian")[:64].clone()
    x[:, ::7] = 0.0
    sums, exact = measure(x, Operand()), components(x, Operand())
    assert sums.dead == (exact.deadzone != 0).sum()
    assert sums.zeroed == ((fake_quantise(x, Operand()) == 0) & (x != 0)).sum()
    assert 0 < sums.dead < sums.zeroed


@pytest.mark.parametrize(
    ("operand", "arguments"),
    [
        (Operand(hadamard="plain"), {}),
        (Operand(rounding="stochastic"), {"seed": 5}),
        (Operand(mean=True), {"frozen": Frozen(mean=torch.ones(96))}),
    ],
)
def test_gradients_and_transformed_operands_are_measured_too(operand: Operand, arguments: dict) -> None:
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) + 1
    exact, report = components(x, operand, **arguments), measure(x, operand, **arguments).report()
    total = energy(exact.error)
    assert report["nmse"] == pytest.approx(total / energy(x.double()), rel=1e-4)
    assert report["grid"] == pytest.approx(energy(exact.grid) / total, rel=1e-4)
    assert report["closure"] == pytest.approx(1, abs=1e-4)


def test_sums_add_over_pieces_and_threads_and_survive_json() -> None:
    x = sample("laplace")
    whole = measure(x, Operand(macro=Macro(), fallback=Fallback()))
    threaded = measure(x, Operand(macro=Macro(), fallback=Fallback()), workers=2)
    assert threaded == whole
    halves = measure(x[:300], Operand()) + measure(x[300:], Operand())
    together = measure(x, Operand())
    assert halves.zeroed == together.zeroed
    assert halves.histogram == together.histogram
    assert halves.error == pytest.approx(together.error, rel=1e-6)
    assert Moments(**json.loads(json.dumps(whole.to_dict()))) == whole


def test_scaling_a_tensor_by_an_extreme_power_of_two_changes_no_ratio() -> None:
    x = sample("gaussian")[:32]
    expected = measure(x, Operand()).report()
    for exponent in (-115, -60, 60, 118):
        report = measure(x * 2.0**exponent, Operand()).report()
        for key, value in expected.items():
            assert report[key] == pytest.approx(value, rel=1e-6), key


def test_block_norms_are_those_of_the_blocks() -> None:
    x = sample("gaussian")[:3, :70]
    parts = components(x, Operand())
    norms = parts.block_norms(32)
    assert norms["error"].shape == (3, 3)
    assert norms["grid"][1, 2].item() == pytest.approx(parts.grid[1, 64:].norm().item())
    assert (norms["error"].square().sum() - energy(parts.error)) == pytest.approx(0, abs=1e-12)


def test_empty_and_zero_tensors_have_reports_of_nan_not_errors() -> None:
    assert measure(torch.zeros(0, 64), Operand()) == Moments()
    report = measure(torch.zeros(4, 64), Operand()).report()
    assert math.isnan(report["nmse"])
    assert report["zeroed"] == 0.0
    with pytest.raises(ValueError, match=r"w of shape \(1, 32\) holds nan"):
        measure(torch.full((1, 32), torch.nan), Operand(), name="w")
