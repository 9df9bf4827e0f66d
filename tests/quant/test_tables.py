"""Normalised squared errors of every rule and correction, against independently computed tables, within 1 %."""

import pytest
import torch

from mxdist.quant.recipe import Fallback, Macro, Operand
from mxdist.quant.reference import fake_quantise
from tests.quant.distributions import nmse, nmse_of_ceil, sample

NAMES = ("gaussian", "laplace", "student-t5")
SEARCH = Macro(method="search", bits=4)
FOLDED = Macro(method="folded")


@pytest.mark.parametrize(("name", "expected"), zip(NAMES, (1.335e-2, 1.743e-2, 1.772e-2), strict=True))
def test_plain_mxfp4_has_the_published_error(name: str, expected: float) -> None:
    assert nmse_of_ceil(name) == pytest.approx(expected, rel=0.01)


TABLE = {
    "floor": (Operand(scale_rule="floor"), (0.992, 0.921, 0.897)),
    "even": (Operand(scale_rule="even"), (0.938, 0.880, 0.867)),
    "best of ceil and half": (Operand(scale_rule="best"), (0.933, 0.864, 0.847)),
    "static 128": (Operand(macro=Macro()), (0.889, 0.789, 0.756)),
    "static 128, even": (Operand(macro=Macro(), scale_rule="even"), (0.882, 0.761, 0.726)),
    "static 64, even": (Operand(macro=Macro(64), scale_rule="even"), (0.835, 0.693, 0.662)),
    "searched 16": (Operand(macro=SEARCH), (0.819, 0.757, 0.726)),
    "searched 16, even": (Operand(macro=SEARCH, scale_rule="even"), (0.757, 0.661, 0.638)),
    "folded": (Operand(macro=FOLDED), (0.902, 0.860, 0.843)),
    "folded, even": (Operand(macro=FOLDED, scale_rule="even"), (0.828, 0.734, 0.716)),
    "fallback .25": (Operand(fallback=Fallback(0.25)), (0.561, 0.561, 0.561)),
    "fallback .5": (Operand(fallback=Fallback(0.5)), (0.250, 0.250, 0.250)),
    "fallback .75": (Operand(fallback=Fallback(0.75)), (0.068, 0.068, 0.068)),
}


@pytest.mark.parametrize("row", TABLE)
def test_errors_relative_to_plain_mxfp4_match_the_tables(row: str) -> None:
    operand, expected = TABLE[row]
    for name, value in zip(NAMES, expected, strict=True):
        assert nmse(sample(name), operand) / nmse_of_ceil(name) == pytest.approx(value, rel=0.01), name


@pytest.mark.parametrize(
    ("operand", "expected"),
    [
        (Operand(fallback=Fallback(1.0)), 1.96e-4),
        (Operand(macro=Macro(), fallback=Fallback(0.0)), 1.187e-2),
        (Operand(macro=Macro(), fallback=Fallback(0.5)), 2.97e-3),
        (Operand(macro=Macro(), fallback=Fallback(1.0)), 1.81e-4),
        (Operand(rounding="stochastic"), 2.71e-2),
    ],
)
def test_absolute_errors_on_gaussians_match_the_tables(operand: Operand, expected: float) -> None:
    assert nmse(sample("gaussian"), operand) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_the_residual_error_of_the_fallback_is_one_minus_alpha_squared_nearly(name: str) -> None:
    """e = (1 - alpha) e1 + alpha e2, so alpha = 1 is the least squared error: no minimum at 0.5."""
    errors = [nmse(sample(name), Operand(fallback=Fallback(alpha))) for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[4] / errors[0] == pytest.approx(0.0148, rel=0.02)


def test_the_fallback_concatenated_along_k_is_one_ordinary_mxfp4_product() -> None:
    """0.5 Q(x - Q(x)) is itself MXFP4 with every exponent one lower: [x1 | x2 / 2] [W ; W] is the fallback's GEMM."""
    x, w = sample("gaussian")[:64, :512], fake_quantise(sample("gaussian")[64:96, :512], Operand())
    x1 = fake_quantise(x, Operand())
    x2 = fake_quantise(x - x1, Operand())
    halved = 0.5 * x2
    assert torch.equal(fake_quantise(halved, Operand()), halved)
    joined = torch.cat((x1, halved), 1).double() @ torch.cat((w, w), 1).double().T
    assert torch.allclose(joined, fake_quantise(x, Operand(fallback=Fallback(0.5))).double() @ w.double().T, atol=1e-12)


def test_zeros_fall_from_a_tenth_to_a_hundredth_with_the_fallback() -> None:
    x = sample("gaussian")
    zeroed = [(fake_quantise(x, Operand(fallback=fallback)) == 0).float().mean() for fallback in (None, Fallback())]
    assert zeroed[0] == pytest.approx(0.107, rel=0.01)
    assert zeroed[1] == pytest.approx(0.015, rel=0.04)  # the table has two digits
