"""Products of the engine with its live weights: which kernel, by device and number of rows. No vLLM here.

With values beside the bytes (a CPU) a product is the learner's reference one. With bytes alone (a GPU):

    few rows     the decode kernel reads the bytes as they are
    many rows    bytes become E4M3 for an FP8 GEMM, or values for a plain one, for the length of the call

Batches of at most `GRAPH_TOKENS` tokens never make the host wait for a GPU, so that CUDA graphs can hold them.
All multiply the same quantised numbers. FP8 products are exact to the rounding of their output; the others round
macro factors and residuals to the model's dtype first, as the learner's values are.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mxdist.quant.backend import fake_quantise, quantisers_lack
from mxdist.quant.kernels.options import DECODE_ROWS, TILE_ROWS, missing_in_packed, runs_in_tiles
from mxdist.quant.kernels.plan import Gemm, device_lacks, plan
from mxdist.quant.layout import as_rows
from mxdist.quant.linear import mx_linear
from mxdist.quant.recipe import Operand, Recipe
from mxdist.quant.reference import NonFinite
from mxdist.rollout.live_weight import LiveWeight

if TYPE_CHECKING:
    from mxdist.quant.kernels.decode import Groups

GRAPH_TOKENS = 512
"""Most tokens of a batch that a CUDA graph holds; with more, launches are no longer what a step takes."""


def graph_sizes(max_sequences: int) -> list[int]:
    """Sequences that a step is recorded for; others take the next larger one: from 32 on a quarter more at most."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, GRAPH_TOKENS + 1, 64)]
    most = min(max_sequences, GRAPH_TOKENS)
    return [*(size for size in sizes if size < most), most]


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

    @property
    def grouped(self) -> bool:
        """Whether torch multiplies groups of bfloat16 rows in one kernel, their sizes unknown to the host: Hopper."""
        return self.fp8


@lru_cache
def abilities(device: torch.device) -> Abilities:
    triton = quantisers_lack(device) is None
    return Abilities(triton, triton and device_lacks(device) is None)


def choose(
    recipe: Recipe, shape: tuple[int, int], rows: int, device: Abilities, dtype: torch.dtype = torch.bfloat16
) -> Product:
    """How ``rows`` rows of ``dtype`` are multiplied with a packed weight of ``shape`` [outputs, inputs]."""
    if recipe.w is None or not device.triton or missing_in_packed(recipe.w) is not None:
        return Product.EXPANDED
    in_tiles = device.fp8 and dtype != torch.float32 and runs_in_tiles(recipe.w, shape[1], recipe.x_fwd)
    if rows <= (TILE_ROWS if in_tiles else DECODE_ROWS):
        return Product.DECODE
    # The plan's forms for training may share scales over squares; any of them also runs with a scale per tile.
    runs_in_fp8 = plan(recipe, *shape).forward.gemm in (Gemm.ROW, Gemm.BLOCK, Gemm.TILE)
    return Product.FP8 if device.fp8 and runs_in_fp8 else Product.EXPANDED


def linear(x: Tensor, weight: LiveWeight, recipe: Recipe, bias: Tensor | None, name: str) -> Tensor:
    """Q(x) W^T + bias, of x's dtype, for x [..., inputs]."""
    if weight.values is not None:
        return mx_linear(x, weight.values, weight.values, recipe, bias, name=name, nonfinite=_nonfinite(x))
    rows = as_rows(x)
    product = choose(recipe, weight.shape, len(rows), abilities(x.device), x.dtype)
    if product is Product.EXPANDED:
        values = live_values(weight)
        return mx_linear(x, values, values, recipe, bias, name=name, nonfinite=_nonfinite(x))
    if product is Product.FP8:
        y = _fp8_product(rows, weight, recipe, bias)
    else:
        from mxdist.quant.kernels import decode

        if recipe.x_fwd is not None and decode.quantises(recipe.x_fwd):
            y = decode.multiply(rows, weight.packed(), bias, recipe.x_fwd)
        else:
            y = decode.multiply(quantised(rows, recipe.x_fwd, name), weight.packed(), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """How many rows each expert has, where rows lie grouped by expert.

    Args:
        counts: int64 [experts], on the rows' device.
        rows: of all experts together.
        on_device: products are not to read `counts` on the host.
    """

    counts: Tensor
    rows: int
    on_device: bool

    @classmethod
    def of(cls, experts: Tensor, count: int) -> "ExpertRows":
        """For the chosen ``experts`` int64 [tokens, top_k], each below ``count``."""
        chosen = experts.flatten()
        # torch.bincount would read the largest on the host.
        counts = chosen.new_zeros(count).scatter_add_(0, chosen, torch.ones_like(chosen))
        return cls(counts, len(chosen), len(experts) <= GRAPH_TOKENS and abilities(experts.device).triton)

    @cached_property
    def sizes(self) -> list[int]:
        """Waits for the device, once."""
        return self.counts.tolist()

    @cached_property
    def groups(self) -> "Groups":
        """For the decode kernel."""
        from mxdist.quant.kernels.decode import Groups

        if self.on_device:
            return Groups.from_counts(self.counts, self.rows)
        return Groups.of(self.sizes, self.counts.device)


def grouped_linear(rows: Tensor, weight: LiveWeight, recipe: Recipe, of: ExpertRows) -> Tensor:
    """Quantised rows [pairs, in] grouped by expert, group e times W_e^T; weight [experts * out, in]."""
    experts = len(of.counts)
    outputs, inputs = weight.shape[0] // experts, weight.shape[1]
    if not len(rows):
        return rows.new_empty(0, outputs)
    if weight.values is None:
        few = 1 if of.on_device else -(-len(rows) // sum(size > 0 for size in of.sizes))
        product = choose(recipe, (outputs, inputs), few, abilities(rows.device))
        if product is Product.DECODE and few <= DECODE_ROWS:
            from mxdist.quant.kernels import decode

            return decode.multiply_experts(rows, weight.packed(), of.groups)
    if of.on_device:
        return _grouped_values(rows, live_values(weight).view(experts, outputs, inputs), of.counts)
    out, start = rows.new_empty(len(rows), outputs), 0
    for expert, size in enumerate(of.sizes):
        if size:
            values = live_values(weight, slice(expert * outputs, (expert + 1) * outputs))
            torch.mm(rows[start : start + size], values.t(), out=out[start : start + size])
        start += size
    return out


def _grouped_values(rows: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """Plain rows [pairs, in] grouped by expert times values [experts, out, in], without the host."""
    ends = counts.cumsum(0)
    if rows.dtype == torch.bfloat16 and abilities(rows.device).grouped:
        return torch._grouped_mm(rows, values.transpose(1, 2), offs=ends.to(torch.int32))
    # All rows with all experts: float32 serves checks on small models, where that is no matter.
    places = torch.arange(len(rows), device=rows.device)
    return torch.matmul(rows, values.transpose(1, 2))[torch.searchsorted(ends, places, right=True), places]


def live_values(weight: LiveWeight, rows: slice = slice(None)) -> Tensor:
    """The values of some rows of a weight, of the model's dtype: those beside the bytes, or made from them."""
    if weight.values is not None:
        return weight.values[rows]
    packed = weight.packed()[rows]
    if abilities(packed.codes.device).triton and missing_in_packed(packed.operand) is None:
        from mxdist.quant.kernels.packed import expand

        return expand(packed, weight.dtype)
    return packed.dequantise(weight.dtype)


def quantised(x: Tensor, operand: Operand | None, name: str) -> Tensor:
    """What a product multiplies, in x's dtype: Q(x), or x itself where the recipe keeps activations."""
    if operand is None:
        return x
    return fake_quantise(x, operand, name=f"{name} input", nonfinite=_nonfinite(x), dtype=x.dtype)


def _nonfinite(x: Tensor) -> NonFinite:
    """Looking for NaN would make the host wait for a GPU in every linear; there it shows in log-probabilities."""
    return "error" if x.device.type == "cpu" else "propagate"


def _fp8_product(x: Tensor, weight: LiveWeight, recipe: Recipe, bias: Tensor | None) -> Tensor:
    from mxdist.quant.kernels.gemm import multiply, right
    from mxdist.quant.kernels.quant_tiles import quantise_tiles
    from mxdist.quant.kernels.unpack import unpack

    by_row, _ = quantise_tiles(x, recipe.x_fwd, nonfinite="propagate")
    assert by_row is not None
    y = multiply(by_row, right(unpack(weight.packed(), "propagate")), x.dtype)
    return y if bias is None else y.add_(bias)
