"""Products of the engine with its live weights: which kernel, by device and number of rows. No vLLM here.

With values beside the bytes (a CPU) a product is the learner's reference one. With bytes alone (a GPU):

    few rows     the decode kernel reads the bytes as they are
    many rows    bytes become E4M3 for an FP8 GEMM, or values for a plain one, for the length of the call

All multiply the same quantised numbers. FP8 products are exact to the rounding of their output; the others round
macro factors and residuals to the model's dtype first, as the learner's values are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import torch
from torch import Tensor

from mxdist.quant.backend import dequantise, fake_quantise, nonfinite_in_passing, quantisers_lack
from mxdist.quant.kernels.options import DECODE_ROWS, missing_in_packed
from mxdist.quant.kernels.plan import Gemm, device_lacks, plan
from mxdist.quant.layout import as_rows
from mxdist.quant.linear import mx_linear
from mxdist.quant.recipe import Operand, Recipe
from mxdist.rollout.live_weight import LiveWeight


class Product(StrEnum):
    """How a product with packed bytes is computed."""

    DECODE = "decode kernel on packed bytes"
    FP8 = "FP8 GEMM on E4M3 bytes made for the call"
    EXPANDED = "GEMM on values made for the call"


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a device can do: run Triton's kernels, multiply in FP8 with block scales."""

    triton: bool
    fp8: bool


@lru_cache
def abilities(device: torch.device) -> Abilities:
    triton = quantisers_lack(device) is None
    return Abilities(triton, triton and device_lacks(device) is None)


def choose(recipe: Recipe, shape: tuple[int, int], rows: int, device: Abilities) -> Product:
    """How ``rows`` rows are multiplied with a packed weight of ``shape`` [outputs, inputs]."""
    if recipe.w is None or not device.triton or missing_in_packed(recipe.w) is not None:
        return Product.EXPANDED
    if rows <= DECODE_ROWS:
        return Product.DECODE
    # The plan's forms for training may share scales over squares; any of them also runs with a scale per tile.
    runs_in_fp8 = plan(recipe, *shape).forward.gemm in (Gemm.ROW, Gemm.BLOCK, Gemm.TILE)
    return Product.FP8 if device.fp8 and runs_in_fp8 else Product.EXPANDED


def linear(x: Tensor, weight: LiveWeight, recipe: Recipe, bias: Tensor | None, name: str) -> Tensor:
    """Q(x) W^T + bias, of x's dtype, for x [..., inputs]."""
    if weight.values is not None:
        values = weight.values
        return mx_linear(x, values, values, recipe, bias, name=name, nonfinite=nonfinite_in_passing(x.device))
    rows = as_rows(x)
    product = choose(recipe, weight.shape, len(rows), abilities(x.device))
    if product is Product.EXPANDED:
        values = live_values(weight)
        return mx_linear(x, values, values, recipe, bias, name=name, nonfinite=nonfinite_in_passing(x.device))
    if product is Product.FP8:
        y = _fp8_product(rows, weight, recipe, bias)
    else:
        from mxdist.quant.kernels import decode

        y = decode.multiply(quantised(rows, recipe.x_fwd, name), weight.packed(), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def grouped_linear(rows: Tensor, weight: LiveWeight, recipe: Recipe, sizes: Sequence[int]) -> Tensor:
    """Quantised rows [pairs, in] in groups of ``sizes``, group e times W_e^T; weight [len(sizes) * out, in]."""
    outputs = weight.shape[0] // len(sizes)
    used = sum(size > 0 for size in sizes)
    shape = (outputs, weight.shape[1])
    if weight.values is None and used:
        product = choose(recipe, shape, -(-len(rows) // used), abilities(rows.device))
        if product is Product.DECODE:
            from mxdist.quant.kernels import decode

            return decode.multiply_experts(rows, weight.packed(), decode.Groups.of(sizes, rows.device))
    out, start = rows.new_empty(len(rows), outputs), 0
    for expert, size in enumerate(sizes):
        if size:
            values = live_values(weight, slice(expert * outputs, (expert + 1) * outputs))
            torch.mm(rows[start : start + size], values.t(), out=out[start : start + size])
        start += size
    return out


def live_values(weight: LiveWeight, rows: slice = slice(None)) -> Tensor:
    """The values of some rows of a weight, of the model's dtype: those beside the bytes, or made from them."""
    if weight.values is not None:
        return weight.values[rows]
    return dequantise(weight.packed()[rows], weight.dtype)


def quantised(x: Tensor, operand: Operand | None, name: str) -> Tensor:
    """What a product multiplies, in x's dtype: Q(x), or x itself where the recipe keeps activations."""
    if operand is None:
        return x
    return fake_quantise(x, operand, name=f"{name} input", nonfinite=nonfinite_in_passing(x.device), dtype=x.dtype)


def _fp8_product(x: Tensor, weight: LiveWeight, recipe: Recipe, bias: Tensor | None) -> Tensor:
    from mxdist.quant.kernels.gemm import matmul
    from mxdist.quant.kernels.quant_tiles import quantise_tiles
    from mxdist.quant.kernels.unpack import unpack

    by_row, _ = quantise_tiles(x, recipe.x_fwd, nonfinite="propagate")
    assert by_row is not None
    y = matmul(by_row, unpack(weight.packed(), "propagate"), x.dtype)
    return y if bias is None else y + bias
