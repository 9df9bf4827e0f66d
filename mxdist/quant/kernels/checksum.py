"""The checksums of many ranges of a buffer in one launch: `quant.checksum`'s numbers, bit for bit.

Ranges are cut into pieces of one length, a program each; sums of integers modulo 2^64 do not depend on their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from mxdist.quant.checksum import Spans

PIECE, BLOCK, WARPS = 1 << 14, 1 << 11, 8
"""Elements of a piece, and of it at a time."""

# Of each dtype: the integers it is read as, the bits of a value, and how far those are moved up to become it.
_FORMS = {
    torch.uint8: (torch.uint8, 8, 0),
    torch.int32: (torch.int32, 32, 0),
    torch.float32: (torch.int32, 32, 0),
    torch.bfloat16: (torch.int16, 32, 16),  # bfloat16 is the upper half of float32
}


@triton.jit
def _mix(key):
    """splitmix64's finaliser of uint64, as `quant.checksum.mix64`."""
    z = key + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _kernel(
    buffer, pieces, sums, row, stride,
    BITS: tl.constexpr, UP: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`pieces` int64 [programs, 5]: first element in the buffer, number of elements, number of the first in its span,
    place of the span's first, span."""
    piece = pieces + tl.program_id(0) * 5
    first, count, before = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
    place, span = tl.load(piece + 3), tl.load(piece + 4)
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, PIECE, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = n < count
        value = tl.load(buffer + first + n, mask=inside, other=0).to(tl.int64)
        value = (value << UP) & ((1 << BITS) - 1)
        number = before + n
        if ROWS:
            number = (number // row) * stride + number % row
        key = ((place + number) << BITS) + value
        mixed = _mix(key.to(tl.uint64, bitcast=True)).to(tl.int64, bitcast=True)
        total += tl.where(inside, mixed, 0)
    tl.atomic_add(sums + span, tl.sum(total, 0))


def checksums(buffer: Tensor, spans: Spans, out: Tensor | None = None) -> Tensor:
    """See `quant.checksum.checksums`."""
    integers, bits, up = _FORMS[buffer.dtype]
    sums = torch.zeros(len(spans.starts), dtype=torch.int64, device=buffer.device) if out is None else out
    table = spans.tables.get(buffer.device)
    if table is None:
        table = spans.tables[buffer.device] = torch.from_numpy(pieces(spans)).to(buffer.device)
    if len(table):
        with torch.cuda.device_of(buffer):
            _kernel[(len(table),)](
                buffer.view(integers), table, sums, spans.row, spans.stride,
                BITS=bits, UP=up, ROWS=spans.row > 0, PIECE=PIECE, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return sums


def pieces(spans: Spans) -> np.ndarray:
    """The kernel's table."""
    cuts = -(-spans.counts // PIECE)
    span = np.repeat(np.arange(len(cuts)), cuts)
    before = (np.arange(len(span)) - np.repeat(np.cumsum(cuts) - cuts, cuts)) * PIECE
    count = np.minimum(spans.counts[span] - before, PIECE)
    place = np.zeros_like(before) if spans.places is None else spans.places[span]
    return np.stack([spans.starts[span] + before, count, before, place, span], axis=1)
