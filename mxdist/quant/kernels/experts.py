"""The experts of a MoE layer, tokens in and tokens out, on FP8 tensor cores with the quantisers fused into its steps.

    rows   copies of tokens, quantised from the tokens         h   = rows W1^T       gate before up
    a      p silu(gate) up, quantised as it is computed        y   = a W2^T          out[t] = sum of t's rows of y
    dy     copies of the tokens' gradients, quantised from them; da = dy W2; dh from da and h; dx[t] = sum of dh W1

Rows and a are kept for the weights' gradients, a byte an element; those contract over each expert's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxdist.errors import UserError
from mxdist.quant.kernels.forms import Form
from mxdist.quant.kernels.gemm import matmul
from mxdist.quant.kernels.nonfinite import Flag
from mxdist.quant.kernels.options import Random, options_of
from mxdist.quant.kernels.permute import gather_rows, sum_copies
from mxdist.quant.kernels.plan import Gemm, plan
from mxdist.quant.kernels.quant_experts import ROWS_THERE, SWIGLU, Wanted, quantise_experts
from mxdist.quant.kernels.quant_tiles import quantise_tiles
from mxdist.quant.kernels.quant_weight import Fp8Weight, quantise_weight
from mxdist.quant.kernels.segments import ByColumn, ByRow, Segments
from mxdist.quant.kernels.swiglu import swiglu_backward
from mxdist.quant.linear import Shard
from mxdist.quant.recipe import Operand, Recipe
from mxdist.quant.reference import NonFinite

BYTES_PAY_FROM = 3
"""Copies per token from which quantising tokens once and copying bytes beats quantising every copy."""


def prepare_expert_weights(weight: Tensor, recipe: Recipe, nonfinite: NonFinite = "error") -> tuple[Fp8Weight, ...]:
    """Quantise master weights [E, N, K], once per optimizer step, for `experts_mlp`.

    UserError unless all three GEMMs of the recipe run with 1 x 128 by 128 x 128 scales; `grouped` does others.
    """
    chosen = plan(recipe, weight.shape[1], weight.shape[2])
    if any(part.gemm is not Gemm.BLOCK for part in (chosen.forward, chosen.dgrad, chosen.wgrad)) or recipe.w is None:
        raise UserError(
            f"fused experts run in FP8 with 1x128 by 128x128 scales only, which recipe {recipe.name!r} at "
            f"[{weight.shape[1]}, {weight.shape[2]}] does not allow: use mxdist.quant.kernels.grouped."
        )
    operand = recipe.w
    return tuple(
        quantise_weight(each.detach(), operand, form=Form.SQUARE, nonfinite=nonfinite) for each in weight.unbind()
    )


def experts_mlp(
    x: Tensor,
    probabilities: Tensor,
    w1: Tensor,
    w2: Tensor,
    prepared: tuple[Sequence[Fp8Weight], Sequence[Fp8Weight]],
    segments: Segments,
    recipe: Recipe,
    *,
    seed: int | None = None,
    nonfinite: NonFinite = "error",
) -> Tensor:
    """Return sum over a token's local experts of p W2 (silu(gate) up), [T, H] bfloat16; gate, up = W1 x.

    x              bfloat16 [T, H], last axis contiguous.
    probabilities  float32 [T, copies], the routing weights, like the experts that `segments` was made from.
    w1, w2         master weights [E, 2 F, H] and [E, H, F], which receive the gradients; `prepared` is made from them.
    seed           needed when gradients are rounded stochastically; expert e draws with seed + e.

    Differentiable in x, probabilities, w1 and w2. H and F are multiples of 128.
    """
    return _Experts.apply(x, probabilities, w1, w2, _Site(prepared, segments, recipe, seed, nonfinite))


@dataclass(frozen=True, slots=True, eq=False)
class _Site:
    """What forward and backward share."""

    prepared: tuple[Sequence[Fp8Weight], Sequence[Fp8Weight]]
    segments: Segments
    recipe: Recipe
    seed: int | None
    nonfinite: NonFinite

    def wanted(self, which: str, layer: int) -> Wanted:
        """The operand called `which` of the first or second linear."""
        operand: Operand = getattr(self.recipe, which)
        draw = Shard().draw(which, self.seed + (layer << 32)) if operand.needs_seed and self.seed is not None else None
        return Wanted(options_of(operand), Random.of(draw, 0, operand.rounding == "stochastic"))

    def quantise(
        self, x: Tensor, row: str, column: str | None, layer: int, flag: Flag, column_form: Form = Form.TILE,
        **source: Any,
    ) -> tuple[ByRow, ByColumn | None]:  # fmt: skip
        """Quantise what `quantise_experts` produces from x along K and, unless `column` is None, along tokens."""
        return quantise_experts(
            x, self.segments, row=self.wanted(row, layer), column=self.wanted(column, layer) if column else None,
            column_form=column_form, flag=flag, **source,
        )  # fmt: skip

    def rows_of(self, tokens: Tensor, flag: Flag) -> ByRow:
        """The experts' rows of tokens [T, K] for a forward pass alone."""
        assert self.recipe.x_fwd is not None
        if not self.recipe.x_fwd.needs_seed and self.segments.rows >= BYTES_PAY_FROM * len(tokens):
            by_row, _ = quantise_tiles(tokens, self.recipe.x_fwd, nonfinite=self.nonfinite)
            assert by_row is not None
            return gather_rows(by_row, self.segments)
        return self.quantise(tokens, "x_fwd", None, 0, flag)[0]

    def multiply(self, rows: ByRow, layer: int, transposed: bool) -> Tensor:
        """Rows times each expert's weight: [rows, N], or [rows, K] with the transposed weight."""
        weights = [w.transposed if transposed else w.forward for w in self.prepared[layer]]
        out = torch.empty(rows.data.shape[0], weights[0].rows, dtype=torch.bfloat16, device=rows.data.device)
        for e, size in enumerate(self.segments.sizes):
            if size:
                matmul(rows.expert(self.segments, e), weights[e], out=out[self.segments.span(e)])
        return out

    def weight_gradient(self, dy: ByColumn, x: ByColumn, like: Tensor) -> Tensor:
        """Every expert's dY^T X, of the master weight's dtype."""
        dw = torch.empty_like(like)
        for e, size in enumerate(self.segments.sizes):
            if size:
                matmul(dy.expert(self.segments, e), x.expert(self.segments, e), dw.dtype, dw[e])
            else:
                dw[e].zero_()
        return dw


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probabilities: Tensor, w1: Tensor, w2: Tensor, site: _Site) -> Tensor:
        flag, segments = Flag(x.device, site.nonfinite), site.segments
        p = segments.spread(probabilities)
        columns_1 = columns_2 = None
        if ctx.needs_input_grad[2]:
            rows, columns_1 = site.quantise(x, "x_fwd", "x_wgrad", 0, flag, Form.SQUARE)
        else:
            rows = site.rows_of(x, flag)
        h = site.multiply(rows, 0, transposed=False)
        column = "x_wgrad" if ctx.needs_input_grad[3] else None
        a, columns_2 = site.quantise(h, "x_fwd", column, 1, flag, Form.SQUARE, source=SWIGLU, probabilities=p)
        y = site.multiply(a, 1, transposed=False)
        flag.raise_if_set(x, "expert input")
        ctx.save_for_backward(p, h, w1, w2)
        ctx.site, ctx.columns = site, (columns_1, columns_2)
        return sum_copies(y, segments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        site: _Site = ctx.site
        segments, flag = site.segments, Flag(grads[0].device, site.nonfinite)
        p, h, w1, w2 = ctx.saved_tensors
        want_x, want_p, want_1, want_2, _ = ctx.needs_input_grad
        dy = grads[0].contiguous()
        dx = dw1 = dw2 = None
        rows, columns = site.quantise(dy, "dy_dgrad", "dy_wgrad" if want_2 else None, 1, flag)
        if columns:
            dw2 = site.weight_gradient(columns, ctx.columns[1], w2)
        dh, dp = swiglu_backward(site.multiply(rows, 1, transposed=True), h, p)
        rows, columns = site.quantise(dh, "dy_dgrad", "dy_wgrad" if want_1 else None, 0, flag, source=ROWS_THERE)
        if columns:
            dw1 = site.weight_gradient(columns, ctx.columns[0], w1)
        if want_x:
            dx = sum_copies(site.multiply(rows, 0, transposed=True), segments)
        flag.raise_if_set(dy, "expert gradient")
        return dx, segments.collect(dp) if want_p else None, dw1, dw2, None
