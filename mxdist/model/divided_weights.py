"""Weights under ZeRO stage 3: divided over the ranks, and whole only while a layer computes or someone asks.

Each rank keeps the packed form of every quantised weight (about 4.25 bits a number) from one optimizer update to the
next, and makes the values that a product takes when it takes them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import deepspeed
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mxdist.model.hf_tensors import HfTensor
from mxdist.model.quantised_weight import QuantisedWeight
from mxdist.model.transformers_model import MxLinear
from mxdist.quant.backend import dequantise
from mxdist.quant.tensor import MXTensor

if TYPE_CHECKING:
    from mxdist.quant.kernels.prepared import HopperWeight


class DividedMxLinear(MxLinear):
    """Its weight has no elements here unless it is gathered, so the packed form alone knows which update it is of."""

    keeps_prepared = False
    recomputed = False
    """Whether the layer is computed again in the backward pass, so that nothing is kept of its forward pass."""

    @property
    def weight_size(self) -> tuple[int, int]:
        rows, columns = self.weight.ds_shape  # type: ignore[attr-defined]
        return rows, columns

    @staticmethod
    def whole_weights(linears: Sequence[QuantisedWeight]) -> AbstractContextManager[None]:
        return deepspeed.zero.GatheredParameters([linear.weight for linear in linears])

    def prepared(self) -> Tensor | None:
        return dequantise(self.quantised(), self.weight.dtype) if self.quantises_weight else None

    def product(self, x: Tensor, weight_q: "Tensor | HopperWeight | None") -> Tensor:
        if not isinstance(weight_q, Tensor) or self.recomputed:
            return super().product(x, weight_q)
        # Between forward and backward pass the packed form stands for the values.
        packed, address, dtype = self.quantised(), weight_q.data_ptr(), weight_q.dtype

        def pack(saved: Tensor) -> Tensor | MXTensor:
            return packed if saved.data_ptr() == address else saved

        def unpack(kept: Tensor | MXTensor) -> Tensor:
            return dequantise(kept, dtype) if isinstance(kept, MXTensor) else kept

        with saved_tensors_hooks(pack, unpack):
            return super().product(x, weight_q)

    def _identity(self) -> tuple[int, int]:
        return 0, 0

    @staticmethod
    def sums_of_bits(weights: Tensor, count: int) -> Sequence[int]:  # noqa: ARG004
        return [0] * count


@dataclass(frozen=True)
class DividedTensor(HfTensor):
    """A whole tensor of the model, of which a rank holds some numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.ds_shape)  # type: ignore[attr-defined]

    @property
    def parameter_size(self) -> int:
        return self.parameter.ds_numel  # type: ignore[attr-defined]

    def whole(self, changed: bool = False) -> AbstractContextManager[None]:
        """After a change the numbers are rank 0's everywhere."""
        return deepspeed.zero.GatheredParameters([self.parameter], modifier_rank=0 if changed else None)
