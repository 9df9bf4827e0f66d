"""Kernels that read packed weights: values bit for bit, products to the rounding of their output."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant.kernels import decode
from mxdist.quant.kernels.options import UnsupportedOperandError
from mxdist.quant.kernels.packed import expand
from mxdist.quant.recipe import Fallback, Macro, Operand, get_recipe
from mxdist.quant.reference import fake_quantise, quantise
from mxdist.quant.tensor import MXTensor
from tests.quant.kernels.data import DEVICE, matrix

OPERANDS = {
    "mxfp4": Operand(),
    "search": get_recipe("mxfp4_mbs").w,
    "fallback": Operand(fallback=Fallback(alpha=0.3)),
    "both": get_recipe("mxfp4_mbs_of").w,
    "folded": Operand(macro=Macro(method="folded"), scale_rule="even"),
    "blocks of 16, macro 64": Operand(block=16, macro=Macro(size=64)),
    "square": Operand(square=True),
}
every_operand = pytest.mark.parametrize("operand", OPERANDS.values(), ids=list(OPERANDS))


def packed(rows: int, k: int, operand: Operand, seed: int = 1) -> MXTensor:
    """With every nibble in it, and blocks far below their tile's largest."""
    return quantise(matrix(rows, k, spread=2.0, seed=seed, dtype=torch.float32), operand)


def quantised(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    return fake_quantise(matrix(rows, k, dtype=torch.float32), Operand(macro=Macro())).to(dtype)


def assert_is_rounding_of(got: Tensor, x: Tensor, weight: MXTensor) -> None:
    """Against the float64 product of what the reference multiplies: the values in x's dtype."""
    wanted = x.double() @ weight.dequantise(x.dtype).double().t()
    assert got.dtype == x.dtype
    # A float32 sum of K products, then the output's rounding.
    bound = x.double().abs() @ weight.dequantise(x.dtype).double().abs().t() * 2.0**-20
    assert ((got.double() - wanted).abs() <= bound + wanted.abs() * torch.finfo(x.dtype).eps).all()


@every_operand
@pytest.mark.parametrize(("rows", "k"), [(40, 256), (5, 208)])
def test_expanded_values_are_the_references_bits(operand: Operand, rows: int, k: int) -> None:
    weight = packed(rows, k, operand)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(expand(weight, dtype), weight.dequantise(dtype))


@every_operand
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_references_values(operand: Operand, dtype: torch.dtype) -> None:
    x, weight = quantised(5, 320, dtype), packed(80, 320, operand)
    assert_is_rounding_of(decode.multiply(x, weight), x, weight)


@pytest.mark.parametrize(("rows", "outputs", "k"), [(1, 16, 32), (16, 64, 128), (17, 70, 1120), (64, 130, 256)])
def test_any_size_multiplies(rows: int, outputs: int, k: int) -> None:
    x, weight = quantised(rows, k, torch.float32), packed(outputs, k, OPERANDS["both"])
    assert_is_rounding_of(decode.multiply(x, weight), x, weight)


def test_a_contraction_is_split_until_the_gpu_is_full() -> None:
    assert decode._split(2048, tiles=344, multiprocessors=132) == (1, 2048)
    assert decode._split(2048, tiles=32, multiprocessors=132) == (8, 256)
    assert decode._split(11008, tiles=32, multiprocessors=132) == (11, 1024)
    assert decode._split(32, tiles=1, multiprocessors=132) == (1, 128)


@pytest.mark.parametrize("sizes", [(3, 0, 20, 1), (0, 0, 1, 0), (70, 2, 0, 0)])
def test_experts_equal_one_product_each(sizes: tuple[int, ...]) -> None:
    outputs, weight = 48, packed(4 * 48, 256, OPERANDS["search"])
    x = quantised(sum(sizes), 256, torch.float32)
    got, start = decode.multiply_experts(x, weight, decode.Groups.of(sizes, DEVICE)), 0
    for expert, size in enumerate(sizes):
        own = weight[expert * outputs : (expert + 1) * outputs]
        assert_is_rounding_of(got[start : start + size], x[start : start + size], own)
        start += size


@pytest.mark.parametrize("sizes", [(3, 0, 20, 1), (0, 0, 1, 0), (70, 2, 0, 0, 0, 65), (1,) * 37, (0, 0)])
def test_tiles_of_experts_cover_every_row_once(sizes: tuple[int, ...]) -> None:
    groups = decode.Groups.from_counts(torch.tensor(sizes, device=DEVICE), sum(sizes))
    covered = [
        (e, r) for e, first, stop in groups.table.tolist() for r in range(first, min(stop, first + groups.height))
    ]
    assert covered == [(e, r) for r, e in enumerate(e for e, size in enumerate(sizes) for _ in range(size))]


def test_no_rows_give_no_rows() -> None:
    weight = packed(16, 128, Operand())
    assert decode.multiply(torch.zeros(0, 128, device=DEVICE), weight).shape == (0, 16)
    groups = decode.Groups.of((0, 0), DEVICE)
    assert decode.multiply_experts(torch.zeros(0, 128, device=DEVICE), weight, groups).shape == (0, 8)


def test_what_the_bytes_do_not_say_is_refused() -> None:
    x, weight = quantised(2, 128, torch.float32), packed(16, 128, Operand())
    with pytest.raises(UnsupportedOperandError, match="rotated"):
        decode.multiply(x, replace(weight, operand=Operand(hadamard="plain")))
    with pytest.raises(ValueError, match="no contraction axis"):
        decode.multiply(x[:, :96], weight)
