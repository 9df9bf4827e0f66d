"""The Hopper linear computes the reference's function: same quantised operands, products exact to output rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant.backend import prepare_weight
from mxdist.quant.kernels.prepared import HopperWeight
from mxdist.quant.linear import mx_linear, reference_linear
from mxdist.quant.recipe import Macro, Operand, Recipe, get_recipe
from mxdist.quant.reference import fake_quantise, quantise
from tests.quant.kernels.data import kind_of

NEAREST = {"dy_dgrad": Operand(), "x_wgrad": Operand(), "dy_wgrad": Operand()}
MACRO = Operand(macro=Macro())
RECIPES = [
    get_recipe("mxfp4"),
    get_recipe("mxfp4_g4"),
    get_recipe("mxfp4_mbs"),
    get_recipe("mxfp4_mbs_g4"),
    get_recipe("mxfp4_mbs_of"),
    get_recipe("mxfp4_of_g4"),
    Recipe("folded", x_fwd=MACRO, w=Operand(macro=Macro(method="folded")), **NEAREST),
    Recipe("nearest", x_fwd=Operand(), w=Operand(), **NEAREST),
    Recipe("square", x_fwd=Operand(), w=Operand(square=True), **NEAREST),
    Recipe("macro on x and dy", x_fwd=MACRO, w=Operand(), **(NEAREST | {"dy_dgrad": MACRO, "x_wgrad": MACRO})),
]


def run(linear: object, x: Tensor, w: Tensor, w_q: object, recipe: Recipe, dy: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_(), torch.ones(w.shape[0], device="cuda")]
    leaves[2].requires_grad_()
    y = linear(leaves[0], leaves[1], w_q, recipe, leaves[2], seed=3)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("tokens", [256, 37])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_forward_and_gradients_equal_the_references(recipe: Recipe, tokens: int) -> None:
    x, w = kind_of("outliers", tokens, 384).float(), kind_of("gaussian", 256, 384, seed=1).float()
    dy = kind_of("gaussian", tokens, 256, seed=2).float()
    w_q = prepare_weight(w, recipe)
    assert isinstance(w_q, HopperWeight)
    ours = run(mx_linear, x, w, w_q, recipe, dy)
    theirs = run(reference_linear, x.double(), w, fake_quantise(w, recipe.w).double(), recipe, dy)
    for name, got, wanted in zip(("y", "dx", "dw", "db"), ours, theirs, strict=True):
        # Outliers push small terms below the tensor core's 14 bits: a tenth of bfloat16's rounding.
        assert (got.double() - wanted.double()).norm() <= 3e-4 * wanted.double().norm(), name


def test_sizes_without_whole_squares_run_with_row_scales() -> None:
    recipe = get_recipe("mxfp4")
    x, w, dy = (kind_of("gaussian", *shape).float() for shape in ((50, 144), (80, 144), (50, 80)))
    ours = run(mx_linear, x, w, prepare_weight(w, recipe), recipe, dy)
    theirs = run(reference_linear, x.double(), w, fake_quantise(w, recipe.w).double(), recipe, dy)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-4, atol=1e-3)


def test_squares_that_span_more_than_bytes_hold_are_seen_and_multiplied_as_values() -> None:
    w = kind_of("gaussian", 256, 384).float()
    w[3] *= 2.0**-24
    recipe = get_recipe("mxfp4")
    packed = quantise(w, recipe.w)
    w_q = prepare_weight(w, recipe, packed)
    assert isinstance(w_q, HopperWeight)
    assert w_q.rounded(packed, torch.float32)
    w_q = w_q.as_values(packed, torch.float32)
    assert torch.equal(w_q.dequantise(torch.float32), packed.dequantise())
    x, dy = kind_of("gaussian", 64, 384).float(), kind_of("gaussian", 64, 256, seed=2).float()
    ours = run(mx_linear, x, w, w_q, recipe, dy)
    theirs = run(reference_linear, x.double(), w, packed.dequantise().double(), recipe, dy)
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got.double() - wanted.double()).norm() <= 3e-4 * wanted.double().norm()


@pytest.mark.parametrize("recipe", [RECIPES[0], get_recipe("mxfp4_g4_nearest")], ids=str)
def test_leading_axes_and_no_tokens_are_kept(recipe: Recipe) -> None:
    w = kind_of("gaussian", 128, 256)
    w_q = prepare_weight(w, recipe)
    w.requires_grad_()
    assert mx_linear(kind_of("gaussian", 6, 256).view(2, 3, 256), w, w_q, recipe).shape == (2, 3, 128)
    nothing = torch.empty(0, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = mx_linear(nothing, w, w_q, recipe)
    assert y.shape == (0, 128)
    y.sum().backward()
    assert nothing.grad is not None
    assert nothing.grad.shape == (0, 256)
    assert w.grad is not None
    assert not w.grad.any()


def test_a_nan_is_named_or_propagates() -> None:
    recipe, x, w = RECIPES[0], kind_of("gaussian", 8, 256), kind_of("gaussian", 128, 256)
    x[2, 5] = torch.nan
    w_q = prepare_weight(w, recipe)
    with pytest.raises(ValueError, match=r"layer x_fwd .* at position \(2, 5\)"):
        mx_linear(x, w, w_q, recipe, name="layer")
    y = mx_linear(x, w, w_q, recipe, nonfinite="propagate")
    assert y[2].isnan().all()
    assert y[torch.arange(8, device="cuda") != 2].isfinite().all()
