"""`mx_linear` on FP8 tensor cores: the function of `mxdist.quant.linear.mx_linear`, by the GEMMs that `plan` chooses.

Quantised values are those of the reference, bit for bit; products are exact to the rounding of their output, while the
reference multiplies in the input's dtype.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mxdist.quant import linear as reference
from mxdist.quant.e4m3 import to_e4m3
from mxdist.quant.kernels.dequantise import dequantise
from mxdist.quant.kernels.forms import Form, Fp8Matrix
from mxdist.quant.kernels.gemm import matmul
from mxdist.quant.kernels.plan import Gemm, Plan, device_lacks, plan
from mxdist.quant.kernels.quant_rows import quantise_rows
from mxdist.quant.kernels.quant_tiles import quantise_tiles
from mxdist.quant.kernels.quant_weight import quantise_weight
from mxdist.quant.layout import as_rows
from mxdist.quant.linear import Shard
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Operand, Recipe
from mxdist.quant.reference import NonFinite, quantise
from mxdist.quant.transform import Frozen

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HopperWeight:
    """A quantised weight [N, K] as GEMM operands; made once per optimizer step by `prepare_weight`.

    transposed is None for weights with macro factors, which have no FP8 form along N.
    """

    forward: Fp8Matrix
    transposed: Fp8Matrix | None


def prepare_weight(
    weight: Tensor, recipe: Recipe, *, name: str = "weight", nonfinite: NonFinite = "error"
) -> HopperWeight | Tensor:
    """Quantise a master weight [N, K] into what `mx_linear` here takes as `weight_q`.

    Where the plan is the reference, that is a dequantised tensor of the weight's dtype.
    """
    assert recipe.w is not None, "a recipe that leaves weights alone has no quantised weight"
    weight = weight.detach()
    choice = plan(recipe, *weight.shape)
    if choice.forward.gemm is Gemm.REFERENCE or device_lacks(weight.device) is not None:
        return quantise(weight, recipe.w, name=name, nonfinite=nonfinite).dequantise(weight.dtype)
    if recipe.w.macro is not None:
        data, scale = to_e4m3(quantise(weight, recipe.w, name=name, nonfinite=nonfinite))
        return HopperWeight(Fp8Matrix(data, scale.t().contiguous().t(), Form.TILE, weight.shape[1]), None)
    both = quantise_weight(weight, recipe.w, form=choice.weight_form, name=name, nonfinite=nonfinite)
    return HopperWeight(both.forward, both.transposed)


def mx_linear(
    x: Tensor,
    weight: Tensor,
    weight_q: Tensor | HopperWeight | None,
    recipe: Recipe,
    bias: Tensor | None = None,
    *,
    seed: int | None = None,
    shard: Shard | None = None,
    frozen: Frozen | None = None,
    name: str = "linear",
    nonfinite: NonFinite = "error",
) -> Tensor:
    """Return Q(x) @ weight_q^T + bias; arguments as for `mxdist.quant.linear.mx_linear`.

    weight_q   a `HopperWeight`, or the dequantised weight, which is then turned into bytes on every call (exact: on
               quantised values rounding changes nothing). Weights with macro factors need a `HopperWeight`.
    nonfinite  "error" waits for the device in every quantiser; "propagate" never does.

    Falls back to the reference, and says so once, where the plan or the device asks for it.
    """
    choice = plan(recipe, *weight.shape) if recipe.quantises else None
    lacking = device_lacks(x.device)
    if choice is None or lacking is not None or _needs_reference(choice, weight_q, recipe, x):
        if choice is not None:
            _say_once(name, lacking or choice.why())
        if isinstance(weight_q, HopperWeight):
            weight_q = dequantise(weight_q.forward, x.dtype)
        return reference.mx_linear(
            x, weight, weight_q, recipe, bias, seed=seed, shard=shard, frozen=frozen, name=name, nonfinite=nonfinite
        )
    if weight_q is None:
        raise ValueError(f"recipe {recipe.name!r} quantises weights: {name} needs weight_q, the quantised weight.")
    if isinstance(weight_q, Tensor):
        operand = Operand(square=recipe.w.square, scale_rule=recipe.w.scale_rule) if recipe.w else Operand()
        both = quantise_weight(weight_q.detach(), operand, form=choice.weight_form, name=name, nonfinite="propagate")
        weight_q = HopperWeight(both.forward, both.transposed)
    return _HopperLinear.apply(
        x, weight, bias, _Site(recipe, choice, weight_q, seed, shard or Shard(), name, nonfinite)
    )


def _needs_reference(choice: Plan, weight_q: Tensor | HopperWeight | None, recipe: Recipe, x: Tensor) -> bool:
    if any(part.gemm is Gemm.REFERENCE for part in (choice.forward, choice.dgrad, choice.wgrad)):
        return True
    if x.dtype not in (torch.bfloat16, torch.float32):
        return True
    return recipe.w is not None and recipe.w.macro is not None and isinstance(weight_q, Tensor)


@lru_cache
def _say_once(name: str, reason: str) -> None:
    _log.warning("%s runs on the reference backend: %s", name, reason)


@dataclass(frozen=True, slots=True, eq=False)
class _Site:
    """What forward and backward of one call share."""

    recipe: Recipe
    plan: Plan
    weight: HopperWeight
    seed: int | None
    shard: Shard
    name: str
    nonfinite: NonFinite

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
        if gemm is Gemm.ROW:
            operand, draw, name = getattr(self.recipe, which), self.draw(which), f"{self.name} {which}"
            return quantise_rows(tensor, operand, draw=draw, name=name, nonfinite=self.nonfinite)
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
        if gemm is Gemm.ROW:
            return self.rows(tensor, row, gemm), self.columns(tensor, column, form)
        by_row, by_column = self._tiles(tensor, row, column, form)
        assert by_row is not None
        assert by_column is not None
        return by_row, by_column

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
        rows = as_rows(x)
        ctx.site, ctx.x8, ctx.x_t = site, None, None
        # One byte per element is kept for dW: along tokens where dW is FP8, as the forward's operand otherwise.
        if ctx.needs_input_grad[1] and site.plan.wgrad.gemm is not Gemm.BF16:
            form = Form.SQUARE if site.plan.wgrad.gemm is Gemm.BLOCK else Form.TILE
            x8, ctx.x_t = site.both(rows, "x_fwd", "x_wgrad", site.plan.forward.gemm, form)
        else:
            x8 = site.rows(rows, "x_fwd", site.plan.forward.gemm)
            ctx.x8 = x8 if ctx.needs_input_grad[1] else None
        y = matmul(x8, site.weight.forward, x.dtype)
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
        fp8 = [part.gemm not in (Gemm.BF16, Gemm.REFERENCE) for part in (site.plan.dgrad, site.plan.wgrad)]
        dy_rows = dy_columns = None
        if want_x and want_weight and all(fp8):
            dy_rows, dy_columns = site.both(dy, "dy_dgrad", "dy_wgrad", site.plan.dgrad.gemm, Form.TILE)
        if want_x:
            dx = _dgrad(site, dy, dy_rows).view(ctx.shape)
        if want_weight:
            dw = _wgrad(site, dy, dy_columns, ctx).to(ctx.weight_dtype)
        if want_bias:
            db = dy.sum(0).to(ctx.bias_dtype)
        return dx, dw, db, None


def _dgrad(site: _Site, dy: Tensor, dy_rows: Fp8Matrix | None) -> Tensor:
    gemm = site.plan.dgrad.gemm
    if gemm is Gemm.BF16:
        if site.recipe.dy_dgrad is not None:
            dy = dequantise(site.rows(dy, "dy_dgrad", Gemm.TILE), dy.dtype)
        return dy @ dequantise(site.weight.forward, dy.dtype)
    assert site.weight.transposed is not None
    return matmul(dy_rows or site.rows(dy, "dy_dgrad", gemm), site.weight.transposed, dy.dtype)


def _wgrad(site: _Site, dy: Tensor, dy_columns: Fp8Matrix | None, ctx: Any) -> Tensor:
    if site.plan.wgrad.gemm is not Gemm.BF16:
        dtype = torch.float32 if ctx.weight_dtype == torch.float32 else torch.bfloat16
        return matmul(dy_columns or site.columns(dy, "dy_wgrad", Form.TILE), ctx.x_t, dtype)
    return dy.t() @ dequantise(ctx.x8, dy.dtype)
