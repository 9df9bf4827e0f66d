"""Copies of tokens, one for each of their experts, and the sum of a token's copies, by gathering alone.

Each is the other's backward pass. torch's own ways add row after row in the model's dtype wherever a place has several:
in no fixed order on a GPU, so that runs differ, and an atomic operation for every number.
"""

from typing import Any

import torch
from torch import Tensor


class Copies(torch.autograd.Function):
    """Rows [copies, hidden], of which row i is token ``tokens[i]`` of [tokens, hidden].

    ``places`` is the inverse, int64 [tokens, top k]: where the copies of each token are.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return hidden.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _sums(grads[0], *ctx.saved_tensors), None, None


class Sums(torch.autograd.Function):
    """For each token the sum [tokens, hidden] of its copies' rows of [copies, hidden], rounded once."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return _sums(rows, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, *ctx.saved_tensors), None, None


def _sums(rows: Tensor, places: Tensor) -> Tensor:
    return rows.index_select(0, places.flatten()).view(*places.shape, rows.shape[1]).sum(1)
