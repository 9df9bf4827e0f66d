"""Linears of experts equal a loop over the experts, also for empty ones and ones with a single row."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.errors import UserError
from mxdist.quant.kernels import grouped
from mxdist.quant.kernels.grouped import expert_linear, prepare_experts
from mxdist.quant.kernels.quant_rows import quantise_rows
from mxdist.quant.recipe import Operand, Recipe, get_recipe
from mxdist.quant.reference import fake_quantise
from tests.quant.kernels.data import kind_of

RECIPE = Recipe(
    "nearest", x_fwd=Operand(), w=Operand(), dy_dgrad=Operand(), x_wgrad=Operand(), dy_wgrad=Operand()
)  # fmt: skip
SIZES = [(200, 0, 1, 130), (0, 0, 0, 0), (1, 1, 1, 1), (3000, 2500, 2100, 3333)]


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got.double() - wanted.double()).norm() <= 2.5e-3 * wanted.double().norm()  # bfloat16 rounding


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(768, 256), (256, 768)])
def test_experts_equal_a_loop_of_reference_linears(sizes: tuple[int, ...], n: int, k: int) -> None:
    rows = sum(sizes)
    x = kind_of("outliers", max(rows, 1), k)[:rows].requires_grad_()
    w = torch.stack([kind_of("gaussian", n, k, seed=e) for e in range(len(sizes))]).requires_grad_()
    dy = kind_of("gaussian", max(rows, 1), n, seed=9)[:rows]
    y = expert_linear(x, w, prepare_experts(w, RECIPE), sizes, RECIPE)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    start = 0
    for expert, size in enumerate(sizes):
        part = slice(start, start + size)
        w_q = fake_quantise(w[expert].detach(), Operand()).double()
        if size:
            close(y[part], fake_quantise(x[part].detach(), Operand()).double() @ w_q.t())
            close(dx[part], fake_quantise(dy[part], Operand()).double() @ w_q)
            dy_t, x_t = (fake_quantise(v.detach().t(), Operand()).double() for v in (dy[part], x[part]))
            close(dw[expert], dy_t @ x_t.t())
        else:
            assert not dw[expert].any()
        start += size


def test_the_grouped_kernel_has_no_bias_on_positive_data() -> None:
    sizes = (300, 200)
    x, w = kind_of("positive", 500, 11008), torch.stack([kind_of("positive", 256, 11008, seed=e) for e in (1, 2)])
    prepared = prepare_experts(w, RECIPE)
    assert sum(sizes) < grouped.DENSE_ROWS * len(sizes)
    x8 = quantise_rows(x, Operand())
    y = grouped.grouped_matmul(x8, prepared.forward, prepared.forward_scale, sizes, torch.bfloat16)
    wanted = x8.dequantise(torch.float64)[:300] @ prepared.expert(0).forward.dequantise(torch.float64).t()
    rounding = (wanted.bfloat16().double() - wanted).norm()
    assert (y[:300].double() - wanted).norm() <= 1.05 * rounding


def test_recipes_without_row_scales_and_wrong_sizes_are_refused() -> None:
    w = torch.randn(2, 64, 128, device="cuda")
    with pytest.raises(UserError, match="use the reference"):
        prepare_experts(w, get_recipe("mxfp4_mbs"))
    with pytest.raises(ValueError, match="do not fit"):
        expert_linear(torch.randn(5, 128, device="cuda"), w, prepare_experts(w, RECIPE), (1, 2), RECIPE)
