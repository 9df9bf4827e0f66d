"""The mixture-of-experts forward pass of the engine: routing, grouped GEMMs, weighted sum. No vLLM here.

The order of operations is the learner's: quantise a token once, fc1, silu(gate) * up, quantise, fc2, and only then
multiply by the routing weight and sum. Source of the routing: Qwen3-MoE as in Hugging Face transformers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.backend import fake_quantise
from mxdist.quant.recipe import Recipe
from mxdist.rollout.live_weight import LiveWeight


def route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Qwen3-MoE's routing, in float32: softmax over all experts, then the top k, then renormalise.

    Returns:
        Weights float32 and expert numbers int64, both [tokens, top_k].
    """
    weights, experts = logits.float().softmax(-1).topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalise else weights), experts


def run_experts(
    x: Tensor, weights: Tensor, experts: Tensor, w13: LiveWeight, w2: LiveWeight, fc1: Recipe, fc2: Recipe, name: str
) -> Tensor:
    """Sum over a token's experts of weight * fc2(Q(silu(gate) * up)); x is quantised once for all its experts.

    Args:
        x: [tokens, hidden]
        weights, experts: [tokens, top_k], as ``route`` returns them
        w13: rows [experts * 2 * wide, hidden]; w2: rows [experts * hidden, wide]
        fc1, fc2: the recipes of w13 and of w2
    """
    (tokens, hidden), top_k, wide = x.shape, experts.shape[1], w2.values.shape[1]
    count = w2.values.shape[0] // hidden
    order = experts.flatten().argsort(stable=True)  # (token, rank) pairs, grouped by expert
    rows = _quantised(x, fc1, name)[order // top_k]
    sizes = torch.bincount(experts.flatten(), minlength=count).tolist()
    gate_up = _grouped_linear(rows, w13.values.view(count, 2 * wide, hidden), sizes)
    gate, up = gate_up.chunk(2, dim=-1)
    inner = _quantised(F.silu(gate) * up, fc2, name)
    down = _grouped_linear(inner, w2.values.view(count, hidden, wide), sizes)
    out = torch.empty_like(down)
    out[order] = down
    # Summed in the order of a token's own ranks, whatever else is in the batch.
    return (out.view(tokens, top_k, hidden) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def _grouped_linear(rows: Tensor, weights: Tensor, sizes: list[int]) -> Tensor:
    """rows [pairs, in] in groups of ``sizes``, group e times weights[e]^T; weights [experts, out, in]."""
    out = rows.new_empty(rows.shape[0], weights.shape[1])
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            torch.mm(rows[start : start + size], weights[expert].t(), out=out[start : start + size])
        start += size
    return out


def _quantised(x: Tensor, recipe: Recipe, name: str) -> Tensor:
    """What the experts' GEMMs multiply, in x's dtype: Q(x), or x itself where the recipe keeps activations."""
    if recipe.x_fwd is None:
        return x
    return fake_quantise(x, recipe.x_fwd, name=f"{name} input", dtype=x.dtype)
