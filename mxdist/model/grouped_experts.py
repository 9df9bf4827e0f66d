"""A linear of every expert in one grouped product, torch's: what experts in bfloat16 are computed with on a GPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def grouped_linear(
    rows: Tensor, weights: Sequence[Tensor], ends: Tensor, totals: Sequence[Tensor] | None = None
) -> Tensor:
    """Return x W_e^T of every row [rows, N], W_e being its expert's weight.

    Args:
        rows: [rows, K], sorted by expert.
        weights: [N, K] of each expert; copied into one tensor for the call, which is kept for the backward pass.
        ends: int32 [experts], the number of rows up to the end of each, on the rows' device.
        totals: float32 [N, K] of each expert, to which gradients of weights are added; none come back then.
    """
    return _GroupedLinear.apply(rows, ends, totals, *weights)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ends: Tensor, totals: Sequence[Tensor] | None, *weights: Tensor) -> Tensor:
        together = torch.stack(weights)  # [experts, N, K]
        ctx.save_for_backward(rows, ends, together)
        ctx.totals = totals
        return torch._grouped_mm(rows, together.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, ends, together = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx = torch._grouped_mm(dy, together, offs=ends) if ctx.needs_input_grad[0] else None
        dw = torch._grouped_mm(dy.t(), rows, offs=ends).unbind()
        if ctx.totals is None:
            return dx, None, None, *dw
        torch._foreach_add_(ctx.totals, dw)
        return dx, None, None, *[None] * len(dw)
