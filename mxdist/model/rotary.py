"""Rotary position embedding of packed sequences: the halves of each head, turned by angles that positions give.

    [a, b] -> [a cos - b sin, b cos + a sin]

Cosines and sines are rounded to the model's dtype, as the rollout engine and transformers have them; products are
added in float32 and rounded once.
"""

from typing import Any

import torch
from torch import Tensor

from mxdist.quant.backend import quantisers_lack

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines [tokens, head / 2], of the model's dtype."""


def rotation(positions: Tensor, head: int, base: float, dtype: torch.dtype) -> Rotation:
    """Return the rotation of tokens at ``positions``, int64 [tokens], for heads of ``head`` elements."""
    powers = torch.arange(0, head, 2, dtype=torch.float32, device=positions.device) / head
    angles = torch.outer(positions.float(), 1.0 / base**powers)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Return x [tokens, heads, head], whose last axis is contiguous, with every head turned; differentiable in x."""
    if quantisers_lack(x.device) is None:
        return Rotate.apply(x, *by)
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = (part.float().unsqueeze(1) for part in by)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Rotate(torch.autograd.Function):
    """``rotate`` in one kernel each way: torch's twenty move as much memory as some of the linears."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        from mxdist.model.rotary_kernel import turn

        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        from mxdist.model.rotary_kernel import turn

        return turn(grads[0], *ctx.saved_tensors, back=True), None, None
