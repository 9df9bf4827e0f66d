"""The fused experts compute what a loop over experts of reference-quantised operands computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.errors import UserError
from mxdist.quant.kernels.experts import experts_mlp, prepare_expert_weights
from mxdist.quant.kernels.segments import Segments
from mxdist.quant.recipe import Macro, Operand, Recipe, get_recipe
from mxdist.quant.reference import fake_quantise
from tests.quant.kernels.data import kind_of

NEAREST = Recipe(
    "nearest", x_fwd=Operand(), w=Operand(), dy_dgrad=Operand(), x_wgrad=Operand(), dy_wgrad=Operand()
)  # fmt: skip
MACRO = Recipe("macro", Operand(macro=Macro()), Operand(), Operand(macro=Macro()), Operand(), Operand())
EXPERTS, HIDDEN, WIDTH = 4, 256, 128


def q(x: Tensor, operand: Operand | None) -> Tensor:
    assert operand is not None
    return fake_quantise(x.float(), operand).double()


def loop(
    x: Tensor, p: Tensor, w1: Tensor, w2: Tensor, routed: Tensor, recipe: Recipe, dout: Tensor
) -> tuple[Tensor, ...]:
    """Output and gradients by x, p, w1, w2, in float64 except where the fused experts round to bfloat16."""
    out, dx, dp = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(x).double(), torch.zeros_like(p).double()
    dw1, dw2 = torch.zeros_like(w1).double(), torch.zeros_like(w2).double()
    for e in range(EXPERTS):
        token, copy = (routed == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        w1_q, w2_q, pe, dy = q(w1[e], recipe.w), q(w2[e], recipe.w), p[token, copy][:, None].double(), dout[token]
        h = (q(x[token], recipe.x_fwd) @ w1_q.t()).bfloat16()
        gate, up = h[:, :WIDTH].double(), h[:, WIDTH:].double()
        sigmoid = gate.sigmoid()
        a = gate * sigmoid * up * pe
        out.index_add_(0, token, (q(a, recipe.x_fwd) @ w2_q.t()).bfloat16().double())
        da = (q(dy, recipe.dy_dgrad) @ w2_q).bfloat16().double()
        dp[token, copy] = (da * gate * sigmoid * up).sum(1)
        by_gate = da * pe * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
        dh = torch.cat((by_gate, da * pe * gate * sigmoid), 1).bfloat16().double()
        dx.index_add_(0, token, (q(dh, recipe.dy_dgrad) @ w1_q).bfloat16().double())
        dw2[e] = q(dy.t(), recipe.dy_wgrad) @ q(a.t(), recipe.x_wgrad).t()
        dw1[e] = q(dh.t(), recipe.dy_wgrad) @ q(x[token].t(), recipe.x_wgrad).t()
    return out, dx, dp, dw1, dw2


@pytest.mark.parametrize("copies", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 700])
@pytest.mark.parametrize("recipe", [NEAREST, MACRO], ids=lambda recipe: recipe.name)
def test_outputs_and_gradients_equal_a_loop_of_the_reference(recipe: Recipe, tokens: int, copies: int) -> None:
    generator = torch.Generator().manual_seed(0)
    routed = torch.stack([torch.randperm(EXPERTS + 1, generator=generator)[:copies] for _ in range(tokens)])
    routed = routed.masked_fill(routed == 2, -1).cuda()  # expert 2 has no rows, expert 4 is elsewhere
    x, dout = kind_of("gaussian", tokens, HIDDEN), kind_of("gaussian", tokens, HIDDEN, seed=5)
    w1 = torch.stack([kind_of("gaussian", 2 * WIDTH, HIDDEN, seed=e) / 16 for e in range(EXPERTS)])
    w2 = torch.stack([kind_of("gaussian", HIDDEN, WIDTH, seed=e + 9) / 11 for e in range(EXPERTS)])
    p = torch.rand(tokens, copies, device="cuda")
    leaves = [v.detach().requires_grad_() for v in (x, p, w1, w2)]
    prepared = tuple(prepare_expert_weights(w, recipe) for w in (w1, w2))
    leaf_x, leaf_p, leaf_w1, leaf_w2 = leaves
    out = experts_mlp(leaf_x, leaf_p, leaf_w1, leaf_w2, prepared, Segments.of(routed, EXPERTS), recipe)
    got = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    here = ((routed >= 0) & (routed < EXPERTS)).double()
    for name, ours, theirs in zip(
        ("out", "dx", "dp", "dw1", "dw2"), got, loop(x, p, w1, w2, routed, recipe, dout), strict=True
    ):  # fmt: skip
        if name == "dp":
            theirs = theirs * here
        # Now and then exp() differs in a last bit and moves a value across a rounding boundary.
        assert (ours.double() - theirs).norm() <= 1e-2 * theirs.norm() + 1e-12, name


def test_random_rounding_is_seeded_and_recipes_that_do_not_fit_are_refused() -> None:
    recipe = get_recipe("mxfp4_g4")
    x = kind_of("gaussian", 300, HIDDEN).requires_grad_()
    w1, w2 = (torch.randn(2, *shape, device="cuda").bfloat16() for shape in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)))
    prepared = tuple(prepare_expert_weights(w, recipe) for w in (w1, w2))
    segments = Segments.of(torch.randint(2, (300, 1), device="cuda"), 2)
    p = torch.ones(300, 1, device="cuda")

    def gradient(seed: int) -> Tensor:
        y = experts_mlp(x, p, w1.requires_grad_(), w2, prepared, segments, recipe, seed=seed)
        return torch.autograd.grad(y.float().square().sum(), w1)[0]

    assert torch.equal(gradient(1), gradient(1))
    assert not torch.equal(gradient(1), gradient(2))
    with pytest.raises(UserError, match=r"use mxdist\.quant\.kernels\.grouped"):
        prepare_expert_weights(w1, get_recipe("mxfp4_mbs"))
