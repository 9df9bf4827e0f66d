"""The mixture-of-experts forward pass of the engine: routing, grouped GEMMs, weighted sum. No vLLM here.

The order of operations is the learner's: quantise a token once, fc1, silu(gate) * up, quantise, fc2, and only then
multiply by the routing weight and sum. Source of the routing: Qwen3-MoE as in Hugging Face transformers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.recipe import Recipe
from mxdist.rollout.live_weight import LiveWeight
from mxdist.rollout.products import ExpertRows, grouped_linear, quantised


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
    (tokens, hidden), top_k = x.shape, experts.shape[1]
    order = experts.flatten().argsort(stable=True)  # (token, rank) pairs, grouped by expert
    rows = quantised(x, fc1.x_fwd, name)[order // top_k]
    of = ExpertRows.of(experts, w2.shape[0] // hidden)
    gate_up = grouped_linear(rows, w13, fc1, of)
    gate, up = gate_up.chunk(2, dim=-1)
    inner = quantised(F.silu(gate) * up, fc2.x_fwd, name)
    down = grouped_linear(inner, w2, fc2, of)
    out = torch.empty_like(down)
    out[order] = down
    # Summed in the order of a token's own ranks, whatever else is in the batch.
    return (out.view(tokens, top_k, hidden) * weights.unsqueeze(-1)).sum(1).to(x.dtype)
