"""`mx_linear`: a linear layer on quantised operands, with straight-through gradients.

    Y  = Q(X) W_q^T + b
    dX = dY W_q            the quantised weight, since that is the function the forward computed
    dW = dY^T Q(X)         into the high-precision master weight, as if rounding were the identity

This is the mode of arXiv 2605.20402 (W4A4 forward, high-precision gradients on quantised operands). Recipes that
name gradient operands quantise dY and X for the backward GEMMs too, each along its own contraction axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.backend import fake_quantise
from mxdist.quant.layout import as_rows
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Operand, Recipe
from mxdist.quant.reference import NonFinite
from mxdist.quant.transform import Frozen

if TYPE_CHECKING:
    from mxdist.quant.kernels.prepared import HopperWeight


@dataclass(frozen=True, slots=True)
class Shard:
    """Where a rank's piece of a linear lies in the whole one, so that random numbers do not depend on the layout.

    Offsets of this piece's first token, output feature and input feature, and the sizes of the whole; a size of None
    means that this rank holds all of that axis. Offsets are multiples of 8.
    """

    token: int = 0
    output: int = 0
    input: int = 0
    tokens: int | None = None
    outputs: int | None = None
    inputs: int | None = None

    def draw(self, operand: str, seed: int) -> Draw:
        """The random numbers of the operand called `operand` in `Recipe`, as it is quantised: contraction axis last."""
        token, output, feature = (self.token, self.tokens), (self.output, self.outputs), (self.input, self.inputs)
        rows, columns = {
            "x_fwd": (token, feature),
            "dy_dgrad": (token, output),
            "dy_wgrad": (output, token),
            "x_wgrad": (feature, token),
        }[operand]
        stream = ("x_fwd", "dy_dgrad", "dy_wgrad", "x_wgrad").index(operand)
        return Draw(seed, stream, row=rows[0], column=columns[0], columns=columns[1])


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
    total: Tensor | None = None,
) -> Tensor:
    """Return Q(x) @ weight_q^T + bias, of x's dtype and shape [..., N].

    x          [..., K], any leading axes, also zero rows.
    weight     [N, K], the master weight: it receives dW and, when `recipe.w` is None, is the weight multiplied with.
    weight_q   the quantised weight, made once per optimizer step: what `backend.prepare_weight` gives, or dequantised
               values [N, K] in x's dtype (another dtype is converted on every call). Required exactly when `recipe.w`
               is set.
    seed       required when an operand of this call draws random numbers (without gradients only x_fwd can); should
               differ per step and layer.
    shard      where this rank's x and weight lie in the whole linear; only random numbers depend on it.
    frozen     the mean or threshold of `recipe.x_fwd`, when it uses them.
    name       the layer's name, for errors.
    nonfinite  what NaN and Inf in x or dY do, see `reference.quantise`.
    total      float32 [N, K] that dW is added to where FP8 tensor cores multiply; `weight` then receives none.

    Gradients come back in their inputs' dtypes. A recipe that quantises nothing is plain
    `torch.nn.functional.linear`. Values are multiplied in x's dtype; a weight that was prepared for Hopper's FP8
    tensor cores is multiplied there (`mxdist.quant.kernels`): the same operands, products exact to the rounding of
    their output.
    """
    arguments: dict[str, Any] = {"seed": seed, "shard": shard, "frozen": frozen, "name": name, "nonfinite": nonfinite}
    if weight_q is None or isinstance(weight_q, Tensor):
        if not recipe.quantises:
            return F.linear(x, weight, bias)
        return reference_linear(x, weight, weight_q, recipe, bias, **arguments)
    from mxdist.quant.kernels.linear import kernel_linear

    return kernel_linear(x, weight, weight_q, recipe, bias, total=total, **arguments)


def reference_linear(
    x: Tensor,
    weight: Tensor,
    weight_q: Tensor | None,
    recipe: Recipe,
    bias: Tensor | None = None,
    *,
    seed: int | None = None,
    shard: Shard | None = None,
    frozen: Frozen | None = None,
    name: str = "linear",
    nonfinite: NonFinite = "error",
) -> Tensor:
    """`mx_linear` with GEMMs in x's dtype, on any device."""
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    random = recipe.needs_seed if trained else recipe.x_fwd is not None and recipe.x_fwd.needs_seed
    if random and seed is None:
        raise ValueError(f"recipe {recipe.name!r} draws random numbers: {name} needs a seed.")
    if recipe.w is None:
        weight_q = weight.detach()
    elif weight_q is None:
        raise ValueError(f"recipe {recipe.name!r} quantises weights: {name} needs weight_q, the quantised weight.")
    site = _Site(recipe, seed, shard or Shard(), frozen, name, nonfinite)
    return _MXLinear.apply(x, weight, weight_q, bias, site)


@dataclass(frozen=True, slots=True)
class _Site:
    """What forward and backward of one call share besides tensors."""

    recipe: Recipe
    seed: int | None
    shard: Shard
    frozen: Frozen | None
    name: str
    nonfinite: NonFinite

    def quantise(self, tensor: Tensor, which: str) -> Tensor:
        """Quantise along the last axis as the recipe says for the operand `which`, or return the tensor untouched."""
        operand: Operand | None = getattr(self.recipe, which)
        if operand is None:
            return tensor
        draw = self.shard.draw(which, self.seed) if operand.needs_seed and self.seed is not None else None
        frozen = self.frozen if which == "x_fwd" else None
        name = f"{self.name} {'input' if which.startswith('x') else 'gradient'}"
        return fake_quantise(
            tensor, operand, seed=draw, frozen=frozen, name=name, nonfinite=self.nonfinite, dtype=tensor.dtype
        )


class _MXLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, weight_q: Tensor, bias: Tensor | None, site: _Site) -> Tensor:
        x_q = site.quantise(x, "x_fwd")
        ctx.save_for_backward(x if site.recipe.x_wgrad is not None else x_q, weight_q)
        ctx.site, ctx.weight_dtype, ctx.bias_dtype = site, weight.dtype, None if bias is None else bias.dtype
        return F.linear(x_q, weight_q.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x_saved, weight_q = ctx.saved_tensors
        site: _Site = ctx.site
        want_x, want_weight, _, want_bias, _ = ctx.needs_input_grad
        dx = dw = db = None
        if want_x:
            dx = site.quantise(dy, "dy_dgrad") @ weight_q.to(dy.dtype)
        if want_weight:
            # Both operands as [features, tokens], so that the contraction axis is last.
            dy_t, x_t = site.quantise(as_rows(dy).t(), "dy_wgrad"), site.quantise(as_rows(x_saved).t(), "x_wgrad")
            dw = (dy_t @ x_t.t()).to(ctx.weight_dtype)
        if want_bias:
            db = as_rows(dy).sum(0).to(ctx.bias_dtype)
        return dx, dw, None, db, None
