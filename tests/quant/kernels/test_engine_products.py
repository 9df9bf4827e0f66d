"""The rollout engine's products on packed bytes by the kernels, as on a GPU: linears and experts, few rows and many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant.kernels.options import DECODE_ROWS, TILE_ROWS
from mxdist.quant.recipe import Operand, get_recipe
from mxdist.quant.reference import fake_quantise, quantise
from mxdist.rollout import products
from mxdist.rollout.experts import route, run_experts
from mxdist.rollout.live_weight import LiveWeight
from mxdist.rollout.products import GRAPH_TOKENS, Abilities, ExpertRows, Product, grouped_linear, linear, live_values
from tests.quant.kernels.data import DEVICE, matrix


@pytest.fixture(autouse=True)
def _kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here in the interpreter, which multiplies in no FP8; on a GPU by what it can do."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(products, "abilities", lambda _device: Abilities(triton=True, fp8=False))


def filled(operand: Operand, rows: int, columns: int, seed: int = 0) -> LiveWeight:
    with torch.device(DEVICE):
        weight = LiveWeight(rows, columns, operand, torch.bfloat16)
    packed = quantise(matrix(rows, columns, seed=seed), operand)
    for part, live in weight.parts().items():
        live.copy_(packed.parts()[part])
    weight.drop_values()
    return weight


def assert_near(got: Tensor, x_q: Tensor, values: Tensor) -> None:
    """To the rounding of factors and of the output."""
    wanted, most = x_q.double() @ values.double().t(), x_q.double().abs() @ values.double().abs().t()
    assert got.dtype == torch.bfloat16
    assert ((got.double() - wanted).abs() <= 2.0**-7 * wanted.abs() + 2.0**-10 * most).all()


@pytest.mark.parametrize(
    ("recipe", "rows"), [("mxfp4", 1), ("mxfp4_mbs", 64), ("mxfp4_mbs_of", 2), ("mxfp4_mbs", 65), ("mxfp4", 257)]
)
def test_a_linear_on_bytes_multiplies_the_quantised_numbers(recipe: str, rows: int) -> None:
    chosen = get_recipe(recipe)
    assert chosen.x_fwd is not None
    assert chosen.w is not None
    weight, x = filled(chosen.w, 128, 256), matrix(rows, 256, seed=1)
    device = products.abilities(DEVICE)
    few = products.choose(chosen, weight.shape, rows, device) is Product.DECODE
    assert few == (rows <= (TILE_ROWS if device.fp8 and recipe != "mxfp4_mbs_of" else DECODE_ROWS))
    bias = torch.ones(128, dtype=torch.bfloat16, device=DEVICE)
    values = weight.packed().dequantise()
    assert torch.equal(live_values(weight), values.bfloat16())
    x_q = fake_quantise(x, chosen.x_fwd)
    plain = linear(x, weight, chosen, None, "linear")
    assert_near(plain, x_q, values)
    biased = linear(x.view(1, rows, 256), weight, chosen, bias, "linear")
    torch.testing.assert_close(biased[0], plain + bias, rtol=2.0**-7, atol=2.0**-7)


def chosen_experts(sizes: tuple[int, ...], on_device: bool) -> ExpertRows:
    """As of a batch that a CUDA graph may hold, or of a larger one."""
    experts = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(DEVICE)
    of = ExpertRows.of(experts[:, None], len(sizes))
    assert of.on_device == (sum(sizes) <= GRAPH_TOKENS)
    return replace(of, on_device=on_device)


@pytest.mark.parametrize("sizes", [(3, 0, 1), (70, 0, 130), (0, 16, 1)])
@pytest.mark.parametrize("on_device", [True, False])
def test_experts_on_bytes_multiply_each_their_own_rows(sizes: tuple[int, ...], on_device: bool) -> None:
    recipe = get_recipe("mxfp4")
    assert recipe.x_fwd is not None
    assert recipe.w is not None
    weight = filled(recipe.w, 3 * 32, 256)
    rows = fake_quantise(matrix(sum(sizes), 256, seed=1), recipe.x_fwd).bfloat16()
    got = grouped_linear(rows, weight, recipe, chosen_experts(sizes, on_device))
    values = weight.packed().dequantise()
    for e, (part, own) in enumerate(zip(got.split(sizes), rows.split(sizes), strict=True)):
        assert_near(part, own, values[32 * e : 32 * (e + 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_on_values_multiply_each_their_own_rows_without_the_host(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE.type == "cpu":  # torch multiplies groups here too
        monkeypatch.setattr(products, "abilities", lambda _device: Abilities(triton=True, fp8=True))
    with torch.device(DEVICE):
        weight = LiveWeight(4 * 32, 64, None, dtype)
    assert weight.values is not None
    weight.values.copy_(matrix(4 * 32, 64))
    rows, of = matrix(9, 64, seed=1).to(dtype), chosen_experts((0, 5, 0, 4), True)
    got = grouped_linear(rows, weight, get_recipe("bf16"), of)
    torch.testing.assert_close(got[:5], rows[:5] @ weight.values[32:64].t())
    torch.testing.assert_close(got[5:], rows[5:] @ weight.values[96:].t())


def test_a_layer_of_experts_on_bytes_is_near_the_one_on_values() -> None:
    recipe = get_recipe("mxfp4_mbs_of")
    assert recipe.w is not None
    w13, w2 = filled(recipe.w, 4 * 2 * 128, 128, seed=1), filled(recipe.w, 4 * 128, 128, seed=2)
    x = matrix(6, 128, seed=3)
    weights, experts = route(x[:, :4], 2, True)
    got = run_experts(x, weights, experts, w13, w2, recipe, recipe, "experts")
    for weight in (w13, w2):
        weight.values = live_values(weight)
    wanted = run_experts(x, weights, experts, w13, w2, recipe, recipe, "experts")
    assert (got.double() - wanted.double()).norm() < 0.02 * wanted.double().norm()
