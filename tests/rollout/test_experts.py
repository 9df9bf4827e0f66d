"""Routing and the experts' forward pass, without vLLM, against one token and one expert at a time."""

import pytest
import torch
import torch.nn.functional as F

from mxdist.quant.recipe import get_recipe
from mxdist.quant.reference import fake_quantise, quantise
from mxdist.quant.tensor import MXTensor
from mxdist.rollout.experts import route, run_experts
from mxdist.rollout.live_weight import LiveWeight

EXPERTS, HIDDEN, WIDE, TOP_K = 5, 64, 32, 3


def filled(rows: int, columns: int, recipe_name: str, seed: int, dtype: torch.dtype = torch.float32) -> LiveWeight:
    operand = get_recipe(recipe_name).w
    weight = LiveWeight(rows, columns, operand, dtype)
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    sent = quantise(values, operand).parts() if operand else {"values": values}
    for part, live in weight.parts().items():
        live.copy_(sent[part])
    weight.refresh()
    return weight


@pytest.mark.parametrize("recipe_name", ["bf16", "mxfp4", "mxfp4_mbs_of"])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_experts_equal_the_plain_loop(recipe_name: str, tokens: int) -> None:
    recipe = get_recipe(recipe_name)
    w13, w2 = filled(EXPERTS * 2 * WIDE, HIDDEN, recipe_name, 0), filled(EXPERTS * HIDDEN, WIDE, recipe_name, 1)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    weights, experts = route(torch.randn(tokens, EXPERTS, generator=generator), TOP_K, True)

    def q(t: torch.Tensor) -> torch.Tensor:
        return fake_quantise(t, recipe.x_fwd) if recipe.x_fwd else t

    expected = torch.zeros(tokens, HIDDEN)
    for token in range(tokens):
        for rank in range(TOP_K):
            e = experts[token, rank]
            gate, up = (q(x[token]) @ w13.values[2 * e * WIDE : 2 * (e + 1) * WIDE].T).chunk(2)
            expected[token] += weights[token, rank] * (
                q(F.silu(gate) * up) @ w2.values[e * HIDDEN : (e + 1) * HIDDEN].T
            )
    # A last-bit difference before quantising may move a code: rare, and then one grid step of one of 32 inputs.
    torch.testing.assert_close(
        run_experts(x, weights, experts, w13, w2, recipe, recipe, "experts"), expected, rtol=1e-4, atol=1e-3
    )


def test_routing_takes_the_largest_probabilities_renormalised_in_float32() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]], dtype=torch.bfloat16)
    weights, experts = route(logits, 2, True)
    assert experts.tolist() == [[1, 2]]
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, logits.float()[:, [1, 2]].softmax(-1))
    plain, _ = route(logits, 2, False)
    torch.testing.assert_close(plain, logits.float().softmax(-1)[:, [1, 2]])


@pytest.mark.parametrize("recipe_name", ["bf16", "mxfp4_mbs_of"])
def test_a_tokens_result_does_not_depend_on_its_place_in_the_batch(recipe_name: str) -> None:
    recipe = get_recipe(recipe_name)
    w13, w2 = filled(EXPERTS * 2 * WIDE, HIDDEN, recipe_name, 0), filled(EXPERTS * HIDDEN, WIDE, recipe_name, 1)
    x = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(3))
    weights, experts = route(x[:, :EXPERTS], TOP_K, True)
    forwards = run_experts(x, weights, experts, w13, w2, recipe, recipe, "experts")
    backwards = run_experts(x.flip(0), weights.flip(0), experts.flip(0), w13, w2, recipe, recipe, "experts")
    torch.testing.assert_close(backwards.flip(0), forwards, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("recipe_name", ["bf16", "mxfp4", "mxfp4_mbs_of"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_whose_bytes_alone_are_kept_give_the_same_bits(recipe_name: str, dtype: torch.dtype) -> None:
    recipe = get_recipe(recipe_name)
    w13 = filled(EXPERTS * 2 * WIDE, HIDDEN, recipe_name, 0, dtype)
    w2 = filled(EXPERTS * HIDDEN, WIDE, recipe_name, 1, dtype)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)
    weights, experts = route(x[:, :EXPERTS], TOP_K, True)
    before = run_experts(x, weights, experts, w13, w2, recipe, recipe, "experts")
    for weight in (w13, w2):
        weight.drop_values()
        assert (weight.values is None) == recipe.quantises
    assert torch.equal(run_experts(x, weights, experts, w13, w2, recipe, recipe, "experts"), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_values_are_those_of_the_bytes(dtype: torch.dtype) -> None:
    operand = get_recipe("mxfp4_mbs_of").w
    weight = LiveWeight(6, 96, operand, dtype)
    packed = quantise(torch.randn(6, 96), operand)
    for part, live in weight.parts().items():
        live.copy_(packed.parts()[part])
    assert not weight.values.any()
    weight.refresh()
    assert torch.equal(weight.values, packed.dequantise(dtype))
    assert torch.equal(MXTensor.from_parts(weight.parts(), (6, 96), operand).dequantise(dtype), weight.values)
    assert not list(weight.state_dict())  # vLLM's dummy loader overwrites what is persistent
