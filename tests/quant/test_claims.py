"""Published statements that do not hold as stated; NUMERICS.md 8 refers to these tests by name."""

import math

import pytest
import torch

from mxdist.quant.decompose import components, measure
from mxdist.quant.format import e8m0_decode
from mxdist.quant.moments import Moments
from mxdist.quant.recipe import Fallback, Macro, Operand
from mxdist.quant.reference import fake_quantise, quantise
from tests.quant.distributions import nmse, nmse_of_ceil, sample

ENERGIES = ("energy", "product", "error", "scale", "deadzone", "grid", "scale_grid", "scale_deadzone")


def test_the_step_grows_by_1_4_but_the_reconstruction_shrinks_by_a_hundredth() -> None:
    """gamma is a ratio of step sizes. It says nothing about the magnitude of Q(x), hence of a gradient through it."""
    report = measure(sample("gaussian"), Operand()).report()
    assert report["gamma"] > 1.3
    assert 0.985 < report["gain"] < 0.995
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(64, 512, generator=generator)
    exact = quantised = vector
    for _ in range(12):  # a deep product of random linears: amplification by gamma would be 1.39^12 = 52
        weight = torch.randn(512, 512, generator=generator) / math.sqrt(512)
        exact, quantised = exact @ weight, quantised @ fake_quantise(weight, Operand())
    assert quantised.norm() / exact.norm() == pytest.approx(1, abs=0.1)


def test_delta_is_not_uniform_within_one_tensor_and_the_gaussian_row_moves_with_sigma() -> None:
    """The maximum of 32 Gaussians is concentrated, so delta depends on where sigma lies between powers of two."""
    x = sample("gaussian")[:256]
    rows = {sigma: measure(x * sigma, Operand()).report() for sigma in (1.0, 1.3, 1.54, 1.834)}
    assert [rows[sigma]["delta"] for sigma in rows] == pytest.approx([0.453, 0.497, 0.574, 0.506], abs=0.01)
    assert rows[1.834]["scale"] - rows[1.3]["scale"] > 0.08
    assert rows[1.3]["nmse"] / rows[1.834]["nmse"] > 1.05
    assert rows[1.0]["delta_std"] < 0.26 < math.sqrt(1 / 12)


def test_averaged_over_scales_delta_is_uniform_and_gamma_is_one_over_ln_2() -> None:
    """What holds for a model's layers together: log2 of their scales is spread, so delta is uniform on [0, 1)."""
    x = sample("gaussian")[:64]
    total = Moments()
    for step in range(32):
        sigma = 2.0 ** (step / 32)
        moments = measure(x * sigma, Operand())
        for name in ENERGIES:  # weigh every scale alike
            setattr(moments, name, getattr(moments, name) / sigma**2)
        total += moments
    report = total.report()
    assert report["delta"] == pytest.approx(0.5, abs=0.01)
    assert report["delta_std"] == pytest.approx(math.sqrt(1 / 12), rel=0.01)
    assert report["gamma"] == pytest.approx(1 / math.log(2), rel=0.01)
    # 1.737 / 0.020 / 0.727 / -0.660: nearer to the published Qwen2.5-3B row than sigma = 1 is.
    assert report["scale"] == pytest.approx(1.737, rel=0.01)
    assert report["cos_scale_grid"] == pytest.approx(-0.660, rel=0.01)


def test_ideal_scales_are_no_lower_bound_of_the_error() -> None:
    x = sample("gaussian")
    searched = Operand(scale_rule="even", macro=Macro(method="search", bits=4))
    parts = components(x, searched)
    ideal = (parts.deadzone.square().sum() + parts.grid.square().sum()).item() / x.double().square().sum().item()
    assert ideal == pytest.approx(0.01025, rel=0.01)
    assert nmse(x, searched) == pytest.approx(0.01011, rel=0.01)
    assert nmse(x, searched) < 0.995 * ideal


def test_a_static_macro_factor_closes_half_of_the_gap_to_ideal_scales_not_all_of_it() -> None:
    x = sample("gaussian")
    parts = components(x[:256], Operand())
    floor = ((parts.deadzone + parts.grid).square().sum() / x[:256].double().square().sum()).item()
    static = nmse(x, Operand(macro=Macro()))
    closed = (nmse_of_ceil("gaussian") - static) / (nmse_of_ceil("gaussian") - floor)
    assert closed == pytest.approx(0.48, abs=0.02)


def test_a_static_macro_factor_pins_only_the_block_that_holds_the_maximum() -> None:
    """Its delta is at most log2(1 + 1/256); the other three keep a spread as wide as before."""
    x = sample("gaussian")[:256].view(-1, 128)
    packed = quantise(x, Operand(macro=Macro()))
    assert packed.macro is not None
    step = e8m0_decode(packed.scales) / (1 + packed.macro / 256)
    absmax = x.view(-1, 4, 32).abs().amax(-1)
    delta = (step / (absmax / 6)).double().log2()
    holds_maximum = absmax == absmax.amax(-1, keepdim=True)
    assert delta[holds_maximum].max() <= math.log2(1 + 1 / 256)
    assert delta[holds_maximum].min() >= -1e-6
    before = measure(x, Operand()).report()["delta_std"]
    assert delta[~holds_maximum].std() > 0.9 * before
    assert delta.std() == pytest.approx(0.257, rel=0.02)
    assert delta.mean() == pytest.approx(0.274, rel=0.02)


def test_alpha_one_half_is_no_optimum_of_the_squared_error() -> None:
    x = sample("gaussian")[:128]
    w = sample("laplace")[:64]
    errors = []
    for alpha in (0.25, 0.5, 0.75, 1.0):
        operand = Operand(fallback=Fallback(alpha))
        product = fake_quantise(x, operand) @ fake_quantise(w, operand).T
        errors.append((product - x @ w.T).square().sum().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < errors[1] / 10


def test_the_full_fallback_is_an_8_bit_format_that_beats_fp8() -> None:
    x = sample("gaussian")
    operand = Operand(fallback=Fallback(1.0))
    assert 8 * quantise(x[:4], operand).nbytes / x[:4].numel() == 8.5
    tiles = x.view(-1, 128)
    unit = tiles.abs().amax(-1, keepdim=True) / 448
    fp8 = (tiles / unit).to(torch.float8_e4m3fn).float() * unit
    fp8_nmse = ((fp8 - tiles).double().square().sum() / tiles.double().square().sum()).item()
    assert fp8_nmse == pytest.approx(6.6e-4, rel=0.05)
    assert nmse(x, operand) < fp8_nmse / 3
    assert nmse(x, Operand(fallback=Fallback(0.5))) > 4 * fp8_nmse


@pytest.mark.parametrize(("alpha", "fits_byte"), [(0.5, 0.47), (1.0, 0.70)])
def test_the_sum_of_both_terms_fits_bfloat16_but_not_one_e4m3_byte(alpha: float, fits_byte: float) -> None:
    x = sample("gaussian")[:256]
    values = fake_quantise(x, Operand(fallback=Fallback(alpha)))
    assert (values.bfloat16() == values).float().mean() > 0.999
    codes = quantise(x, Operand()).scales.int().view(-1, 4)
    unit = torch.ldexp(torch.ones(len(codes), 1), codes.amax(-1, keepdim=True) - 6 - 127)
    byte = (values.view(-1, 128) / unit).to(torch.float8_e4m3fn).float() * unit
    assert (byte == values.view(-1, 128)).float().mean() == pytest.approx(fits_byte, abs=0.03)
