"""mx_linear: forward and straight-through gradients against explicit formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.linear import Shard, mx_linear
from mxdist.quant.recipe import PRESETS, Operand, Recipe, get_recipe
from mxdist.quant.reference import fake_quantise, quantise
from mxdist.quant.transform import Frozen

QUANTISED = [name for name in PRESETS if PRESETS[name].quantises and not PRESETS[name].needs_seed]
"""Those whose gradients, if they quantise any, are rounded to nearest."""
G4 = [name for name in PRESETS if PRESETS[name].needs_seed]


def case(tokens: tuple[int, ...] = (2, 5), dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*tokens, 160, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(24, 160, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(24, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(*tokens, 24, generator=generator).to(dtype)
    return x, weight, bias, dy


@pytest.mark.parametrize("name", QUANTISED)
def test_forward_and_gradients_use_the_quantised_operands(name: str) -> None:
    recipe = get_recipe(name)
    x, weight, bias, dy = case()
    weight_q = quantise(weight.detach(), recipe.w).dequantise()
    x_q = fake_quantise(x.detach(), recipe.x_fwd)
    y = mx_linear(x, weight, weight_q, recipe, bias)
    y.backward(dy)
    assert torch.equal(y, F.linear(x_q, weight_q, bias))
    for_x, for_weight, x_t = dy, dy.flatten(0, 1).T, x_q.flatten(0, 1).T
    if recipe.dy_dgrad is not None:
        for_x, for_weight = fake_quantise(for_x, recipe.dy_dgrad), fake_quantise(for_weight, recipe.dy_wgrad)
        x_t = fake_quantise(x.detach().flatten(0, 1).T, recipe.x_wgrad)
    assert torch.equal(x.grad, for_x @ weight_q)
    assert torch.allclose(weight.grad, for_weight @ x_t.T, rtol=1e-5, atol=1e-5)
    assert torch.allclose(bias.grad, dy.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_the_input_gradient_does_not_use_the_master_weight() -> None:
    recipe = get_recipe("mxfp4")
    x, weight, _, dy = case()
    mx_linear(x, weight, torch.zeros_like(weight), recipe).backward(dy)
    assert not x.grad.any()
    assert weight.grad.any()


@pytest.mark.parametrize("field", ["dy_dgrad", "dy_wgrad", "x_wgrad"])
def test_each_gradient_operand_is_quantised_along_its_own_contraction_axis(field: str) -> None:
    forward = get_recipe("mxfp4")
    recipe = Recipe("g4", forward.x_fwd, forward.w, **{field: Operand()})
    x, weight, _, dy = case(tokens=(50,))
    weight_q = fake_quantise(weight.detach(), recipe.w)
    mx_linear(x, weight, weight_q, recipe).backward(dy)
    dy_d = fake_quantise(dy, Operand()) if field == "dy_dgrad" else dy
    dy_w = fake_quantise(dy.T, Operand()).T if field == "dy_wgrad" else dy
    x_w = fake_quantise(x.detach().T, Operand()).T if field == "x_wgrad" else fake_quantise(x.detach(), recipe.x_fwd)
    assert torch.equal(x.grad, dy_d @ weight_q)
    assert torch.allclose(weight.grad, dy_w.T @ x_w, rtol=1e-5, atol=1e-5)


def test_a_recipe_without_quantisation_is_a_plain_linear() -> None:
    x, weight, bias, dy = case()
    mx_linear(x, weight, None, get_recipe("bf16"), bias).backward(dy)
    ours = x.grad, weight.grad, bias.grad
    x, weight, bias, _ = case()
    F.linear(x, weight, bias).backward(dy)
    assert all(torch.equal(a, b) for a, b in zip(ours, (x.grad, weight.grad, bias.grad), strict=True))


def test_activations_alone_can_be_quantised() -> None:
    x, weight, _, _ = case()
    recipe = Recipe("a4", x_fwd=Operand())
    assert torch.equal(mx_linear(x, weight, None, recipe), F.linear(fake_quantise(x.detach(), Operand()), weight))


@pytest.mark.parametrize("tokens", [(0,), (2, 0), ()])
def test_zero_rows_and_a_single_vector_work(tokens: tuple[int, ...]) -> None:
    recipe = get_recipe("mxfp4_mbs_of")
    x, weight, bias, dy = case(tokens)
    y = mx_linear(x, weight, fake_quantise(weight.detach(), recipe.w), recipe, bias)
    y.backward(dy)
    assert y.shape == (*tokens, 24)
    assert x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape
    assert weight.grad.any() == (0 not in tokens)


def test_dtypes_are_those_of_the_inputs() -> None:
    recipe = get_recipe("mxfp4_mbs")
    x, _, bias, dy = case(dtype=torch.bfloat16)
    weight = torch.randn(24, 160, requires_grad=True)
    y = mx_linear(x, weight, fake_quantise(weight.detach(), recipe.w), recipe, bias)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == bias.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32


def test_frozen_inputs_get_no_gradient() -> None:
    recipe = get_recipe("mxfp4")
    x, weight, bias, dy = case()
    y = mx_linear(x.detach(), weight, fake_quantise(weight.detach(), recipe.w), recipe, bias.detach())
    y.backward(dy)
    assert weight.grad is not None
    assert x.grad is None
    assert bias.grad is None


def test_changing_the_cached_weight_between_forward_and_backward_is_an_error() -> None:
    recipe = get_recipe("mxfp4")
    x, weight, _, dy = case()
    weight_q = fake_quantise(weight.detach(), recipe.w)
    y = mx_linear(x, weight, weight_q, recipe)
    weight_q.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_a_missing_quantised_weight_and_a_nan_name_the_layer() -> None:
    x, weight, _, _ = case()
    with pytest.raises(ValueError, match=r"layers\.3\.q_proj needs weight_q"):
        mx_linear(x, weight, None, get_recipe("mxfp4"), name="layers.3.q_proj")
    with pytest.raises(ValueError, match=r"layers.3.q_proj input of shape \(2, 5, 160\) holds nan at position"):
        mx_linear(x * torch.nan, weight, weight.detach(), get_recipe("mxfp4"), name="layers.3.q_proj")


@pytest.mark.parametrize("name", G4)
def test_g4_rounds_gradients_stochastically_and_rotates_the_operands_of_dw(name: str) -> None:
    recipe = get_recipe(name)
    x, weight, _, dy = case(tokens=(50,))
    weight_q = fake_quantise(weight.detach(), recipe.w)
    y = mx_linear(x, weight, weight_q, recipe, seed=9)
    y.backward(dy)
    shard = Shard()
    dy_d = fake_quantise(dy, recipe.dy_dgrad, seed=shard.draw("dy_dgrad", 9))
    dy_w = fake_quantise(dy.T, recipe.dy_wgrad, seed=shard.draw("dy_wgrad", 9))
    x_w = fake_quantise(x.detach().T, recipe.x_wgrad)
    assert recipe.dy_wgrad.hadamard == recipe.x_wgrad.hadamard == "plain"
    assert recipe.dy_dgrad.rounding == recipe.dy_wgrad.rounding == "stochastic"
    assert torch.equal(y, F.linear(fake_quantise(x.detach(), recipe.x_fwd), weight_q))
    assert torch.equal(x.grad, dy_d @ weight_q)
    assert torch.allclose(weight.grad, dy_w @ x_w.T, rtol=1e-5, atol=1e-5)


def test_g4_gradients_are_unbiased_in_dx() -> None:
    recipe = get_recipe("mxfp4_g4")
    x, weight, _, dy = case(tokens=(8,))
    weight_q = fake_quantise(weight.detach(), recipe.w)
    grads = []
    for seed in range(200):
        x.grad = None
        mx_linear(x, weight, weight_q, recipe, seed=seed).backward(dy)
        grads.append(x.grad)
    mean, exact = torch.stack(grads).mean(0), dy @ weight_q
    single = (grads[0] - exact).square().mean()
    assert (mean - exact).square().mean() < 2 * single / 200


def test_g4_needs_a_seed_for_training_but_not_for_evaluation() -> None:
    recipe = get_recipe("mxfp4_g4")
    x, weight, _, _ = case()
    weight_q = fake_quantise(weight.detach(), recipe.w)
    with pytest.raises(ValueError, match=r"'mxfp4_g4' draws random numbers: fc1 needs a seed"):
        mx_linear(x, weight, weight_q, recipe, name="fc1")
    with torch.no_grad():
        assert torch.equal(mx_linear(x, weight, weight_q, recipe), mx_linear(x, weight, weight_q, get_recipe("mxfp4")))


@pytest.mark.parametrize("axis", ["outputs", "tokens"])
def test_random_gradients_do_not_depend_on_how_a_linear_is_sharded(axis: str) -> None:
    recipe = get_recipe("mxfp4_g4")
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(64, 96, generator=generator), torch.randn(64, 64, generator=generator)
    weight = torch.randn(64, 96, generator=generator, requires_grad=True)
    weight_q = fake_quantise(weight.detach(), recipe.w)
    mx_linear(x, weight, weight_q, recipe, seed=4).backward(dy)
    whole, weight.grad = weight.grad, None
    for start in (0, 32):
        part = slice(start, start + 32)
        if axis == "outputs":
            shard = Shard(output=start, outputs=64)
            mx_linear(x, weight[part], weight_q[part], recipe, seed=4, shard=shard).backward(dy[:, part])
        else:
            shard = Shard(token=start, tokens=64)
            mx_linear(x[part], weight, weight_q, recipe, seed=4, shard=shard).backward(dy[part])
    assert torch.allclose(weight.grad, whole, rtol=1e-5, atol=1e-5)


def test_the_operands_of_a_linear_have_streams_of_their_own() -> None:
    names = ("x_fwd", "dy_dgrad", "dy_wgrad", "x_wgrad")
    assert len({Shard().draw(name, 9).stream for name in names}) == 4


def test_frozen_values_reach_the_forward_operand() -> None:
    x, weight, _, _ = case()
    mean = torch.full((160,), 3.0)
    recipe = Recipe("centred", x_fwd=Operand(mean=True))
    y = mx_linear(x + 3, weight, None, recipe, frozen=Frozen(mean=mean))
    expected = fake_quantise((x + 3).detach() - mean, Operand()) + mean
    assert torch.equal(y, F.linear(expected, weight))
    with pytest.raises(ValueError, match="only x_fwd has a frozen mean"):
        Recipe("wrong", w=Operand(mean=True))
