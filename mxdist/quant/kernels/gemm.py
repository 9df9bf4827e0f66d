"""Dense GEMMs on E4M3 operands, exact to the rounding of their output.

The vendor's kernels through torch: one scale per row, or blockwise. `use_fast_accum` stays False everywhere: without
promotion the tensor cores' 14-bit accumulator truncates, a bias of -11 % on all-positive data at K = 11008 (measured).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.format import TILE
from mxdist.quant.kernels import cublas_lt
from mxdist.quant.kernels.forms import Form, Fp8Matrix, filled_up

ROTATION_GAIN = 32.0
"""Operands rotated by H / 32 multiply to 1 / 32 of the product, since H H = 32 I."""


def matmul(a: Fp8Matrix, b: Fp8Matrix, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a b^T [a.rows, b.rows] of `dtype` (bfloat16 or float32) for matrices over the same contraction axis.

    Forms: ROW with ROW, or TILE with TILE or SQUARE in either order. b.rows is a multiple of 16; of a SQUARE operand
    the rows are a multiple of 128. ValueError for operands that do not go together.
    """
    if a.k != b.k or a.rotated != b.rotated:
        raise ValueError(
            f"operands [{a.rows}, {a.k}] (rotated: {a.rotated}) and [{b.rows}, {b.k}] (rotated: {b.rotated}) do not "
            "share a contraction axis."
        )
    if (a.form is Form.ROW) != (b.form is Form.ROW) or a.form is b.form is Form.SQUARE:
        raise ValueError(f"there is no FP8 GEMM of a {a.form} operand with a {b.form} operand.")
    if not a.rows or not b.rows or not a.k:
        return torch.zeros(a.rows, b.rows, dtype=dtype, device=a.data.device)
    if a.form is not Form.ROW:
        return multiply(a, right(b), dtype)
    if a.data.device.type == "cpu":
        return (_padded(a) @ _padded(b).t()).to(dtype)
    scale_a = a.scale * ROTATION_GAIN if a.rotated else a.scale
    return torch._scaled_mm(a.data, b.data.t(), scale_a, b.scale.t(), out_dtype=dtype, use_fast_accum=False)


def _padded(matrix: Fp8Matrix) -> Tensor:
    """float32 [rows, K], what fills up whole tiles included: for the tests on a CPU."""
    gain = ROTATION_GAIN**0.5 if matrix.rotated else 1.0
    return matrix._replace(k=matrix.data.shape[1]).dequantise() * gain


class Blocks(NamedTuple):
    """A TILE or SQUARE operand as torch's blockwise GEMM takes it, worked out before a loop over many small products.

    data    bytes [rows, K] of a left operand, [K, rows] of a right one
    scale   one tensor: [rows, tiles] with rows contiguous, or [tiles filled up to 4, row tiles]
    recipe  one number: what shares a scale
    """

    data: Tensor
    scale: list[Tensor]
    recipe: list[int]


TILES, SQUARES = [F.ScalingType.BlockWise1x128.value], [F.ScalingType.BlockWise128x128.value]


def right(matrix: Fp8Matrix) -> Blocks:
    """`matrix` [rows, K] as the right operand of `multiply_blocks`."""
    if matrix.form is Form.SQUARE:
        return Blocks(matrix.data.t(), [_square_scale(matrix.rows, matrix.scale)], SQUARES)
    return Blocks(matrix.data.t(), [_tile_scale(matrix.rows, matrix.scale)], TILES)


def multiply_blocks(a: Blocks, b: Blocks, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, without `matmul`'s checks. K and a's rows are multiples of 128 and of 4."""
    _product(a, b, out.dtype, out, add)


def multiply(a: Fp8Matrix, b: Blocks, dtype: torch.dtype) -> Tensor:
    """Return a b of `dtype`: what `matmul` computes, without its checks, for a not of form ROW."""
    if not a.data.numel() or not b.data.numel():
        return torch.zeros(a.rows, b.data.shape[1], dtype=dtype, device=a.data.device)
    left, filled = _left(a)
    product = _product(left, b, dtype)
    return product[: a.rows] if filled else product


def accumulate(total: Tensor, a: Fp8Matrix, b: Blocks) -> None:
    """Add a b to `total`, float32: a micro-batch's share of a main gradient. a is not of form ROW."""
    if not a.data.numel() or not b.data.numel():
        return
    left, filled = _left(a)
    if filled:
        total += _product(left, b, total.dtype)[: a.rows]
    else:
        _product(left, b, total.dtype, total, add=True)


def _left(a: Fp8Matrix) -> tuple[Blocks, bool]:
    """`a` as a left operand, and whether rows were added to fill it up."""
    data, scale = a.data, a.scale * ROTATION_GAIN if a.rotated else a.scale
    rows = data.shape[0]
    if a.form is not Form.TILE:
        return Blocks(data, [_square_scale(rows, scale)], SQUARES), False
    if not rows % 4:
        return Blocks(data, [_tile_scale(rows, scale)], TILES), False
    data, scale = filled_up(a._replace(scale=scale))  # cuBLASLt wants the scales' leading dimension in 16 bytes
    return Blocks(data, [scale], TILES), True


def _product(a: Blocks, b: Blocks, dtype: torch.dtype, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a b, written or added to `out` if there is one."""
    if a.data.is_cuda and cublas_lt.loaded():
        if out is None:
            out = torch.empty(a.data.shape[0], b.data.shape[1], dtype=dtype, device=a.data.device)
        if cublas_lt.multiply(
            a.data, a.scale[0], a.recipe == SQUARES, b.data, b.scale[0], b.recipe == SQUARES, out, add
        ):
            return out
    if out is not None and add:
        return out.add_(_product_by_torch(a, b, dtype))
    return _product_by_torch(a, b, dtype, out)


def _product_by_torch(a: Blocks, b: Blocks, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    if a.data.is_cuda:
        arguments: tuple[Any, ...] = a.data, b.data, a.scale, a.recipe, [], b.scale, b.recipe, [], None, dtype
        return _scaled_mm(*arguments) if out is None else _scaled_mm_out(*arguments, out=out)
    result = (_block_values(a.data, a) @ _block_values(b.data.t(), b).t()).to(dtype)  # for the tests, in float32
    return result if out is None else out.copy_(result)


# Naming the overloads spares torch from trying them one after the other in every call.
_scaled_mm, _scaled_mm_out = torch.ops.aten._scaled_mm_v2.default, torch.ops.aten._scaled_mm_v2.out


def _block_values(data: Tensor, blocks: Blocks) -> Tensor:
    """float32 [rows, K] of bytes in that order."""
    (scale,) = blocks.scale
    if blocks.recipe == SQUARES:
        scale = scale[: data.shape[1] // TILE].t().repeat_interleave(TILE, 0)[: len(data)]
    return data.float() * scale.repeat_interleave(TILE, 1)


def _tile_scale(rows: int, scale: Tensor) -> Tensor:
    """Scales of a TILE as torch's blockwise GEMM takes them: [rows, tiles], by columns."""
    return scale if scale.stride() == (1, rows) else scale.t().contiguous().t()


def _square_scale(rows: int, scale: Tensor) -> Tensor:
    """Scales of a SQUARE as torch's blockwise GEMM takes them: [tiles filled up to 4, row tiles], by columns."""
    padded = scale.stride(0)
    if padded % 4 or scale.stride(1) != 1:  # multiplied by the rotation's gain: freshly laid out
        return F.pad(scale, (0, -scale.shape[1] % 4)).t()
    return scale.as_strided((padded, -(-rows // TILE)), (1, padded))
