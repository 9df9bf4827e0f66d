"""Numbers about quantisation that training watches besides the error decomposition. Plain functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from mxdist.quant.format import unpack_nibbles
from mxdist.quant.tensor import MXTensor


def codes_changed(before: MXTensor, after: MXTensor) -> float:
    """Return the fraction of elements whose first-term value changed, as code or through its block scale.

    With the small learning rates of reinforcement learning most weights move by far less than a grid step, so this
    says how much of an update reached the quantised model. ValueError for tensors of different shape or operand.
    """
    if before.shape != after.shape or before.operand != after.operand:
        raise ValueError(f"codes of different tensors cannot be compared: {before.shape} and {after.shape}.")
    if before.codes.numel() == 0:
        return 0.0
    old, new = unpack_nibbles(before.codes), unpack_nibbles(after.codes)
    rescaled = (before.scales != after.scales).repeat_interleave(old.shape[-1] // before.scales.shape[-1], dim=-1)
    changed = (old != new) | (rescaled & ((old | new) & 7 > 0))
    return changed[..., : before.shape[-1]].float().mean().item()


def flagged_fraction(mx: MXTensor) -> float:
    """Return the fraction of blocks that carry a residual (1 for the whole-tensor fallback, 0 without fallback)."""
    if mx.residual_scales is None or mx.residual_scales.numel() == 0:
        return 0.0
    return (mx.residual_scales > 0).float().mean().item()


def router_flip_rate(logits: Tensor, logits_quantised: Tensor, top_k: int) -> float:
    """Return the fraction of (token, chosen expert) pairs that quantisation replaces by another expert.

    logits, logits_quantised   router outputs [tokens, experts] without and with quantisation upstream.
    """
    if logits.shape != logits_quantised.shape or not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(
            f"cannot compare the top {top_k} of {tuple(logits.shape)} and {tuple(logits_quantised.shape)}."
        )
    if logits.numel() == 0:
        return 0.0
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.topk(top_k, -1).indices, True)
    kept = chosen.gather(-1, logits_quantised.topk(top_k, -1).indices)
    return 1.0 - kept.float().mean().item()
