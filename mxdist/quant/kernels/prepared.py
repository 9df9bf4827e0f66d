"""A quantised weight as the operands of its GEMMs: made once per optimizer step, multiplied in every micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxdist.quant.kernels import quant_terms
from mxdist.quant.kernels.dequantise import dequantise
from mxdist.quant.kernels.forms import Form, Fp8Matrix, empty_tiles
from mxdist.quant.kernels.gemm import Blocks, matmul, multiply, right
from mxdist.quant.kernels.packed import expand
from mxdist.quant.kernels.plan import Gemm, Plan, without_bytes
from mxdist.quant.kernels.quant_residual import quantise_with_residual, repeat_tiles, room_for_tiles
from mxdist.quant.kernels.quant_weight import Fp8Weight, quantise_weight, quantise_weights
from mxdist.quant.kernels.unpack import unpack
from mxdist.quant.recipe import Recipe
from mxdist.quant.reference import NonFinite
from mxdist.quant.tensor import MXTensor
from mxdist.quant.transform import Frozen


@dataclass(frozen=True, slots=True, eq=False)
class HopperWeight:
    """A quantised weight [N, K] for the GEMMs of `plan`.

    forward     bytes, or None where products run on values
    transposed  the same bytes [K, N]; None for weights with a macro factor per tile, which have no FP8 form along N
    longer      [N, K + 128 n]: forward and copies of the n tiles whose activations have a residual, or None
    values      dequantised [N, K], instead of bytes
    rights      forward (or longer) and transposed as right operands of blockwise GEMMs; None for form ROW and values
    """

    plan: Plan
    forward: Fp8Matrix | None
    transposed: Fp8Matrix | None = None
    longer: Fp8Matrix | None = None
    values: Tensor | None = None
    rights: tuple[Blocks, Blocks | None] | None = None

    def product(self, x: Fp8Matrix, dtype: torch.dtype) -> Tensor:
        """Return x W^T of `dtype` for x quantised along K, as the plan says."""
        if self.rights is not None:
            return multiply(x, self.rights[0], dtype)
        assert self.forward is not None
        return matmul(x, self.forward, dtype)

    def transposed_product(self, dy: Fp8Matrix, dtype: torch.dtype) -> Tensor:
        """Return dy W of `dtype` for dy quantised along N, as the plan says."""
        if self.rights is not None and self.rights[1] is not None:
            return multiply(dy, self.rights[1], dtype)
        assert self.transposed is not None
        return matmul(dy, self.transposed, dtype)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return W_q [N, K]."""
        if self.values is not None:
            return self.values.to(dtype)
        assert self.forward is not None
        return dequantise(self.forward, dtype)

    def rounded(self, packed: MXTensor, dtype: torch.dtype) -> Tensor:
        """Whether bytes lost something of `packed`, which they do when codes of a square span more than 14 binades.

        bool on the device, for which nobody waits here. Compared as values of `dtype`.
        """
        if self.forward is None:
            return torch.zeros((), dtype=torch.bool, device=packed.codes.device)
        return (self.dequantise(dtype) != expand(packed, dtype)).any()

    def as_values(self, packed: MXTensor, dtype: torch.dtype) -> HopperWeight:
        """The same weight without bytes, of `packed`'s values."""
        plan = without_bytes(self.plan, "the codes of a 128x128 square of W span more than E4M3's 14 binades")
        return HopperWeight(plan, None, values=expand(packed, dtype))


def prepare_weights(
    weights: Tensor, count: int, recipe: Recipe, choice: Plan, packed: MXTensor, name: str, rounded: Tensor
) -> list[HopperWeight]:
    """Prepare `count` equal weights that stand one below the other, [count * N, K], of which `packed` is made.

    rounded  int32 [count] of zeros on the device: set for weights that lost something of `packed` in their bytes.

    NaN and Inf pass through. Nobody waits for the device here.
    """
    assert recipe.w is not None
    if choice.forward.gemm is not Gemm.BF16 and choice.weight_form is Form.SQUARE:
        both = quantise_weights(weights, count, recipe.w, name, "propagate", rounded)
        return [HopperWeight(choice, each.forward, each.transposed, rights=each.rights) for each in both]
    rows = len(weights) // count
    pairs = list(zip(weights.split(rows), packed.split(rows), strict=True))
    found = [prepare_weight(each, recipe, choice, of, name=name, nonfinite="propagate") for each, of in pairs]
    if choice.forward.gemm is Gemm.ROW:  # values and tiles hold all of it
        lost = [each.rounded(of, weights.dtype) for each, (_, of) in zip(found, pairs, strict=True)]
        rounded.copy_(torch.stack(lost))
    return found


def prepare_weight(
    weight: Tensor,
    recipe: Recipe,
    choice: Plan,
    packed: MXTensor | None = None,
    *,
    frozen: Frozen | None = None,
    name: str = "weight",
    nonfinite: NonFinite = "error",
) -> HopperWeight:
    """Quantise a master weight [N, K] for `choice`, a plan of `recipe` that is not the reference.

    packed  the same weight quantised already, which saves the search of macro factors.
    frozen  lists the tiles of X that have a residual, if `choice` was made for such a list.
    """
    assert recipe.w is not None
    if choice.forward.gemm is Gemm.BF16:
        if packed is not None:
            return HopperWeight(choice, None, values=expand(packed, weight.dtype))
        values = quant_terms.fake_quantise(weight, recipe.w, name=name, nonfinite=nonfinite, dtype=weight.dtype)
        return HopperWeight(choice, None, values=values)
    (n, k), form, tiles = weight.shape, choice.weight_form, None if frozen is None else frozen.tiles
    longer = own = None
    if tiles is not None and recipe.x_fwd is not None and recipe.x_fwd.fallback is not None:
        longer, own = room_for_tiles(n, k, form, len(tiles), weight.device)
    if form is Form.TILE and own is None and packed is not None:
        forward, transposed = unpack(packed, "propagate"), None
    elif form is Form.TILE:
        forward = quantise_with_residual(weight, recipe.w, name=name, nonfinite=nonfinite, out=own)
        transposed = None
    else:
        out = Fp8Weight(own, empty_tiles(k, n, form, weight.device)) if own else None
        both = quantise_weight(weight, recipe.w, form=form, out=out, name=name, nonfinite=nonfinite)
        forward, transposed = both.forward, both.transposed
    if longer is not None and tiles is not None:
        repeat_tiles(longer, tiles)
    rights = None
    if form is not Form.ROW:
        rights = right(longer or forward), None if transposed is None else right(transposed)
    return HopperWeight(choice, forward, transposed, longer, rights=rights)
