"""The Hopper linear computes the reference's function; where the kernels cannot run, the reference does.

On a CPU the quantisers are interpreted, and the products are float32's of the same bytes.
"""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant import linear as reference
from mxdist.quant.fallback import choose_tiles, tile_maxima
from mxdist.quant.kernels.linear import kernel_linear, mx_linear, prepare_weight, weight_operands
from mxdist.quant.kernels.plan import Gemm, plan
from mxdist.quant.recipe import Fallback, Macro, Operand, Recipe, get_recipe
from mxdist.quant.reference import fake_quantise
from mxdist.quant.transform import Frozen
from tests.quant.kernels.data import DEVICE, matrix

NEAREST = {"dy_dgrad": Operand(macro=Macro()), "x_wgrad": Operand(), "dy_wgrad": Operand()}
FLAGGED, FOLDED = Operand(macro=Macro(), fallback=Fallback(fraction=0.3)), Operand(macro=Macro(method="folded"))
RECIPES = [
    *(get_recipe(name) for name in ("mxfp4", "mxfp4_g4", "mxfp4_mbs", "mxfp4_mbs_of", "mxfp4_mbs_of_g4")),
    Recipe("folded and listed", x_fwd=FLAGGED, w=FOLDED, **NEAREST),
    Recipe("folded and listed, paper's mode", x_fwd=FLAGGED, w=FOLDED),
    Recipe("searched and listed", x_fwd=FLAGGED, w=Operand(macro=Macro(method="search", bits=4)), **NEAREST),
]


@pytest.mark.parametrize("as_values", [False, True], ids=["prepared", "from values"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_output_and_gradients_are_the_references(recipe: Recipe, as_values: bool) -> None:
    x, w = matrix(32, 384, dtype=torch.float32), matrix(128, 384, seed=1, dtype=torch.float32)
    dy, bias = matrix(32, 128, seed=2, dtype=torch.float32), torch.ones(128, device=DEVICE)
    listed = recipe.x_fwd is not None and recipe.x_fwd.fallback is not None and recipe.x_fwd.fallback.fraction
    frozen = Frozen(tiles=choose_tiles(tile_maxima(x), listed)) if listed else Frozen()
    choice = plan(recipe, 128, 384, bool(listed))
    assert choice.forward.gemm is not Gemm.REFERENCE
    values = fake_quantise(w, recipe.w)
    weight_q = values if as_values else weight_operands(w, recipe, choice, frozen, "weight", "error")

    def run(linear: object, weight_q: object, *rest: object, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, w, bias)]
        y = linear(leaves[0], leaves[1], weight_q, recipe, leaves[2], *rest, seed=3, frozen=frozen)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    ours = run(kernel_linear, weight_q, choice, dtype=torch.float32)
    theirs = run(reference.reference_linear, values.double(), dtype=torch.float64)
    near = 3e-4 if DEVICE.type == "cuda" else 1e-6  # a tensor core's products lose terms below 14 bits
    for name, got, wanted in zip(("y", "dx", "dw", "db"), ours, theirs, strict=True):
        assert (got.double() - wanted).norm() <= near * wanted.norm(), name


def test_the_public_linear_uses_the_reference_where_there_is_no_hopper_gpu() -> None:
    x, w, recipe = torch.randn(3000, 64), torch.randn(32, 64, requires_grad=True), get_recipe("mxfp4")
    w_q = fake_quantise(w, recipe.w)
    assert torch.equal(reference.mx_linear(x, w, w_q, recipe), reference.reference_linear(x, w, w_q, recipe))


def test_without_fp8_tensor_cores_the_reference_runs_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    x, w, recipe = torch.randn(4, 64), torch.randn(32, 64), get_recipe("mxfp4")
    w_q = prepare_weight(w, recipe)
    assert isinstance(w_q, torch.Tensor)
    with caplog.at_level(logging.WARNING):
        results = [mx_linear(x, w, w_q, recipe, name="layers.0.mlp") for _ in range(2)]
    assert torch.equal(results[0], reference.mx_linear(x, w, w_q, recipe))
    assert [record.message for record in caplog.records] == [
        "layers.0.mlp runs on the reference backend: a cpu device has no FP8 tensor cores"
    ]


def test_a_recipe_that_quantises_nothing_is_a_plain_linear() -> None:
    x, w = torch.randn(4, 64), torch.randn(32, 64)
    assert torch.equal(mx_linear(x, w, None, get_recipe("bf16")), torch.nn.functional.linear(x, w))
