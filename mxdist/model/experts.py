"""The experts of one rank: Megatron's SequentialMLP in parameters and sharding, with our order of operations.

    h = silu(gate) * up        after fc1
    y = p * fc2(h)             the routing probability p comes last

Megatron multiplies p into h. The rollout engine quantises h without it, and quantising p * h is not p times quantising
h, so it has to come after fc2 here as well.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from mxdist.quant.backend import fake_quantise, nonfinite_in_passing
from mxdist.quant.linear import mx_linear
from mxdist.quant.recipe import Operand, Recipe


class MxExperts(SequentialMLP):
    """Local experts, whose linears are those of ``MxSpecProvider``."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Apply each local expert to its rows.

        Args:
            permuted_local_hidden_states: [rows, hidden], grouped by local expert.
            tokens_per_expert: int64 [local experts].
            permuted_probs: float32 [rows].
        Returns:
            [rows, hidden] and no bias.
        """
        counts = tokens_per_expert.tolist()
        gate_up = self._grouped_linear("linear_fc1", permuted_local_hidden_states, counts)
        gate, up = gate_up.chunk(2, dim=-1)  # [rows, ffn] each
        output = self._grouped_linear("linear_fc2", F.silu(gate) * up, counts)
        return output * permuted_probs.unsqueeze(-1).to(output.dtype), None

    def _grouped_linear(self, name: str, rows: Tensor, counts: list[int]) -> Tensor:
        """The linear ``name`` of every expert on its own rows, in order."""
        linears = [getattr(expert, name) for expert in self.local_experts]
        recipe: Recipe | None = linears[0].recipe
        inputs, passing = torch.split(rows, counts), nonfinite_in_passing(rows.device)
        weights = [linear.prepared() for linear in linears]
        by_reference = all(weight is None or isinstance(weight, Tensor) for weight in weights)
        if by_reference and recipe is not None and recipe.x_fwd is not None and recipe.x_wgrad is None:
            # Rows are quantised independently, so once for all experts gives the same bits with fewer operations.
            rows = _QuantiseStraightThrough.apply(rows, recipe.x_fwd)
            recipe = replace(recipe, x_fwd=None)
        outputs = []
        for linear, weight_q, x, chunk in zip(linears, weights, inputs, torch.split(rows, counts), strict=True):
            if recipe is None:
                outputs.append(F.linear(chunk, linear.weight))
            else:
                about = {"seed": linear.seed(), "name": linear.name, "nonfinite": passing}
                outputs.append(mx_linear(chunk, linear.weight, weight_q, recipe, **about))
                linear.show(x, outputs[-1])
        return torch.cat(outputs)


class _QuantiseStraightThrough(torch.autograd.Function):
    """x_hat forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operand: Operand) -> Tensor:  # noqa: ARG004
        return fake_quantise(x, operand, nonfinite=nonfinite_in_passing(x.device), dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None
