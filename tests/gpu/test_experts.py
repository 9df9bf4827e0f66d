"""Experts on a GPU: fused ones compute what a loop of the reference does, grouped ones what a loop of products does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.model.grouped_experts import grouped_linear
from mxdist.quant.kernels.segments import Segments
from mxdist.quant.recipe import Recipe
from tests.quant.kernels.data import kind_of
from tests.quant.kernels.test_experts import MACRO, NEAREST, Case, assert_near


@pytest.mark.parametrize("sizes", [(700, 1, 0, 2049), (0, 5), (128, 256, 384)])
@pytest.mark.parametrize("recipe", [NEAREST, MACRO], ids=lambda recipe: recipe.name)
def test_outputs_and_gradients_equal_a_loop_of_the_reference(recipe: Recipe, sizes: tuple[int, ...]) -> None:
    case = Case(recipe, sizes, hidden=384, width=256)
    assert_near(case.fused(nonfinite="propagate"), case.one_by_one())


@pytest.mark.parametrize("sizes", [(700, 1, 0, 2049), (0, 5), (13, 128, 3)])
def test_grouped_products_equal_products_one_by_one(sizes: tuple[int, ...]) -> None:
    x, dy = kind_of("gaussian", sum(sizes), 256).requires_grad_(), kind_of("gaussian", sum(sizes), 384, seed=1)
    weights = [kind_of("gaussian", 384, 256, seed=e).requires_grad_() for e in range(len(sizes))]
    ends = torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)
    y = torch.cat([F.linear(part, w) for part, w in zip(torch.split(x, sizes), weights, strict=True)])
    theirs = [y.detach(), *torch.autograd.grad(y, [x, *weights], dy)]
    y = grouped_linear(x, weights, ends)
    ours = [y.detach(), *torch.autograd.grad(y, [x, *weights], dy)]
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got.double() - wanted.double()).norm() <= 5e-3 * wanted.double().norm() + 1e-12
    totals = [torch.ones(384, 256, device="cuda") for _ in sizes]
    grouped_linear(x, weights, ends, totals).backward(dy)
    for total, gradient in zip(totals, ours[2:], strict=True):
        torch.testing.assert_close(total, 1 + gradient.float())


def test_the_layout_of_rows_is_the_same_as_on_a_cpu() -> None:
    sizes = (150, 1, 0, 129, 128)
    here, there = (Segments.of_sizes(sizes, torch.device(device)) for device in ("cpu", "cuda"))
    for name in ("table", "source", "slots"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu()), name
