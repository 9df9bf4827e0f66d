"""`mx_linear` on FP8 tensor cores: the function of `mxdist.quant.linear.mx_linear`, by the GEMMs that `plan` chooses.

Quantised values are those of the reference, bit for bit; products are exact to the rounding of their output, while the
reference multiplies in the input's dtype. One exception: rotated operands of dW are multiplied rotated, so that for
token counts that are no multiple of 32 the quantisation noise which rotating spread into the padding counts, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant import linear as reference
from mxdist.quant.backend import say_once
from mxdist.quant.format import TILE
from mxdist.quant.kernels import quant_terms
from mxdist.quant.kernels.dequantise import dequantise
from mxdist.quant.kernels.forms import Form, Fp8Matrix, empty_tiles
from mxdist.quant.kernels.gemm import matmul
from mxdist.quant.kernels.plan import Gemm, Plan, device_lacks, plan, without_bytes
from mxdist.quant.kernels.quant_residual import quantise_with_residual, repeat_tiles, room_for_tiles
from mxdist.quant.kernels.quant_rows import quantise_rows
from mxdist.quant.kernels.quant_tiles import quantise_tiles
from mxdist.quant.kernels.quant_weight import Fp8Weight, quantise_weight
from mxdist.quant.layout import as_rows
from mxdist.quant.linear import Shard
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Operand, Recipe
from mxdist.quant.reference import NonFinite, quantise
from mxdist.quant.transform import Frozen


@dataclass(frozen=True, slots=True)
class HopperWeight:
    """A quantised weight [N, K] as GEMM operands; made once per optimizer step by `prepare_weight`.

    forward     bytes, or None where products run on values
    transposed  the same bytes [K, N]; None for weights with a macro factor per tile, which have no FP8 form along N
    longer      [N, K + 128 n]: forward and copies of the n tiles whose activations have a residual, or None
    values      dequantised [N, K], instead of bytes
    """

    forward: Fp8Matrix | None
    transposed: Fp8Matrix | None = None
    longer: Fp8Matrix | None = None
    values: Tensor | None = None

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return W_q [N, K]."""
        if self.values is not None:
            return self.values.to(dtype)
        assert self.forward is not None
        return dequantise(self.forward, dtype)


def prepare_weight(
    weight: Tensor,
    recipe: Recipe,
    *,
    frozen: Frozen | None = None,
    name: str = "weight",
    nonfinite: NonFinite = "error",
) -> HopperWeight | Tensor:
    """Quantise a master weight [N, K] into what `mx_linear` here takes as `weight_q`, for the same `frozen`.

    Where the plan is the reference, that is a dequantised tensor of the weight's dtype.
    """
    assert recipe.w is not None, "a recipe that leaves weights alone has no quantised weight"
    weight = weight.detach()
    choice = plan(recipe, weight.shape[0], weight.shape[1], _listed(frozen) is not None)
    if choice.forward.gemm is Gemm.REFERENCE or device_lacks(weight.device) is not None:
        return quantise(weight, recipe.w, name=name, nonfinite=nonfinite).dequantise(weight.dtype)
    return weight_operands(weight, recipe, choice, frozen, name, nonfinite)


def weight_operands(
    weight: Tensor, recipe: Recipe, choice: Plan, frozen: Frozen | None, name: str, nonfinite: NonFinite
) -> HopperWeight:
    """Quantise a weight for a plan that is not the reference."""
    assert recipe.w is not None
    if choice.forward.gemm is Gemm.BF16:
        values = quant_terms.fake_quantise(weight, recipe.w, name=name, nonfinite=nonfinite, dtype=weight.dtype)
        return HopperWeight(None, values=values)
    (n, k), form, tiles = weight.shape, choice.weight_form, _listed(frozen)
    longer = own = None
    if tiles is not None and recipe.x_fwd is not None and recipe.x_fwd.fallback is not None:
        longer, own = room_for_tiles(n, k, form, len(tiles), weight.device)
    if form is Form.TILE:
        forward = quantise_with_residual(weight, recipe.w, name=name, nonfinite=nonfinite, out=own)
        result = HopperWeight(forward, longer=longer)
    else:
        out = Fp8Weight(own, empty_tiles(k, n, form, weight.device)) if own else None
        both = quantise_weight(weight, recipe.w, form=form, out=out, name=name, nonfinite=nonfinite)
        result = HopperWeight(both.forward, both.transposed, longer)
    if longer is not None and tiles is not None:
        repeat_tiles(longer, tiles)
    return result


def _listed(frozen: Frozen | None) -> Tensor | None:
    return None if frozen is None else frozen.tiles


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
               quantised values rounding changes nothing). From weights with macro factors or a fallback no bytes can
               be told: they are multiplied in x's dtype.
    nonfinite  "error" waits for the device in every quantiser; "propagate" never does.

    Falls back to the reference, and says so once, where the plan or the device asks for it.
    """
    choice = plan(recipe, weight.shape[0], weight.shape[1], _listed(frozen) is not None) if recipe.quantises else None
    lacking = device_lacks(x.device)
    if choice is None or lacking is not None or _needs_reference(choice, x):
        if choice is not None:
            say_once(name, lacking or choice.why())
        if isinstance(weight_q, HopperWeight):
            weight_q = weight_q.dequantise(x.dtype)
        return reference.reference_linear(
            x, weight, weight_q, recipe, bias, seed=seed, shard=shard, frozen=frozen, name=name, nonfinite=nonfinite
        )
    return kernel_linear(
        x, weight, weight_q, recipe, bias, choice, seed=seed, shard=shard, frozen=frozen, name=name,
        nonfinite=nonfinite,
    )  # fmt: skip


def kernel_linear(
    x: Tensor,
    weight: Tensor,
    weight_q: Tensor | HopperWeight | None,
    recipe: Recipe,
    bias: Tensor | None,
    choice: Plan,
    *,
    seed: int | None = None,
    shard: Shard | None = None,
    frozen: Frozen | None = None,
    name: str = "linear",
    nonfinite: NonFinite = "error",
) -> Tensor:
    """`mx_linear` by the kernels, whatever the device: on a CPU Triton's interpreter runs them, for the tests."""
    if weight_q is None:
        raise ValueError(f"recipe {recipe.name!r} quantises weights: {name} needs weight_q, the quantised weight.")
    if isinstance(weight_q, Tensor):
        assert recipe.w is not None
        if recipe.w.macro is not None or recipe.w.fallback is not None:
            choice = without_bytes(choice, "W came as values, from which bytes with macro factors cannot be told")
        if choice.forward.gemm is Gemm.BF16:
            weight_q = HopperWeight(None, values=weight_q.detach())
        else:
            plain = replace(recipe, w=Operand(square=recipe.w.square, scale_rule=recipe.w.scale_rule))
            weight_q = weight_operands(weight_q.detach(), plain, choice, frozen, name, "propagate")
    return _HopperLinear.apply(
        x, weight, bias, _Site(recipe, choice, weight_q, seed, shard or Shard(), frozen, name, nonfinite)
    )


def _needs_reference(choice: Plan, x: Tensor) -> bool:
    if any(part.gemm is Gemm.REFERENCE for part in (choice.forward, choice.dgrad, choice.wgrad)):
        return True
    return x.dtype not in (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class _Site:
    """What forward and backward of one call share."""

    recipe: Recipe
    plan: Plan
    weight: HopperWeight
    seed: int | None
    shard: Shard
    frozen: Frozen | None
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
        rows, want_weight = as_rows(x), ctx.needs_input_grad[1]
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
            assert site.weight.forward is not None
            y = matmul(x_q, site.weight.longer or site.weight.forward, x.dtype)
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
            dy = site.values(dy, "dy_dgrad")
        return dy @ site.weight.dequantise(dy.dtype)
    assert site.weight.transposed is not None
    return matmul(dy_rows or site.rows(dy, "dy_dgrad", gemm), site.weight.transposed, dy.dtype)


def _wgrad(site: _Site, dy: Tensor, dy_columns: Fp8Matrix | None, ctx: Any) -> Tensor:
    if site.plan.wgrad.gemm is not Gemm.BF16:
        dtype = torch.float32 if ctx.weight_dtype == torch.float32 else torch.bfloat16
        return matmul(dy_columns or site.columns(dy, "dy_wgrad", Form.TILE), ctx.x_t, dtype)
    return dy.t() @ _kept_values(site, ctx.x_kept, ctx.shape[-1], dy.dtype)


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
