"""Kernels that read packed weights: values bit for bit, products to the rounding of their output."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant.kernels import decode, decode_halves
from mxdist.quant.kernels.options import UnsupportedOperandError
from mxdist.quant.kernels.packed import Source, expand
from mxdist.quant.kernels.quant_halves import quantise_halves
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


def assert_is_rounding_of(got: Tensor, x: Tensor, weight: MXTensor, lost: float = 0.0) -> None:
    """Against the float64 product of x with the values that are multiplied; elements of x may be off by `lost`."""
    halves = got.dtype == torch.bfloat16 and weight.operand.block == 32
    values = weight.dequantise(torch.float32 if halves else got.dtype).double()
    wanted = x.double() @ values.t()
    # A float32 sum of K products, then the output's rounding.
    bound = x.double().abs() @ values.abs().t() * (2.0**-20 + lost)
    assert ((got.double() - wanted).abs() <= bound + wanted.abs() * torch.finfo(got.dtype).eps / 2).all()


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
    got = decode.multiply(x, weight)
    assert got.dtype == dtype
    assert_is_rounding_of(got, x, weight)


@pytest.mark.parametrize(("rows", "outputs", "k"), [(1, 16, 32), (16, 64, 128), (17, 70, 1120), (64, 130, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_size_multiplies(rows: int, outputs: int, k: int, dtype: torch.dtype) -> None:
    x, weight = quantised(rows, k, dtype), packed(outputs, k, OPERANDS["both"])
    assert_is_rounding_of(decode.multiply(x, weight), x, weight)


X_OPERANDS = {name: get_recipe(name).x_fwd for name in ("mxfp4", "mxfp4_mbs", "mxfp4_mbs_of")}


@pytest.mark.parametrize("name", X_OPERANDS)
def test_rows_are_quantised_to_the_references_values(name: str) -> None:
    x, operand = matrix(4, 328, spread=2.0), X_OPERANDS[name]
    assert operand is not None
    assert decode.quantises(operand)
    x[1, 200] = float("nan")
    x[3] *= 2.0**-100
    values, units = quantise_halves(x, operand, 384)
    in_order = values.view(4, 48, 2, 4).transpose(2, 3).reshape(4, 384)
    got, wanted = in_order.float() * units[:, None], fake_quantise(x, operand, nonfinite="propagate").float()
    assert not got[:, 328:].any()
    exact = name == "mxfp4"  # macro factors and residuals are rounded to float16's 11 bits
    torch.testing.assert_close(got[:, :328], wanted, rtol=0.0 if exact else 2.0**-11, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("name", X_OPERANDS)
def test_x_may_be_quantised_on_the_way(name: str) -> None:
    x, operand, weight = matrix(3, 320), X_OPERANDS[name], packed(80, 320, OPERANDS["search"])
    assert operand is not None
    bias = torch.randn(80, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    got, x_q = decode.multiply(x, weight, operand=operand), fake_quantise(x, operand)
    assert_is_rounding_of(got, x_q, weight, lost=0.0 if name == "mxfp4" else 2.0**-11)
    biased = decode.multiply(x, weight, bias, operand)
    torch.testing.assert_close(biased, got + bias, rtol=2.0**-7, atol=2.0**-7)
    wide = decode.multiply(x.float(), weight, operand=operand)
    torch.testing.assert_close(wide, got.float(), rtol=2.0**-7, atol=2.0**-7 * float(wide.abs().max()))


@pytest.mark.parametrize("k", [1024, 1056])
def test_a_split_contraction_gives_the_same_bits_again(k: int) -> None:
    x, weight = quantised(9, k, torch.bfloat16), packed(70, k, OPERANDS["both"])
    source = Source.of(weight)
    for width, warps, shares, split, ahead in ((32, 4, 2, 1, 0), (64, 8, 4, 3, 0), (16, 4, 1, 3, 1), (64, 4, 4, 1, 2)):
        shape = decode_halves.Shape(width, 128, warps, shares, 3, split, ahead)
        got, again = (decode_halves.multiply_halves(x, source, 70, 16, None, None, None, shape) for _ in range(2))
        assert_is_rounding_of(got, x, weight)
        assert torch.equal(got, again)


def test_a_contraction_is_split_until_the_gpu_is_full() -> None:
    assert decode._split(2048, tiles=344, multiprocessors=132) == (1, 2048)
    assert decode._split(2048, tiles=32, multiprocessors=132) == (8, 256)
    assert decode._split(11008, tiles=32, multiprocessors=132) == (11, 1024)
    assert decode._split(32, tiles=1, multiprocessors=132) == (1, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 0, 20, 1), (0, 0, 1, 0), (70, 2, 0, 0)])
def test_experts_equal_one_product_each(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    outputs, weight = 48, packed(4 * 48, 256, OPERANDS["search"])
    x = quantised(sum(sizes), 256, dtype)
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
