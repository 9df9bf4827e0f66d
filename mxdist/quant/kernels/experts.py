"""The experts of a MoE layer on FP8 tensor cores, with the quantisers fused into their steps: rows in, rows out.

    h   = Q(rows) W1^T           gate before up
    a   = silu(gate) up          quantised as it is computed
    y   = Q(a) W2^T
    da  = Q(dy) W2;  dh from da and h;  drows = Q(dh) W1

Rows and a are kept for the weights' gradients, a byte an element; those contract over each expert's rows. Routing
probabilities are not known here: they multiply y, because p Q(a) is not Q(p a), and engines compute the former.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxdist.quant.format import TILE
from mxdist.quant.kernels.forms import Form
from mxdist.quant.kernels.gemm import Blocks, multiply_blocks
from mxdist.quant.kernels.nonfinite import Flag
from mxdist.quant.kernels.options import Random, options_of
from mxdist.quant.kernels.permute import without_filling
from mxdist.quant.kernels.plan import Gemm
from mxdist.quant.kernels.prepared import HopperWeight
from mxdist.quant.kernels.quant_experts import ROWS_THERE, SWIGLU, Wanted, quantise_experts
from mxdist.quant.kernels.segments import ByColumn, ByRow, Segments
from mxdist.quant.kernels.swiglu import swiglu_backward
from mxdist.quant.linear import Shard
from mxdist.quant.recipe import Operand, Recipe
from mxdist.quant.reference import NonFinite

Totals = tuple[Sequence[Tensor], Sequence[Tensor]]
"""float32 tensors [N, K] of W1 and of W2, one for each expert, that gradients are added to."""


def fused_experts_lack(weights: Sequence[object], recipe: Recipe, dtype: torch.dtype) -> str | None:
    """Return why `experts_mlp` does not do experts with these prepared weights, or None when it does."""
    if dtype != torch.bfloat16:
        return f"fused experts compute in bfloat16, not in {dtype}"
    if recipe.x_fwd is not None and recipe.x_fwd.fallback is not None:
        return "fused experts have no outlier fallback"
    if not all(isinstance(weight, HopperWeight) for weight in weights):
        return "a weight has no FP8 operands"
    plans = {id(weight.plan): weight.plan for weight in weights if isinstance(weight, HopperWeight)}
    for chosen in plans.values():
        for part in (chosen.forward, chosen.dgrad, chosen.wgrad):
            if part.gemm is not Gemm.BLOCK:
                return f"fused experts run with 1x128 by 128x128 scales alone: {part.reason}"
    return None


def experts_mlp(
    rows: Tensor,
    w1: Sequence[Tensor],
    w2: Sequence[Tensor],
    prepared: tuple[Sequence[HopperWeight], Sequence[HopperWeight]],
    segments: Segments,
    recipe: Recipe,
    *,
    seed: int | None = None,
    nonfinite: NonFinite = "error",
    totals: Totals | None = None,
) -> Tensor:
    """Return W2 (silu(gate) up) of every row, [rows, H] bfloat16; gate, up = W1 x; W1 and W2 those of its expert.

    rows       bfloat16 [rows, H], sorted by expert, last axis contiguous.
    w1, w2     master weights [2 F, H] and [H, F] of each expert, which receive the gradients.
    prepared   made from them by `backend.prepare_weight`; `fused_experts_lack` says whether they will do.
    segments   made for the experts' sizes; experts of no rows and of one are fine.
    seed       needed when gradients are rounded stochastically; expert e draws with seed + e.
    totals     gradients of weights are added there, and none come back through w1 and w2.

    Differentiable in rows, w1 and w2. Never waits for the device unless nonfinite is "error".
    """
    sizes = segments.sizes
    if sum(sizes) != len(rows) or not len(sizes) == len(w1) == len(w2):
        raise ValueError(f"{len(sizes)} expert sizes adding up to {sum(sizes)} do not fit {len(w1)} experts' rows.")
    operands = tuple(tuple(_operands(weight) for weight in layer) for layer in prepared)
    keeps = tuple(torch.is_grad_enabled() and any(w.requires_grad for w in layer) for layer in (w1, w2))
    site = _Site(operands, segments, recipe, seed, nonfinite, totals, keeps)
    return _Experts.apply(site, rows, *w1, *w2)


def _operands(weight: HopperWeight) -> tuple[Blocks, Blocks]:
    assert weight.rights is not None
    forward, transposed = weight.rights
    assert transposed is not None
    return forward, transposed


@dataclass(frozen=True, slots=True, eq=False)
class _Site:
    """What forward and backward share."""

    operands: tuple[tuple[tuple[Blocks, Blocks], ...], ...]  # by layer and expert: W and W^T
    segments: Segments
    recipe: Recipe
    seed: int | None
    nonfinite: NonFinite
    totals: Totals | None
    keeps: tuple[bool, ...]  # by layer, whether gradients of its weights will be asked for

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

    def multiply(self, rows: ByRow, layer: int, transposed: bool) -> Tensor:
        """Rows times each expert's weight: [rows, N], or [rows, K] with the transposed weight."""
        weights = [both[transposed] for both in self.operands[layer]]
        out = torch.empty(self.segments.rows, weights[0].data.shape[1], dtype=torch.bfloat16, device=rows.data.device)
        parts = out.split([TILE * count for count in self.segments.tiles])
        for size, a, b, part in zip(self.segments.sizes, rows.lefts(self.segments), weights, parts, strict=True):
            if size:
                multiply_blocks(a, b, part)
        return out

    def weight_gradients(self, dy: ByColumn, x: ByColumn, layer: int, dtype: torch.dtype) -> list[Tensor | None]:
        """Every expert's dY^T X, of the master weights' dtype; or none, but added to the totals."""
        sizes, totals = self.segments.sizes, self.totals
        if totals is None:
            shape = (len(sizes), dy.features, x.features)
            into = torch.empty(shape, dtype=dtype, device=dy.data.device).unbind()
        else:
            into = tuple(totals[layer])
        for size, a, b, dw in zip(sizes, dy.lefts(self.segments), x.rights(self.segments), into, strict=True):
            if size:
                multiply_blocks(a, b, dw, add=totals is not None)
        if totals is not None:
            return [None] * len(sizes)
        return [dw if size else dw.zero_() for size, dw in zip(sizes, into, strict=True)]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, site: _Site, rows: Tensor, *weights: Tensor) -> Tensor:
        flag, segments = Flag(rows.device, site.nonfinite), site.segments
        column_1, column_2 = ("x_wgrad" if keeps else None for keeps in site.keeps)
        x, columns_1 = site.quantise(rows, "x_fwd", column_1, 0, flag, Form.SQUARE)
        h = site.multiply(x, 0, transposed=False)
        a, columns_2 = site.quantise(h, "x_fwd", column_2, 1, flag, Form.SQUARE, source=SWIGLU)
        y = site.multiply(a, 1, transposed=False)
        flag.raise_if_set(rows, "expert input")
        ctx.save_for_backward(h)
        ctx.site, ctx.columns, ctx.dtype = site, (columns_1, columns_2), weights[0].dtype
        return without_filling(y, segments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        site: _Site = ctx.site
        flag = Flag(grads[0].device, site.nonfinite)
        (h,) = ctx.saved_tensors
        columns_1, columns_2 = ctx.columns
        dy = grads[0].contiguous()
        dw1: list[Tensor | None] = [None] * len(site.segments.sizes)
        dw2, dx = dw1, None
        rows, columns = site.quantise(dy, "dy_dgrad", "dy_wgrad" if columns_2 else None, 1, flag)
        if columns and columns_2:
            dw2 = site.weight_gradients(columns, columns_2, 1, ctx.dtype)
        dh = swiglu_backward(site.multiply(rows, 1, transposed=True), h)
        rows, columns = site.quantise(
            dh, "dy_dgrad", "dy_wgrad" if columns_1 else None, 0, flag, source=ROWS_THERE
        )  # fmt: skip
        if columns and columns_1:
            dw1 = site.weight_gradients(columns, columns_1, 0, ctx.dtype)
        if ctx.needs_input_grad[1]:
            dx = without_filling(site.multiply(rows, 0, transposed=True), site.segments)
        flag.raise_if_set(dy, "expert gradient")
        return None, dx, *dw1, *dw2
