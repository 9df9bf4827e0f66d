"""The kernel's checksums are those of the plain definition, on the GPU if there is one and interpreted elsewhere."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant.checksum import Spans, checksums
from mxdist.quant.kernels import checksum as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.bfloat16])
def test_checksums_of_many_ranges_are_those_of_each(dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (4 * kernel.PIECE + 16,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    raw[:16] = torch.tensor([0, 0, 0, 0x80, 0xFF, 0xFF, 0xFF, 0xFF] * 2)  # signs, and the largest words
    buffer = raw.view(dtype)
    count = buffer.numel()
    starts, counts = [0, 16, 1, count - 7, 5, 0], [16, count - 16, count // 2, 7, 0, count]
    spans = Spans(np.array(starts), np.array(counts))
    assert torch.equal(kernel.checksums(buffer.to(DEVICE), spans).cpu(), checksums(buffer, spans))


@pytest.mark.parametrize(("row", "stride"), [(0, 0), (24, 48)])
def test_shards_have_the_checksums_of_their_places(row: int, stride: int) -> None:
    buffer = torch.arange(kernel.PIECE + 48, dtype=torch.int32) * 77777
    spans = Spans(np.array([24, 0]), np.array([kernel.PIECE + 24, 48]), np.array([7, 1 << 33]), row, stride)
    assert torch.equal(kernel.checksums(buffer.to(DEVICE), spans).cpu(), checksums(buffer, spans))
