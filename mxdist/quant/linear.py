"""`mx_linear`: a linear layer on quantised operands, with straight-through gradients.

    Y  = Q(X) W_q^T + b
    dX = dY W_q            the quantised weight, since that is the function the forward computed
    dW = dY^T Q(X)         into the high-precision master weight, as if rounding were the identity

This is the mode of arXiv 2605.20402 (W4A4 forward, high-precision gradients on quantised operands). Recipes that
name gradient operands quantise dY and X for the backward GEMMs too, each along its own contraction axis.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.layout import as_rows
from mxdist.quant.recipe import Operand, Recipe
from mxdist.quant.reference import NonFinite, fake_quantise


def mx_linear(
    x: Tensor,
    weight: Tensor,
    weight_q: Tensor | None,
    recipe: Recipe,
    bias: Tensor | None = None,
    *,
    seed: int | None = None,
    name: str = "linear",
    nonfinite: NonFinite = "error",
) -> Tensor:
    """Return Q(x) @ weight_q^T + bias, of x's dtype and shape [..., N].

    x          [..., K], any leading axes, also zero rows.
    weight     [N, K], the master weight: it receives dW and, when `recipe.w` is None, is the weight multiplied with.
    weight_q   [N, K], the dequantised quantised weight. The caller makes it once per optimizer step and keeps it in
               x's dtype (another dtype is converted on every call). Required exactly when `recipe.w` is set.
    seed       required when `recipe.needs_seed`; should differ per step and layer.
    name       the layer's name, for errors.
    nonfinite  what NaN and Inf in x or dY do, see `reference.quantise`.

    The GEMMs run in x's dtype; gradients come back in their inputs' dtypes. A recipe that quantises nothing is plain
    `torch.nn.functional.linear`.
    """
    if not recipe.quantises:
        return F.linear(x, weight, bias)
    if recipe.needs_seed and seed is None:
        raise ValueError(f"recipe {recipe.name!r} draws random numbers: {name} needs a seed.")
    if recipe.w is None:
        weight_q = weight.detach()
    elif weight_q is None:
        raise ValueError(f"recipe {recipe.name!r} quantises weights: {name} needs weight_q, the quantised weight.")
    return _MXLinear.apply(x, weight, weight_q, bias, recipe, seed, name, nonfinite)


class _MXLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        weight_q: Tensor,
        bias: Tensor | None,
        recipe: Recipe,
        seed: int | None,
        name: str,
        nonfinite: NonFinite,
    ) -> Tensor:
        x_q = x
        if recipe.x_fwd is not None:
            x_q = fake_quantise(x, recipe.x_fwd, seed=seed, name=f"{name} input", nonfinite=nonfinite).to(x.dtype)
        ctx.save_for_backward(x if recipe.x_wgrad is not None else x_q, weight_q)
        ctx.recipe, ctx.seed, ctx.name, ctx.nonfinite = recipe, seed, name, nonfinite
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x_q, weight_q.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x_saved, weight_q = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        want_x, want_weight, _, want_bias = ctx.needs_input_grad[:4]
        dx = dw = db = None
        if want_x:
            dx = _gradient_operand(ctx, dy, recipe.dy_dgrad) @ weight_q.to(dy.dtype)
        if want_weight:
            # Both operands as [features, tokens], so that the contraction axis is last.
            dy_t = _gradient_operand(ctx, as_rows(dy).t(), recipe.dy_wgrad)
            x_t = _gradient_operand(ctx, as_rows(x_saved).t(), recipe.x_wgrad)
            dw = (dy_t @ x_t.t()).to(ctx.weight_dtype)
        if want_bias:
            db = as_rows(dy).sum(0).to(ctx.bias_dtype)
        return dx, dw, None, db, None, None, None, None


def _gradient_operand(ctx: Any, tensor: Tensor, operand: Operand | None) -> Tensor:
    """Quantise a backward operand along its last axis, or return it untouched."""
    if operand is None:
        return tensor
    name = f"{ctx.name} gradient"
    return fake_quantise(tensor, operand, seed=ctx.seed, name=name, nonfinite=ctx.nonfinite).to(tensor.dtype)
