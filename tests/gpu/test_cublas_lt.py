"""Products by cuBLASLt are those of torch's operator, bit for bit, and add to totals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant.kernels import cublas_lt
from mxdist.quant.kernels.gemm import SQUARES, Blocks, right
from mxdist.quant.kernels.quant_tiles import quantise_tiles
from mxdist.quant.kernels.quant_weight import quantise_weight
from mxdist.quant.recipe import Operand
from tests.quant.kernels.data import kind_of

SHAPES = [(16, 128, 128), (300, 2560, 2048), (4096, 2048, 11008), (128, 1536, 2048)]


def operands(rows: int, columns: int, k: int, squares: bool) -> tuple[Blocks, Blocks]:
    x, _ = quantise_tiles(kind_of("gaussian", rows, k), Operand())
    assert x is not None
    if squares:
        return right(x), right(quantise_weight(kind_of("gaussian", columns, k, seed=1), Operand()).forward)
    y, _ = quantise_tiles(kind_of("gaussian", columns, k, seed=1), Operand())
    assert y is not None
    return right(x), right(y)


def by_torch(a: Blocks, b: Blocks, dtype: torch.dtype) -> Tensor:
    left = a.data.t()
    return torch.ops.aten._scaled_mm_v2(left, b.data, a.scale, a.recipe, [], b.scale, b.recipe, [], None, dtype)


def by_us(a: Blocks, b: Blocks, out: Tensor, accumulate: bool = False) -> Tensor:
    left = a.data.t()
    assert cublas_lt.loaded()
    found = cublas_lt.multiply(
        left, a.scale[0], a.recipe == SQUARES, b.data, b.scale[0], b.recipe == SQUARES, out, accumulate
    )
    assert found
    return out


@pytest.mark.parametrize("squares", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_torchs_operator(shape: tuple[int, int, int], dtype: torch.dtype, squares: bool) -> None:
    a, b = operands(*shape, squares)
    expected = by_torch(a, b, dtype)
    found = by_us(a, b, torch.empty_like(expected))
    assert torch.equal(found, expected)
    assert torch.equal(by_us(a, b, torch.empty_like(expected)), found)


@pytest.mark.parametrize("squares", [True, False])
def test_products_add_to_totals(squares: bool) -> None:
    a, b = operands(512, 2560, 2048, squares)
    product = by_torch(a, b, torch.float32)
    total = torch.randn_like(product)
    expected = total + product
    torch.testing.assert_close(by_us(a, b, total, accumulate=True), expected, rtol=1e-6, atol=1e-4)


def test_products_on_another_stream_are_the_same() -> None:
    a, b = operands(512, 512, 512, squares=True)
    expected = by_torch(a, b, torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = by_us(a, b, torch.empty_like(expected))
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_a_captured_product_is_replayed() -> None:
    a, b = operands(512, 512, 512, squares=True)
    expected = by_torch(a, b, torch.bfloat16)
    out = torch.empty_like(expected)
    by_us(a, b, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        by_us(a, b, out)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_a_part_of_a_wider_tensor_is_written_alone() -> None:
    a, b = operands(128, 256, 512, squares=False)
    wide = torch.zeros(128, 512, dtype=torch.bfloat16, device="cuda")
    by_us(a, b, wide[:, :256])
    assert torch.equal(wide[:, :256], by_torch(a, b, torch.bfloat16))
    assert not wide[:, 256:].any()
