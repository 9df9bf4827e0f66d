"""Megatron's MoE layer, whose tokens travel to the ranks of their experts as the bytes that the experts quantise to.

    high precision    2 or 4 bytes an element
    packed MXFP4      17/32 byte

Nothing changes but the traffic: experts quantise what arrives once more, which on quantised values changes nothing.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor

from mxdist.model.token_dispatcher import MxTokenDispatcher
from mxdist.quant.backend import dequantise, quantise
from mxdist.quant.recipe import Operand, Recipe
from mxdist.quant.tensor import MXTensor, part_shapes


class MxMoELayer(MoELayer):
    """Its experts are ``MxExperts``."""

    def __init__(self, *args: Any, pg_collection: Any = None, **settings: Any) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(*args, pg_collection=pg_collection, **settings)
        self.token_dispatcher = MxTokenDispatcher(
            self.num_local_experts, self.local_expert_indices, config=self.config, pg_collection=pg_collection
        )

    def dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows [rows, hidden], a copy of a token for each of its experts, to the ranks of those experts."""
        operand = self._sent_as()
        if operand is None:
            return super().dispatch(hidden_states, probs)
        # What is not finite becomes NaN here, and an error or a refused update where it is seen next.
        packed = quantise(hidden_states.detach(), operand, name="tokens sent to experts", nonfinite="propagate")
        arrived, probs = super().dispatch(torch.cat(list(packed.parts().values()), dim=1), probs)
        return _Arrived.apply(hidden_states, arrived, operand, self.token_dispatcher), probs

    def _sent_as(self) -> Operand | None:
        """How all ranks send; None: as they are.

        dW needs them as they are when it quantises them another way than the forward product, and so does telemetry.
        """
        linears = [expert.linear_fc1 for expert in self.experts.local_experts]
        if self.token_dispatcher.ep_size == 1 or any(linear.observer is not None for linear in linears):
            return None
        recipe: Recipe | None = linears[0].recipe  # that of all experts of a layer
        if recipe is None or recipe.x_fwd is None or recipe.x_wgrad is not None:
            return None
        return recipe.x_fwd if _is_idempotent(recipe.x_fwd) else None


def _is_idempotent(operand: Operand) -> bool:
    """Whether quantising quantised values changes nothing: factors and residuals would be others."""
    plain = operand.macro is None and operand.fallback is None and not operand.mean
    return plain and operand.rounding == "nearest" and operand.hadamard == "none"


class _Arrived(torch.autograd.Function):
    """The values of the bytes that arrived; backward, their gradients travel back to the rows that were sent."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, arrived: Tensor, operand: Operand, dispatcher: Any) -> Tensor:
        ctx.group, ctx.back = dispatcher.ep_group, (dispatcher.input_splits, dispatcher.output_splits)
        shape = (len(arrived), rows.shape[1])
        widths = {key: part[-1] for key, part in part_shapes(shape, operand).items()}
        pieces = arrived.split(list(widths.values()), dim=1)
        parts = {key: piece.contiguous() for key, piece in zip(widths, pieces, strict=True)}
        return dequantise(MXTensor.from_parts(parts, shape, operand), rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return all_to_all(ctx.group, grads[0].contiguous(), *ctx.back), None, None, None
