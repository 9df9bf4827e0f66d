"""The Hopper linear computes the reference's function; where the kernels cannot run, the reference does.

On a CPU the quantisers are interpreted, and the products are float32's of the same bytes.
"""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant import backend
from mxdist.quant.fallback import choose_tiles, tile_maxima
from mxdist.quant.kernels import linear as kernels
from mxdist.quant.kernels.gemm import right
from mxdist.quant.kernels.plan import Gemm, plan
from mxdist.quant.kernels.prepared import HopperWeight, prepare_weight, prepare_weights
from mxdist.quant.linear import mx_linear, reference_linear
from mxdist.quant.recipe import Fallback, Macro, Operand, Recipe, get_recipe
from mxdist.quant.reference import fake_quantise, quantise
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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_output_and_gradients_are_the_references(recipe: Recipe) -> None:
    x, w = matrix(32, 384, dtype=torch.float32), matrix(128, 384, seed=1, dtype=torch.float32)
    dy, bias = matrix(32, 128, seed=2, dtype=torch.float32), torch.ones(128, device=DEVICE)
    listed = recipe.x_fwd is not None and recipe.x_fwd.fallback is not None and recipe.x_fwd.fallback.fraction
    frozen = Frozen(tiles=choose_tiles(tile_maxima(x), listed)) if listed else Frozen()
    choice = plan(recipe, 128, 384, bool(listed))
    assert choice.forward.gemm is not Gemm.REFERENCE

    def run(linear: object, weight_q: object, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, w, bias)]
        y = linear(leaves[0], leaves[1], weight_q, recipe, leaves[2], seed=3, frozen=frozen)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    ours = run(mx_linear, prepare_weight(w, recipe, choice, frozen=frozen), torch.float32)
    theirs = run(reference_linear, fake_quantise(w, recipe.w).double(), torch.float64)
    near = 3e-4 if DEVICE.type == "cuda" else 1e-6  # a tensor core's products lose terms below 14 bits
    for name, got, wanted in zip(("y", "dx", "dw", "db"), ours, theirs, strict=True):
        assert (got.double() - wanted).norm() <= near * wanted.norm(), name


@pytest.mark.parametrize("tokens", [6, 32])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp4_g4", "mxfp4_g4_nearest"])
def test_gradients_of_the_weight_add_up_in_a_total(name: str, tokens: int) -> None:
    recipe, w = get_recipe(name), matrix(128, 256, seed=1).requires_grad_()
    x, dy = matrix(tokens, 256).requires_grad_(), matrix(tokens, 128, seed=2)
    weight_q = prepare_weight(w.detach(), recipe, plan(recipe, 128, 256))
    into = torch.ones(128, 256, device=DEVICE)
    own, added = (torch.autograd.grad(
        mx_linear(x, w, weight_q, recipe, seed=3, total=total), (x, w), dy, allow_unused=True
    ) for total in (None, into))  # fmt: skip
    assert torch.equal(own[0], added[0])
    assert added[1] is None
    torch.testing.assert_close((into - 1).to(w.dtype), own[1], rtol=1.6e-2, atol=1e-2)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_operands_hold_the_values_of_the_packed_form(recipe: Recipe) -> None:
    w = matrix(128, 384, seed=1, dtype=torch.float32)
    packed, choice = quantise(w, recipe.w), plan(recipe, 128, 384)
    for prepared in (prepare_weight(w, recipe, choice), prepare_weight(w, recipe, choice, packed)):
        assert torch.equal(prepared.dequantise(torch.float32), packed.dequantise())
        assert not prepared.rounded(packed, torch.float32)
        if prepared.transposed is not None:
            assert torch.equal(prepared.transposed.dequantise().t(), packed.dequantise())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_weights_prepared_together_are_those_prepared_alone(recipe: Recipe) -> None:
    w = torch.cat([matrix(256, 256, seed=seed) for seed in range(2)])
    packed, choice = quantise(w, recipe.w), plan(recipe, 256, 256)
    rounded = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    together = prepare_weights(w, 2, recipe, choice, packed, "weight", rounded)
    assert not rounded.any()
    for index, ours in enumerate(together):
        alone = prepare_weight(w[256 * index :][:256], recipe, choice)
        assert torch.equal(ours.dequantise(torch.float32), alone.dequantise(torch.float32))
        for got, expected in ((ours.forward, alone.forward), (ours.transposed, alone.transposed)):
            assert (got is None) == (expected is None)
            if got is not None:
                assert torch.equal(got.data.view(torch.uint8), expected.data.view(torch.uint8))
                assert torch.equal(got.scale, expected.scale)
                assert got.scale.stride() == expected.scale.stride()
                assert got.data.is_contiguous()
        if ours.rights is not None:
            for got, matrix_of in zip(ours.rights, (alone.forward, alone.transposed), strict=True):
                assert (got is None) == (matrix_of is None)
                if got is None:
                    continue
                wanted = right(matrix_of)
                assert got.recipe == wanted.recipe
                assert torch.equal(got.data.view(torch.uint8), wanted.data.view(torch.uint8))
                assert (got.data.stride(), got.scale[0].stride()) == (wanted.data.stride(), wanted.scale[0].stride())


@pytest.mark.parametrize(("binades", "operand"), [(14, Operand()), (11, FOLDED)], ids=["plain", "folded"])
def test_what_bytes_cannot_hold_is_seen_as_they_are_made(binades: int, operand: Operand) -> None:
    recipe = Recipe("x", x_fwd=Operand(), w=operand)
    grid = torch.tensor([6.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=DEVICE).repeat(4)
    for extra, wrong in ((0, False), (1, True)):
        w = torch.zeros(256, 128, device=DEVICE)
        w[135:142, :32], w[142, 64:96] = grid, grid * 2.0 ** -(binades + extra)
        w[130, 96:128] = grid * 2.0**-140  # not a number that any code has, hence zeros
        packed, rounded = quantise(w, operand), torch.zeros(2, dtype=torch.int32, device=DEVICE)
        prepare_weights(w, 2, recipe, plan(recipe, 128, 128), packed, "weight", rounded)
        assert rounded.tolist() == [False, wrong]
        prepared = prepare_weight(w, recipe, plan(recipe, 256, 128))
        if not wrong or operand == Operand():  # values that a folded factor would miss need not be there
            assert bool(prepared.rounded(packed, torch.float32)) == wrong


def test_squares_that_span_more_than_bytes_hold_are_seen_and_multiplied_as_values() -> None:
    w, recipe = matrix(128, 256, dtype=torch.float32), get_recipe("mxfp4_g4")
    w[3] *= 2.0**-24
    packed = quantise(w, recipe.w)
    prepared = prepare_weight(w, recipe, plan(recipe, 128, 256))
    assert prepared.rounded(packed, torch.float32)
    values = prepared.as_values(packed, torch.float32)
    assert torch.equal(values.dequantise(torch.float32), packed.dequantise())
    assert (values.plan.forward.gemm, values.plan.wgrad.gemm) == (Gemm.BF16, Gemm.BLOCK)
    x = matrix(5, 256, dtype=torch.float32)
    torch.testing.assert_close(mx_linear(x, w, values, recipe), mx_linear(x, w, packed.dequantise(), recipe))


def test_without_gradients_nothing_is_quantised_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, x = get_recipe("mxfp4_g4"), matrix(4, 128)
    w = matrix(128, 128, seed=1).requires_grad_()
    weight_q = prepare_weight(w.detach(), recipe, plan(recipe, 128, 128))
    columns: list[object] = []
    by_both = kernels._Site.both
    monkeypatch.setattr(kernels._Site, "both", lambda *arguments: columns.append(1) or by_both(*arguments))
    with torch.no_grad():
        without = mx_linear(x, w, weight_q, recipe)
    assert not columns
    assert torch.equal(mx_linear(x, w, weight_q, recipe), without)
    assert columns


def test_where_there_is_no_hopper_gpu_weights_are_prepared_as_values_for_the_reference() -> None:
    x, w, recipe = torch.randn(4, 64), torch.randn(32, 64), get_recipe("mxfp4")
    for w_q in (backend.prepare_weight(w, recipe), *backend.quantise_weights(w, 1, recipe).prepared):
        assert isinstance(w_q, torch.Tensor)
        assert torch.equal(w_q, fake_quantise(w, recipe.w))
    assert torch.equal(mx_linear(x, w, w_q, recipe), reference_linear(x, w, w_q, recipe))


def test_a_device_that_has_the_kernels_gets_operands_or_says_once_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "quantisers_lack", lambda _: None)
    monkeypatch.setattr(backend.plan, "device_lacks", lambda _: None)
    recipe = get_recipe("mxfp4")
    w = matrix(128, 128)
    assert isinstance(backend.prepare_weight(w, recipe), HopperWeight)
    assert isinstance(backend.prepare_weight(w[:100], recipe), torch.Tensor)  # no FP8 GEMM has 100 outputs
    monkeypatch.setattr(backend.plan, "device_lacks", lambda _: "compute capability 8.0 is not 9.0")
    monkeypatch.setattr(backend, "_said", set())
    caplog.clear()  # on a GPU the 100 outputs have been said as well
    w = w.to("meta")
    monkeypatch.setattr(backend, "fake_quantise", lambda x, *_, **__: x)
    with caplog.at_level(logging.WARNING):
        for layer in range(2):
            backend.prepare_weight(w, recipe, name=f"layers.{layer}.mlp")
    assert [record.message for record in caplog.records] == [
        "layers.0.mlp runs on the reference backend: compute capability 8.0 is not 9.0"
    ]


def test_a_recipe_that_quantises_nothing_is_a_plain_linear() -> None:
    x, w = torch.randn(4, 64), torch.randn(32, 64)
    assert torch.equal(mx_linear(x, w, None, get_recipe("bf16")), torch.nn.functional.linear(x, w))
