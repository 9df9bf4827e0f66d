"""The experts of one rank: Megatron's SequentialMLP in parameters and sharding, with our order of operations.

    h = silu(gate) * up        after fc1
    y = p * fc2(h)             the routing probability p comes last

Megatron multiplies p into h. The rollout engine quantises h without it, and quantising p * h is not p times quantising
h, so it has to come after fc2 here as well.

On a GPU all experts of a rank are computed together: in FP8 with quantising fused into the steps, where
``kernels.experts`` does the recipe, and in grouped bfloat16 products where nothing is quantised. One by one otherwise.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from mxdist.model.activation import swiglu
from mxdist.model.grouped_experts import grouped_linear
from mxdist.quant.backend import fake_quantise, nonfinite_in_passing, quantisers_lack
from mxdist.quant.linear import mx_linear
from mxdist.quant.recipe import Operand, Recipe
from mxdist.quant.transfer import sent


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
        output = self._together(permuted_local_hidden_states, counts)
        if output is None:
            output = self._one_by_one(permuted_local_hidden_states, counts)
        return output * permuted_probs.unsqueeze(-1).to(output.dtype), None

    @cached_property
    def _first_linears(self) -> list[Any]:
        """In the order of the experts; asking every one of hundreds of modules for its linear takes a while."""
        return [expert.linear_fc1 for expert in self.local_experts]

    @cached_property
    def _second_linears(self) -> list[Any]:
        return [expert.linear_fc2 for expert in self.local_experts]

    def _together(self, rows: Tensor, counts: list[int]) -> Tensor | None:
        """All experts at once; None where that cannot be, or somebody observes their linears."""
        if quantisers_lack(rows.device) is not None or not len(rows):
            return None
        first, second = self._first_linears, self._second_linears
        recipe: Recipe | None = first[0].recipe
        if recipe != second[0].recipe or first[0].observer is not None:
            return None
        weights = [linear.weight for linear in first], [linear.weight for linear in second]
        totals = _totals(weights)
        if recipe is None:
            return _in_bfloat16(rows, weights, counts, totals) if rows.dtype == torch.bfloat16 else None
        from mxdist.quant.kernels.experts import experts_mlp, fused_experts_lack
        from mxdist.quant.kernels.segments import Segments

        prepared = [linear.prepared() for linear in first], [linear.prepared() for linear in second]
        if fused_experts_lack([*prepared[0], *prepared[1]], recipe, rows.dtype) is not None:
            return None
        return experts_mlp(
            rows,
            *weights,
            prepared,
            Segments.of_sizes(counts, rows.device),
            recipe,
            seed=first[0].seed(),
            nonfinite=nonfinite_in_passing(rows.device),
            totals=totals,
        )

    def _one_by_one(self, rows: Tensor, counts: list[int]) -> Tensor:
        h = self._each_linear(self._first_linears, rows, counts)
        return self._each_linear(self._second_linears, swiglu(h), counts)

    def _each_linear(self, linears: list[Any], rows: Tensor, counts: list[int]) -> Tensor:
        """The linear of every expert on its own rows, in order."""
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


Layers = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Of the first and the second linear, one tensor for each expert."""


def _totals(weights: Layers) -> Layers | None:
    """Megatron's float32 gradients, which each micro-batch adds to; None without its data-parallel wrapper.

    Handing hundreds of gradients to autograd, and each to Megatron's hook, would take the host longer than the GPU
    takes to compute them. The hooks have nothing left to do (``overlap_grad_reduce`` is off).
    """
    if not hasattr(weights[0][0], "main_grad"):
        return None
    first, second = ([weight.main_grad for weight in layer] for layer in weights)  # type: ignore[attr-defined]
    return first, second


def _in_bfloat16(rows: Tensor, weights: Layers, counts: list[int], totals: Layers | None) -> Tensor:
    ends = sent(torch.tensor(counts).cumsum(0).to(torch.int32), rows.device)
    first, second = totals or (None, None)
    h = grouped_linear(rows, weights[0], ends, first)
    return grouped_linear(swiglu(h), weights[1], ends, second)


class _QuantiseStraightThrough(torch.autograd.Function):
    """x_hat forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operand: Operand) -> Tensor:  # noqa: ARG004
        return fake_quantise(x, operand, nonfinite=nonfinite_in_passing(x.device), dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None
