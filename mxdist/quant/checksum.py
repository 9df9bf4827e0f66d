"""A 64-bit checksum of bytes at positions, which adds over shards: sum of mix64(position, byte) modulo 2^64.

The checksum of a tensor that is cut into pieces is the sum of the pieces' checksums at their offsets, whatever the
cut, so ranks compare a sharded tensor with a whole one by exchanging one number each. Every term depends on position
and byte, so a flipped bit, a swap of two different bytes and a shift all change the sum. It guards against mistakes,
not against an adversary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 25}
"""Bytes taken at a time: a cache's worth, and on a GPU enough for a kernel. Temporary memory is up to 24 times that."""
_MASK = (1 << 64) - 1
# Odd multipliers of the splitmix64 finaliser, written as signed 64-bit numbers because torch has no uint64 arithmetic.
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def checksum(tensor: Tensor, offset: int = 0, row_stride: int | None = None) -> int:
    """Return the checksum, in [0, 2^64), of a tensor's bytes in row-major order; 0 for an empty tensor.

    tensor      any dtype and device; non-contiguous tensors are read in logical order.
    offset      position of the first byte in the whole tensor (bytes, not elements).
    row_stride  for a shard that is cut along the last axis: bytes from the start of one row to the next in the
                whole tensor, rows being all leading axes. None: the shard is one contiguous range.

    ValueError when rows of `row_stride` bytes would overlap.
    """
    data = tensor.detach().contiguous().view(torch.uint8).flatten()
    width = tensor.shape[-1] * tensor.element_size() if tensor.dim() else tensor.element_size()
    if row_stride is not None and row_stride < width:
        raise ValueError(f"row_stride {row_stride} is smaller than the {width} bytes of a row.")
    total = torch.zeros((), dtype=torch.int64, device=data.device)  # wraps at 2^64
    chunk = _CHUNK.get(data.device.type, 1 << 16)
    for start in range(0, data.numel(), chunk):
        piece = data[start : start + chunk].to(torch.int64)
        place = torch.arange(start, start + piece.numel(), device=data.device)
        if row_stride is not None:
            place = place.div(width, rounding_mode="floor").mul_(row_stride - width).add_(place)
        total += mix64(place.add_(offset).mul_(256).add_(piece)).sum()
    return int(total) & _MASK


def combine(checksums: Iterable[int]) -> int:
    """Return the checksum of the whole from the checksums of its disjoint shards, in any order."""
    return sum(checksums) & _MASK


def mix64(keys: Tensor) -> Tensor:
    """Scramble int64 keys in place, one to one (splitmix64 finaliser); key 0 is moved away from its fixed point."""
    keys.add_(0x9E3779B97F4A7C15 - (1 << 64))
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        keys.bitwise_xor_((keys >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(multiplier)
    return keys.bitwise_xor_((keys >> 31).bitwise_and_((1 << 33) - 1))
