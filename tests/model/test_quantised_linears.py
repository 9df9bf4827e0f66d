"""What the linears and experts of the Megatron model compute, and when they refuse to."""

import pytest
import torch
import torch.nn.functional as F

from mxdist.config.schema import Supervised
from mxdist.learner.worker import LearnerWorker
from mxdist.quant.linear import mx_linear
from mxdist.quant.recipe import get_recipe
from mxdist.quant.reference import fake_quantise, quantise
from tests.learner.batches import random_batch
from tests.model.ranks import DENSE, MOE, RankProcesses

RECIPES = ["mxfp4", "mxfp4_mbs_of"]


def check_gradients(worker: LearnerWorker) -> None:
    recipe = get_recipe(worker.config.recipe)
    assert recipe.x_fwd is not None
    linear = worker._policy.model.decoder.layers[0].self_attention.linear_qkv
    x = torch.randn(3, 2, 64, requires_grad=True)
    y, _ = linear(x)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, linear.weight), dy)
    w_q = quantise(linear.weight, recipe.w).dequantise()
    x_q = fake_quantise(x, recipe.x_fwd)
    assert torch.equal(y, F.linear(x_q, w_q))
    torch.testing.assert_close(dx, dy @ w_q)
    assert not torch.allclose(dx, dy @ linear.weight, rtol=1e-2)
    torch.testing.assert_close(dw, dy.flatten(0, 1).T @ x_q.flatten(0, 1))


def check_experts(worker: LearnerWorker) -> None:
    """Each token: sum over its experts of p * down(silu(gate x) * up x), linears as ``mx_linear``."""
    layer = worker._policy.model.decoder.layers[1].mlp
    x = torch.randn(7, 2, 64)
    ours, _ = layer(x)
    tokens = x.flatten(0, 1)
    scores, chosen = (tokens @ layer.router.weight.T).softmax(-1).topk(2, dim=-1)
    scores = scores / scores.sum(-1, keepdim=True)
    expected = torch.zeros_like(tokens)
    for row, token in enumerate(tokens):
        for score, index in zip(scores[row], chosen[row].tolist(), strict=True):
            expert = layer.experts.local_experts[index]
            gate, up = apply(worker, expert.linear_fc1, token[None]).chunk(2, -1)
            expected[row] += score * apply(worker, expert.linear_fc2, F.silu(gate) * up)[0]
    torch.testing.assert_close(ours.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


def apply(worker: LearnerWorker, linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    recipe = get_recipe(worker.config.recipe)
    return mx_linear(x, linear.weight, quantise(linear.weight, recipe.w).dequantise(), recipe)


def check_an_expert_without_tokens(worker: LearnerWorker) -> None:
    experts = worker._policy.model.decoder.layers[0].mlp.experts
    rows = torch.randn(3, 64, requires_grad=True)
    output, _ = experts(rows, torch.tensor([0, 3, 0, 0]), torch.ones(3))
    idle, busy = (experts.local_experts[index].linear_fc1.weight for index in (0, 1))
    gradients = torch.autograd.grad(output.sum(), (rows, busy, idle))
    assert output.shape == (3, 64)
    assert [bool(gradient.abs().max() > 0) for gradient in gradients] == [True, True, False]


def is_fresh(worker: LearnerWorker) -> list[bool]:
    """For every quantised weight, whether it is what quantising the present master weight gives."""
    from mxdist.model.quantised_weight import quantised_weights

    fresh = []
    for module in quantised_weights(worker._policy.model):
        anew = quantise(module.weight, get_recipe(worker.config.recipe).w)
        same = all(torch.equal(part, module.quantised().parts()[name]) for name, part in anew.parts().items())
        fresh.append(same and torch.equal(module.quantised_values(), anew.dequantise()))
    return fresh


def codes(worker: LearnerWorker) -> list[torch.Tensor]:
    from mxdist.model.quantised_weight import quantised_weights

    return [module.quantised().codes.clone() for module in quantised_weights(worker._policy.model)]


def first_linear(worker: LearnerWorker) -> torch.nn.Module:
    return worker._policy.model.decoder.layers[0].self_attention.linear_qkv


def step_without_requantising(worker: LearnerWorker) -> None:
    worker._policy.optimizer.step()
    first_linear(worker)(torch.zeros(1, 1, 64))


def change_the_weight(worker: LearnerWorker) -> None:
    with torch.no_grad():
        first_linear(worker).weight.add_(1)
    first_linear(worker)(torch.zeros(1, 1, 64))


def change_the_weight_behind_its_back(worker: LearnerWorker) -> None:
    first_linear(worker).weight.data.add_(1)
    worker.export(1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_go_straight_through_and_dx_uses_the_quantised_weight(recipe: str, ranks: RankProcesses) -> None:
    with ranks.learners(DENSE, recipe) as learners:
        learners.run(check_gradients)


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_multiply_the_routing_probability_after_the_down_projection(recipe: str, ranks: RankProcesses) -> None:
    with ranks.learners(MOE, recipe) as learners:
        learners.run(check_experts)


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4_mbs_of"])
def test_an_expert_without_tokens_gets_a_gradient_of_zeros(recipe: str, ranks: RankProcesses) -> None:
    with ranks.learners(MOE, recipe) as learners:
        learners.run(check_an_expert_without_tokens)


def test_quantised_weights_follow_every_optimizer_step(ranks: RankProcesses) -> None:
    with ranks.learners(MOE, "mxfp4_mbs_of") as learners:
        (before,) = learners.run(codes)
        learners.call("update", random_batch(), Supervised(), 1e-2)
        (after,) = learners.run(codes)
        assert all(learners.run(is_fresh)[0])
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("change", [step_without_requantising, change_the_weight, change_the_weight_behind_its_back])
def test_a_stale_quantised_weight_is_refused(change: object, ranks: RankProcesses) -> None:
    with ranks.learners(MOE, "mxfp4") as learners, pytest.raises(RuntimeError, match="requantise"):
        learners.run(change)
