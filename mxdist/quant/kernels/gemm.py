"""Dense GEMMs on E4M3 operands, exact to the rounding of their output.

The vendor's kernels through torch: one scale per row, or blockwise. `use_fast_accum` stays False everywhere: without
promotion the tensor cores' 14-bit accumulator truncates, a bias of -11 % on all-positive data at K = 11008 (measured).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.format import TILE
from mxdist.quant.kernels.forms import Form, Fp8Matrix

ROTATION_GAIN = 32.0
"""Operands rotated by H / 32 multiply to 1 / 32 of the product, since H H = 32 I."""


def matmul(
    a: Fp8Matrix, b: Fp8Matrix, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return a b^T [a.rows, b.rows] of `dtype` (bfloat16 or float32) for matrices over the same contraction axis.

    out  where to write, contiguous, of `dtype`'s kind.

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
        zeros = torch.zeros(a.rows, b.rows, dtype=dtype, device=a.data.device)
        return zeros if out is None else out.copy_(zeros)
    if a.data.device.type == "cpu":  # for the tests: the function, in float32; a rotation fills the padding
        left, right = (replace(each, k=each.data.shape[1]).dequantise() for each in (a, b))
        product = left @ right.t() * (ROTATION_GAIN if a.rotated else 1.0)
        return product.to(dtype) if out is None else out.copy_(product)
    scale_a = a.scale * ROTATION_GAIN if a.rotated else a.scale
    if a.form is Form.ROW:
        return torch._scaled_mm(
            a.data, b.data.t(), scale_a, b.scale.t(), out_dtype=dtype, use_fast_accum=False, out=out
        )  # fmt: skip
    return _blockwise(Fp8Matrix(a.data, scale_a, a.form, a.k), b, dtype, out)


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
    return Blocks(matrix.data.t(), [_block_scale(matrix)], [_block_recipe(matrix).value])


def multiply_blocks(a: Blocks, b: Blocks, out: Tensor) -> None:
    """out = a b: what `matmul` computes, without its checks. K and a's rows are multiples of 128 and of 4."""
    if a.data.device.type == "cpu":  # for the tests
        out.copy_(_block_values(a.data, a) @ _block_values(b.data.t(), b).t())
        return
    _scaled_mm_out(
        a.data, b.data, a.scale, a.recipe, [], b.scale, b.recipe, [], None, out.dtype, out=out
    )  # fmt: skip


_scaled_mm_out = torch.ops.aten._scaled_mm_v2.out


def _block_values(data: Tensor, blocks: Blocks) -> Tensor:
    """float32 [rows, K] of bytes in that order."""
    (scale,) = blocks.scale
    if blocks.recipe == SQUARES:
        scale = scale[: data.shape[1] // TILE].t().repeat_interleave(TILE, 0)[: len(data)]
    return data.float() * scale.repeat_interleave(TILE, 1)


def accumulate(total: Tensor, a: Fp8Matrix, b: Fp8Matrix) -> None:
    """Add a b^T to `total`, float32 [a.rows, b.rows]: a micro-batch's share of a main gradient."""
    total.add_(matmul(a, b, torch.float32))


def _blockwise(a: Fp8Matrix, b: Fp8Matrix, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    rows = a.rows
    if a.form is Form.TILE and rows % 4:  # cuBLASLt wants the scales' leading dimension in 16 bytes
        a = _with_rows(a, rows + -rows % 4)
    arguments: tuple[Any, ...] = (
        a.data, b.data.t(), [_block_scale(a)], [_block_recipe(a).value], [], [_block_scale(b)],
        [_block_recipe(b).value], [], None, dtype,
    )  # fmt: skip
    if out is not None and a.rows == rows:
        return torch.ops.aten._scaled_mm_v2.out(*arguments, out=out)
    result = torch.ops.aten._scaled_mm_v2(*arguments)[:rows]
    return result if out is None else out.copy_(result)


def _with_rows(a: Fp8Matrix, rows: int) -> Fp8Matrix:
    data = F.pad(a.data.view(torch.uint8), (0, 0, 0, rows - a.rows)).view(a.data.dtype)
    return Fp8Matrix(data, F.pad(a.scale.t(), (0, rows - a.rows)).t(), a.form, a.k)


def _block_recipe(matrix: Fp8Matrix) -> F.ScalingType:
    return F.ScalingType.BlockWise1x128 if matrix.form is Form.TILE else F.ScalingType.BlockWise128x128


def _block_scale(matrix: Fp8Matrix) -> Tensor:
    """Scales as `scaled_mm` takes them: [rows, tiles] with rows contiguous, or [tiles padded to 4, row tiles]."""
    if matrix.form is Form.TILE:
        scale = matrix.scale
        return scale if scale.stride() == (1, matrix.rows) else scale.t().contiguous().t()
    rows, padded = -(-matrix.rows // TILE), matrix.scale.stride(0)
    if padded % 4 or matrix.scale.stride(1) != 1:  # multiplied by the rotation's gain: freshly laid out
        padded = -(-matrix.scale.shape[1] // 4) * 4
        return F.pad(matrix.scale, (0, padded - matrix.scale.shape[1])).t()
    return matrix.scale.as_strided((rows, padded), (padded, 1)).t()
