"""A 64-bit checksum of values at positions, which adds over shards: sum of mix64(position, value) modulo 2^64.

Values are bytes, or 32-bit words (`unit` 4): four times fewer numbers for the same bytes. The checksum of a tensor that
is cut into pieces is the sum of the pieces' checksums at their offsets, whatever the cut, so ranks compare a sharded
tensor with a whole one by exchanging one number each. Every term depends on position and value, so a flipped bit, a
swap of two different values and a shift all change the sum. It guards against mistakes, not against an adversary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mxdist.quant.backend import quantisers_lack

_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 25}
"""Values taken at a time: a cache's worth, on a GPU enough for a kernel. Temporary memory is up to 24 times that."""
_MASK = (1 << 64) - 1
# Odd multipliers of the splitmix64 finaliser, written as signed 64-bit numbers because torch has no uint64 arithmetic.
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def checksum(tensor: Tensor, offset: int = 0, row_stride: int | None = None, unit: int = 1) -> int:
    """Return the checksum, in [0, 2^64), of a tensor's bytes in row-major order; 0 for an empty tensor.

    tensor      any dtype and device; non-contiguous tensors are read in logical order.
    offset      position of the first byte in the whole tensor (bytes, not elements).
    row_stride  for a shard that is cut along the last axis: bytes from the start of one row to the next in the
                whole tensor, rows being all leading axes. None: the shard is one contiguous range.
    unit        bytes of a value, 1 or 4; all numbers of bytes must be multiples of it.

    ValueError when rows of `row_stride` bytes would overlap, or when something is no multiple of `unit`.
    """
    data = tensor.detach().contiguous().view(torch.uint8).flatten()
    width = tensor.shape[-1] * tensor.element_size() if tensor.dim() else tensor.element_size()
    if row_stride is not None and row_stride < width:
        raise ValueError(f"row_stride {row_stride} is smaller than the {width} bytes of a row.")
    sizes = {"the tensor": data.numel(), "offset": offset}
    sizes |= {} if row_stride is None else {"a row": width, "row_stride": row_stride}
    for what, size in sizes.items():
        if size % unit:
            raise ValueError(f"{what} has {size} bytes, which are no multiple of the unit {unit}.")
    stride = None if row_stride is None else row_stride // unit
    values = _words(data) if unit == 4 else data
    return int(_sum(values, offset // unit, width // unit, stride)) & _MASK


def combine(checksums: Iterable[int]) -> int:
    """Return the checksum of the whole from the checksums of its disjoint shards, in any order."""
    return sum(checksums) & _MASK


@dataclass(frozen=True)
class Spans:
    """Ranges of a flat buffer, each of which has a checksum of its own. In elements of the buffer.

    A range may be a shard: element n of it has place `places` + n in its whole, or with `row` and `stride`, for shards
    that are cut along the last axis, place `places` + (n // row) * stride + n % row.
    """

    starts: np.ndarray  # int64 [spans]
    counts: np.ndarray  # int64 [spans]
    places: np.ndarray | None = None  # int64 [spans]; None: 0, of whole tensors
    row: int = 0
    stride: int = 0
    tables: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)  # for the kernel, made once


def checksums(buffer: Tensor, spans: Spans, out: Tensor | None = None) -> Tensor:
    """Return the checksum of each span, int64 [spans] on the buffer's device; added to `out` where it is given.

    buffer  flat and contiguous. uint8: unit 1. int32 or float32: unit 4. bfloat16: of the values in float32, unit 4.

    On a GPU with Triton this is one launch and no wait.
    """
    if buffer.is_cuda and quantisers_lack(buffer.device) is None:
        from mxdist.quant.kernels.checksum import checksums as by_kernel

        return by_kernel(buffer, spans, out)
    found = torch.zeros(len(spans.starts), dtype=torch.int64, device=buffer.device) if out is None else out
    places = [0] * len(spans.starts) if spans.places is None else spans.places.tolist()
    stride = spans.stride if spans.row else None
    for index, start in enumerate(spans.starts.tolist()):
        piece = buffer[start : start + int(spans.counts[index])]
        piece = piece.float() if piece.dtype == torch.bfloat16 else piece
        integers = piece if piece.dtype == torch.uint8 else piece.view(torch.int32)
        found[index] += _sum(integers, places[index], spans.row, stride)
    return found


def mix64(keys: Tensor) -> Tensor:
    """Scramble int64 keys in place, one to one (splitmix64 finaliser); key 0 is moved away from its fixed point."""
    keys.add_(0x9E3779B97F4A7C15 - (1 << 64))
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        keys.bitwise_xor_((keys >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(multiplier)
    return keys.bitwise_xor_((keys >> 31).bitwise_and_((1 << 33) - 1))


def _words(data: Tensor) -> Tensor:
    """Bytes as int32; a copy where they are not aligned."""
    return (data.clone() if data.data_ptr() % 4 else data).view(torch.int32)


def _sum(values: Tensor, offset: int, width: int, stride: int | None) -> Tensor:
    """Of flat uint8 or int32; the other arguments in values."""
    bits = 8 * values.element_size()
    total = torch.zeros((), dtype=torch.int64, device=values.device)  # wraps at 2^64
    chunk = _CHUNK.get(values.device.type, 1 << 16)
    for start in range(0, values.numel(), chunk):
        piece = values[start : start + chunk].to(torch.int64).bitwise_and_((1 << bits) - 1)
        place = torch.arange(start, start + piece.numel(), device=values.device)
        if stride is not None:
            place = place.div(width, rounding_mode="floor").mul_(stride - width).add_(place)
        total += mix64(place.add_(offset).mul_(1 << bits).add_(piece)).sum()
    return total
