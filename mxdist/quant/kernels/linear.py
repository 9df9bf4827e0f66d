"""`mx_linear` on FP8 tensor cores: the same function by other GEMMs, those that its weight was prepared for.

Quantised values are those of the reference, bit for bit; products are exact to the rounding of their output, while the
reference multiplies in the input's dtype. One exception: rotated operands of dW are multiplied rotated, so that for
token counts that are no multiple of 32 the quantisation noise which rotating spread into the padding counts, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.format import TILE
from mxdist.quant.kernels import quant_terms
from mxdist.quant.kernels.dequantise import dequantise
from mxdist.quant.kernels.forms import Form, Fp8Matrix
from mxdist.quant.kernels.gemm import accumulate, multiply, right
from mxdist.quant.kernels.plan import Gemm, Plan
from mxdist.quant.kernels.prepared import HopperWeight
from mxdist.quant.kernels.quant_residual import quantise_with_residual
from mxdist.quant.kernels.quant_rows import quantise_rows
from mxdist.quant.kernels.quant_tiles import quantise_tiles
from mxdist.quant.layout import as_rows
from mxdist.quant.linear import Shard
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Operand, Recipe
from mxdist.quant.reference import NonFinite
from mxdist.quant.transform import Frozen


def _listed(frozen: Frozen | None) -> Tensor | None:
    return None if frozen is None else frozen.tiles


def kernel_linear(
    x: Tensor,
    weight: Tensor,
    weight_q: HopperWeight,
    recipe: Recipe,
    bias: Tensor | None = None,
    *,
    seed: int | None = None,
    shard: Shard | None = None,
    frozen: Frozen | None = None,
    name: str = "linear",
    nonfinite: NonFinite = "error",
    total: Tensor | None = None,
) -> Tensor:
    """Return Q(x) @ weight_q^T + bias; arguments as for `mxdist.quant.linear.mx_linear`, x bfloat16 or float32.

    weight_q   made by `prepared.prepare_weight` for the same recipe and the same listed tiles.
    nonfinite  "error" waits for the device in every quantiser; "propagate" never does.

    Runs whatever the device: on a CPU Triton's interpreter runs the kernels, for the tests.
    """
    keeps = torch.is_grad_enabled() and weight.requires_grad  # `apply` disables gradients before it asks
    site = _Site(recipe, weight_q.plan, weight_q, seed, shard or _WHOLE, frozen, name, nonfinite, keeps, total)
    return _HopperLinear.apply(x, weight, bias, site)


_WHOLE = Shard()


@dataclass(slots=True, eq=False)  # freezing would double what making one takes, in every call
class _Site:
    """What forward and backward of one call share. Nobody changes it."""

    recipe: Recipe
    plan: Plan
    weight: HopperWeight
    seed: int | None
    shard: Shard
    frozen: Frozen | None
    name: str
    nonfinite: NonFinite
    keeps: bool  # dW will be asked for
    total: Tensor | None  # what dW is added to

    def draw(self, which: str) -> Draw | None:
        """The random numbers of the operand called `which`."""
        operand: Operand = getattr(self.recipe, which)
        if not operand.needs_seed:
            return None
        if self.seed is None:
            raise ValueError(f"recipe {self.recipe.name!r} draws random numbers: {self.name} needs a seed.")
        return self.shard.draw(which, self.seed)

    def rows(self, tensor: Tensor, which: str, gemm: Gemm) -> Fp8Matrix:
        """Quantise [tokens, features] along features."""
        operand, name = getattr(self.recipe, which), f"{self.name} {which}"
        if gemm is Gemm.ROW:
            return quantise_rows(tensor, operand, draw=self.draw(which), name=name, nonfinite=self.nonfinite)
        if operand.fallback is not None:
            return quantise_with_residual(
                tensor, operand, _listed(self.frozen), draw=self.draw(which), name=name, nonfinite=self.nonfinite
            )
        by_row, _ = self._tiles(tensor, which, None)
        assert by_row is not None
        return by_row

    def columns(self, tensor: Tensor, which: str, form: Form) -> Fp8Matrix:
        """Quantise [tokens, features] along tokens; comes out [features, tokens]."""
        _, by_column = self._tiles(tensor, None, which, form)
        assert by_column is not None
        return by_column

    def both(self, tensor: Tensor, row: str, column: str, gemm: Gemm, form: Form) -> tuple[Fp8Matrix, Fp8Matrix]:
        """Quantise [tokens, features] along features and along tokens, from one read where that can be."""
        if gemm is Gemm.ROW or getattr(self.recipe, row).fallback is not None:
            return self.rows(tensor, row, gemm), self.columns(tensor, column, form)
        by_row, by_column = self._tiles(tensor, row, column, form)
        assert by_row is not None
        assert by_column is not None
        return by_row, by_column

    def values(self, tensor: Tensor, which: str) -> Tensor:
        """Quantised values [tokens, features] of the tensor's dtype, blocks along features."""
        return quant_terms.fake_quantise(
            tensor,
            getattr(self.recipe, which),
            seed=self.draw(which),
            frozen=self.frozen if which == "x_fwd" else None,
            name=f"{self.name} {which}",
            nonfinite=self.nonfinite,
            dtype=tensor.dtype,
        )

    def _tiles(
        self, tensor: Tensor, row: str | None, column: str | None, form: Form = Form.TILE
    ) -> tuple[Fp8Matrix | None, Fp8Matrix | None]:
        return quantise_tiles(
            tensor,
            getattr(self.recipe, row) if row else None,
            getattr(self.recipe, column) if column else None,
            column_form=form,
            row_draw=self.draw(row) if row else None,
            column_draw=self.draw(column) if column else None,
            name=f"{self.name} {row or column}",
            nonfinite=self.nonfinite,
        )


class _HopperLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, site: _Site) -> Tensor:
        rows, want_weight = as_rows(x), site.keeps
        forward, wgrad = site.plan.forward.gemm, site.plan.wgrad.gemm
        form = Form.SQUARE if wgrad is Gemm.BLOCK else Form.TILE
        # What is kept for dW: a byte per element, along tokens where dW is FP8, as the forward's operand otherwise.
        ctx.site, ctx.x_kept, ctx.x_t = site, None, None
        x_q: Tensor | Fp8Matrix
        if forward is Gemm.BF16:
            x_q = site.values(rows, "x_fwd")
            y = F.linear(x_q, site.weight.dequantise(x.dtype))
            if want_weight and wgrad is not Gemm.BF16:
                ctx.x_t = site.columns(rows, "x_wgrad", form)
        else:
            if want_weight and wgrad is not Gemm.BF16:
                x_q, ctx.x_t = site.both(rows, "x_fwd", "x_wgrad", forward, form)
            else:
                x_q = site.rows(rows, "x_fwd", forward)
            y = site.weight.product(x_q, x.dtype)
        ctx.x_kept = x_q if want_weight and wgrad is Gemm.BF16 else None
        ctx.weight_dtype, ctx.bias_dtype, ctx.shape = weight.dtype, None if bias is None else bias.dtype, x.shape
        if bias is not None:
            y += bias.to(y.dtype)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        site: _Site = ctx.site
        dy = as_rows(grads[0])
        want_x, want_weight, want_bias, _ = ctx.needs_input_grad
        dx = dw = db = None
        dgrad, wgrad = site.plan.dgrad.gemm, site.plan.wgrad.gemm
        dy_rows = dy_columns = None
        if want_x and want_weight and dgrad is not Gemm.BF16 and wgrad is not Gemm.BF16:
            dy_rows, dy_columns = site.both(dy, "dy_dgrad", "dy_wgrad", dgrad, Form.TILE)
        if want_x:
            dx = _dgrad(site, dy, dy_rows).view(ctx.shape)
        if want_weight:
            dw = _wgrad(site, dy, dy_columns, ctx)
        if want_bias:
            db = dy.sum(0).to(ctx.bias_dtype)
        return dx, dw, db, None


def _dgrad(site: _Site, dy: Tensor, dy_rows: Fp8Matrix | None) -> Tensor:
    gemm = site.plan.dgrad.gemm
    if gemm is Gemm.BF16:
        if site.recipe.dy_dgrad is not None:
            dy = site.values(dy, "dy_dgrad")
        return dy @ site.weight.dequantise(dy.dtype)
    return site.weight.transposed_product(dy_rows or site.rows(dy, "dy_dgrad", gemm), dy.dtype)


def _wgrad(site: _Site, dy: Tensor, dy_columns: Fp8Matrix | None, ctx: Any) -> Tensor | None:
    """dW of the weight's dtype; or None, but added to the total."""
    if site.plan.wgrad.gemm is Gemm.BF16:
        dw = dy.t() @ _kept_values(site, ctx.x_kept, ctx.shape[-1], dy.dtype)
    else:
        columns, x = dy_columns or site.columns(dy, "dy_wgrad", Form.TILE), right(ctx.x_t)
        if site.total is not None:
            accumulate(site.total, columns, x)
            return None
        dw = multiply(columns, x, torch.float32 if ctx.weight_dtype == torch.float32 else torch.bfloat16)
    if site.total is not None:
        site.total.add_(dw)
        return None
    return dw.to(ctx.weight_dtype)


def _kept_values(site: _Site, kept: Tensor | Fp8Matrix, k: int, dtype: torch.dtype) -> Tensor:
    """The forward's X [tokens, k], residuals of listed tiles added."""
    if isinstance(kept, Tensor):
        return kept.to(dtype)
    if kept.k == k:
        return dequantise(kept, dtype)
    values, tiles = dequantise(kept, torch.float32), _listed(site.frozen)
    assert tiles is not None
    total = values[:, :k].view(-1, k // TILE, TILE)
    total.index_add_(1, tiles.to(values.device), values[:, k:].view(-1, len(tiles), TILE))
    return total.flatten(1).to(dtype)
