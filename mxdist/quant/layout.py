"""From a tensor of any shape to rows of blocks and back, and the checks on what may be quantised at all.

Everything in this package works on `blocks` [rows, K / block, block] in float32: the last axis of the tensor is the
GEMM's contraction axis K, all leading axes are rows, and K is padded with zeros to whole blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def check_dtype(x: Tensor, name: str) -> None:
    """ValueError unless `x` is a real floating-point tensor with at least one axis."""
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}: only real floating-point tensors can be quantised.")
    if x.dim() == 0:
        raise ValueError(f"{name} is a scalar: quantising needs at least one axis to cut into blocks.")


def as_rows(x: Tensor) -> Tensor:
    """View or copy [..., K] as [rows, K]; also for zero rows, where torch cannot infer the -1."""
    if x.dim() == 2:
        return x
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def to_blocks(rows: Tensor, block: int) -> Tensor:
    """Return float32 blocks [rows, ceil(K / block), block] of [rows, K]; the padding is zeros. May share memory."""
    count, k = rows.shape
    blocks = -(-k // block)
    values = rows.to(torch.float32)
    if blocks * block != k:
        values = F.pad(values, (0, blocks * block - k))
    return values.reshape(count, blocks, block)


def per_block(per_group: Tensor, group: int, block: int, blocks: int) -> Tensor:
    """Repeat values [..., ceil(K / group)] shared by `group` elements: one for each block, [..., blocks]."""
    if per_group.shape[-1] == 1:
        return per_group.expand(*per_group.shape[:-1], blocks)
    width = group // block
    return per_group.unsqueeze(-1).expand(*per_group.shape, width).flatten(-2)[..., :blocks]


def group_max(per_block_values: Tensor, group: int, block: int) -> Tensor:
    """Return the maximum [..., ceil(K / group)] of non-negative block values over `group` consecutive elements."""
    blocks = per_block_values.shape[-1]
    width = group // block
    if blocks <= width:
        return per_block_values.amax(-1, keepdim=True)
    if blocks % width:
        per_block_values = F.pad(per_block_values, (0, width - blocks % width))
    return per_block_values.unflatten(-1, (-1, width)).amax(-1)


def rows_max(values: Tensor, height: int) -> Tensor:
    """Return [..., rows, n] with every value replaced by the maximum over its group of `height` rows (values >= 0)."""
    rows = values.shape[-2]
    groups = F.pad(values, (0, 0, 0, -rows % height)).unflatten(-2, (-1, height))
    return groups.amax(-2, keepdim=True).expand_as(groups).flatten(-3, -2)[..., :rows, :]


def raise_nonfinite(x: Tensor, name: str) -> None:
    """ValueError naming the tensor and the position of its first NaN or Inf, if it has one."""
    bad = ~torch.isfinite(x)
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name} of shape {tuple(x.shape)} holds {x[position].item()} at position {position}.")
