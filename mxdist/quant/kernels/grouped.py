"""Linears of experts: rows sorted by expert, one weight each, exact FP8 GEMMs.

Experts with many rows run as dense GEMMs one after the other, which is faster than any grouped kernel that promotes
its partial sums; experts with few rows run as one grouped GEMM, because launches would dominate. The grouped kernel
is torch's, without fast accumulation, whose bias on all-positive data is -18 % (measured, K = 11008).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxdist.errors import UserError
from mxdist.quant.kernels.forms import Form, Fp8Matrix, empty_tiles
from mxdist.quant.kernels.gemm import matmul
from mxdist.quant.kernels.plan import Gemm, plan
from mxdist.quant.kernels.quant_rows import quantise_rows
from mxdist.quant.kernels.quant_tiles import quantise_tiles
from mxdist.quant.kernels.quant_weight import Fp8Weight, quantise_weight, whole_units
from mxdist.quant.linear import Shard
from mxdist.quant.recipe import Recipe
from mxdist.quant.reference import NonFinite

DENSE_ROWS = 2048
"""Mean rows per expert from which dense GEMMs one by one beat the grouped kernel."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Quantised weights of all local experts, form ROW with one unit per expert.

    forward     bytes [E, N, K], scales [E, N]
    transposed  bytes [E, K, N], scales [E, K]; the same values
    """

    forward: Tensor
    forward_scale: Tensor
    transposed: Tensor
    transposed_scale: Tensor

    def expert(self, index: int) -> Fp8Weight:
        """Views of one expert's operands."""
        n, k = self.forward_scale.shape[1], self.transposed_scale.shape[1]
        return Fp8Weight(
            Fp8Matrix(self.forward[index], self.forward_scale[index].unsqueeze(1), Form.ROW, k),
            Fp8Matrix(self.transposed[index], self.transposed_scale[index].unsqueeze(1), Form.ROW, n),
        )


def prepare_experts(weight: Tensor, recipe: Recipe, nonfinite: NonFinite = "error") -> ExpertWeights:
    """Quantise master weights [E, N, K], once per optimizer step. UserError for recipes without FP8 row scales."""
    experts, n, k = weight.shape
    rows_fit = plan(recipe, n, k).forward.gemm in (Gemm.ROW, Gemm.BLOCK)
    if not rows_fit or recipe.w is None or recipe.x_fwd is None or recipe.x_fwd.macro is not None:
        raise UserError(f"experts run in FP8 only with row scales, not with recipe {recipe.name!r}: use the reference.")
    forward = empty_tiles(experts * n, k, Form.ROW, weight.device)
    transposed = empty_tiles(experts * k, n, Form.ROW, weight.device)
    result = ExpertWeights(
        forward.data.view(experts, n, -1),
        forward.scale.view(experts, n),
        transposed.data.view(experts, k, -1),
        transposed.scale.view(experts, k),
    )
    units, scales = whole_units(weight.detach(), recipe.w)
    result.forward_scale.copy_(scales.unsqueeze(1).expand(experts, n))
    result.transposed_scale.copy_(scales.unsqueeze(1).expand(experts, k))
    for index in range(experts):
        quantise_weight(
            weight[index].detach(), recipe.w, form=Form.ROW, out=result.expert(index), unit=units[index],
            nonfinite=nonfinite,
        )  # fmt: skip
    return result


def grouped_matmul(a: Fp8Matrix, b: Tensor, b_scale: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return rows_e b_e^T for every expert's rows, [R, N]: a form ROW [R, K], b bytes [E, N, K], scales [E, N].

    sizes  rows of each expert, on the host; may hold zeros; they add up to R.
    """
    rows, experts = a.rows, len(sizes)
    if not rows or rows >= DENSE_ROWS * experts or dtype != torch.bfloat16:
        out = torch.empty(rows, b.shape[1], dtype=dtype, device=a.data.device)
        for e, start, stop in segments(sizes):
            part = Fp8Matrix(a.data[start:stop], a.scale[start:stop], Form.ROW, a.k)
            matmul(part, Fp8Matrix(b[e], b_scale[e].unsqueeze(1), Form.ROW, a.k), dtype, out[start:stop])
        return out
    ends = torch.tensor(sizes).cumsum(0).to(device=a.data.device, dtype=torch.int32, non_blocking=True)
    return torch._scaled_grouped_mm(
        a.data, b.transpose(1, 2), a.scale.view(-1), b_scale, offs=ends, out_dtype=dtype, use_fast_accum=False
    )  # fmt: skip


def segments(sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end row) of every expert that has rows."""
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            yield expert, start, start + size
        start += size


def expert_linear(
    x: Tensor,
    weight: Tensor,
    prepared: ExpertWeights,
    sizes: Sequence[int],
    recipe: Recipe,
    *,
    seed: int | None = None,
    nonfinite: NonFinite = "error",
) -> Tensor:
    """Return Q(x_e) W_e^T for rows [R, K] sorted by expert: [R, N] of x's dtype; differentiable in x and weight.

    weight    [E, N, K] master weights, which receive the gradients; `prepared` is made from them.
    sizes     rows of each expert, on the host; zeros and ones are fine; they add up to R.
    seed      needed when gradients are rounded stochastically; expert e draws with seed + e.
    """
    if sum(sizes) != x.shape[0] or len(sizes) != weight.shape[0]:
        raise ValueError(f"{len(sizes)} expert sizes adding up to {sum(sizes)} do not fit x {tuple(x.shape)}.")
    return _ExpertLinear.apply(x, weight, prepared, tuple(sizes), recipe, seed, nonfinite)


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, prepared: ExpertWeights, sizes: tuple[int, ...], recipe: Recipe,
        seed: int | None, nonfinite: NonFinite,
    ) -> Tensor:  # fmt: skip
        assert recipe.x_fwd is not None
        x8 = quantise_rows(x, recipe.x_fwd, name="expert input", nonfinite=nonfinite)
        ctx.save_for_backward(x)
        ctx.prepared, ctx.sizes, ctx.recipe, ctx.seed = prepared, sizes, recipe, seed
        ctx.nonfinite, ctx.weight_shape, ctx.weight_dtype = nonfinite, weight.shape, weight.dtype
        return grouped_matmul(x8, prepared.forward, prepared.forward_scale, sizes, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, (x,) = grads[0].contiguous(), ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        dx = dw = None
        if recipe.dy_dgrad is None or recipe.dy_wgrad is None or recipe.x_wgrad is None:
            raise UserError(f"the experts' FP8 backward quantises gradients; recipe {recipe.name!r} does not.")
        shard = Shard()
        if ctx.needs_input_grad[0]:
            draw = shard.draw("dy_dgrad", ctx.seed) if recipe.dy_dgrad.needs_seed else None
            dy8 = quantise_rows(dy, recipe.dy_dgrad, draw=draw, name="expert gradient", nonfinite=ctx.nonfinite)
            dx = grouped_matmul(dy8, ctx.prepared.transposed, ctx.prepared.transposed_scale, ctx.sizes, x.dtype)
        if ctx.needs_input_grad[1]:
            dw = torch.empty(ctx.weight_shape, dtype=ctx.weight_dtype, device=dy.device)
            for e, size in enumerate(ctx.sizes):
                if not size:
                    dw[e].zero_()
            for e, start, stop in segments(ctx.sizes):
                dw[e] = _expert_wgrad(dy[start:stop], x[start:stop], recipe, ctx.seed, e, ctx.nonfinite, dw.dtype)
        return dx, dw, None, None, None, None, None


def _expert_wgrad(
    dy: Tensor, x: Tensor, recipe: Recipe, seed: int | None, expert: int, nonfinite: NonFinite, dtype: torch.dtype
) -> Tensor:
    assert recipe.dy_wgrad is not None
    draw = Shard().draw("dy_wgrad", seed + expert) if recipe.dy_wgrad.needs_seed and seed is not None else None
    _, dy_t = quantise_tiles(dy, column=recipe.dy_wgrad, column_draw=draw, nonfinite=nonfinite)
    _, x_t = quantise_tiles(x, column=recipe.x_wgrad, column_form=Form.SQUARE, nonfinite=nonfinite)
    assert dy_t is not None
    assert x_t is not None
    return matmul(dy_t, x_t, torch.float32 if dtype == torch.float32 else torch.bfloat16)
