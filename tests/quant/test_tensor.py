"""MXTensor: bytes, slicing, concatenation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mxdist.quant.recipe import Operand, get_recipe
from mxdist.quant.reference import quantise
from mxdist.quant.tensor import MXTensor, cat_rows
from tests.quant.strategies import bits, operands, tensors


def same_bytes(a: MXTensor, b: MXTensor) -> bool:
    left, right = a.parts(), b.parts()
    return a.shape == b.shape and left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@given(tensors(), operands())
def test_parts_rebuild_the_tensor(x: Tensor, operand: Operand) -> None:
    q = quantise(x, operand)
    again = MXTensor.from_parts(q.parts(), q.shape, operand)
    assert torch.equal(bits(again.dequantise()), bits(q.dequantise()))
    assert q.nbytes == sum(part.numel() for part in q.parts().values())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 200), operands())
def test_quantising_a_concatenation_is_concatenating_quantised_rows(rows: list, k: int, operand: Operand) -> None:
    x = torch.randn(sum(rows), k, generator=torch.Generator().manual_seed(k))
    whole = quantise(x, operand)
    assert same_bytes(cat_rows([quantise(piece, operand) for piece in x.split(rows)]), whole)
    start = 0
    for count in rows:
        assert same_bytes(whole[start : start + count], quantise(x[start : start + count], operand))
        start += count


def test_indexing_follows_torch_along_the_leading_axes() -> None:
    x = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0))
    q = quantise(x, Operand())
    assert torch.equal(q[1].dequantise(), q.dequantise()[1])
    assert torch.equal(q[torch.tensor([2, 0])].dequantise(), q.dequantise()[[2, 0]])
    with pytest.raises(IndexError, match="leading axes"):
        q[0][0][3]


def test_a_block_of_32_takes_17_bytes_and_the_macro_byte_is_one_more_per_128() -> None:
    x = torch.randn(8, 256)
    assert quantise(x, get_recipe("mxfp4").w).nbytes == 8 * 256 * 17 // 32
    assert quantise(x, get_recipe("mxfp4_mbs").w).nbytes == 8 * 256 * 17 // 32 + 8 * 2
    assert quantise(x, get_recipe("mxfp4_of").w).nbytes == 2 * 8 * 256 * 17 // 32


def test_dequantising_to_bfloat16_rounds_the_float32_result() -> None:
    q = quantise(torch.randn(5, 100), get_recipe("mxfp4_mbs").w)
    assert torch.equal(q.dequantise(torch.bfloat16), q.dequantise().bfloat16())


def test_wrong_parts_are_refused_by_name() -> None:
    q = quantise(torch.randn(4, 64), Operand())
    with pytest.raises(ValueError, match="has the parts"):
        MXTensor.from_parts({"codes": q.codes}, q.shape, q.operand)
    with pytest.raises(ValueError, match="part scales"):
        MXTensor.from_parts({"codes": q.codes, "scales": q.scales[:, :1]}, q.shape, q.operand)
    with pytest.raises(ValueError, match="part codes"):
        MXTensor.from_parts({"codes": q.codes.int(), "scales": q.scales}, q.shape, q.operand)
    with pytest.raises(ValueError, match="one operand and one trailing shape"):
        cat_rows([q, quantise(torch.randn(4, 96), Operand())])
    with pytest.raises(ValueError, match="no axis"):
        cat_rows([quantise(torch.randn(64), Operand())])
