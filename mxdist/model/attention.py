"""Packed sequences in Megatron-core: their rotary positions, and attention within each.

Megatron hands ``packed_seq_params`` of a forward pass down to the rotary embedding and to every core attention, through
recomputed layers as well; a ``Packing`` travels there. Everything else in a decoder treats tokens one by one.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mxdist.model.packing import PackedSequences, attend


class Packing(PackedSequences, PackedSeqParams):
    """As Megatron takes it."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device, micro_batch: int = 0) -> None:
        PackedSeqParams.__init__(self, qkv_format="sbhd", max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
        PackedSequences.__init__(self, lengths, device, micro_batch)


class PackedRotary(RotaryEmbedding):
    """Angles [tokens, 1, 1, head] that begin anew with every sequence."""

    def get_rotary_seq_len(self, *arguments: Any, **keywords: Any) -> Packing:  # noqa: ARG002
        """What Megatron passes on to ``forward``: instead of a length, the packing of the pass."""
        packing: Packing = arguments[4]
        return packing

    def forward(self, packing: Packing, **_: Any) -> Tensor:
        return self.get_emb(max(packing.lengths))[packing.positions]


class PackedAttention(nn.Module):
    """Causal attention within each sequence of a ``Packing``, on the heads of this tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        if config.softmax_scale is not None or config.attention_dropout or config.window_size:
            raise ValueError("attention here has the usual scale, no dropout and no window")

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, _: None, packed_seq_params: Packing, **__: Any
    ) -> Tensor:
        """Attend.

        Args:
            query: [tokens, 1, heads, head].
            key, value: [tokens, 1, groups, head]; ``groups`` divides ``heads``.
        Returns:
            [tokens, 1, heads * head].
        """
        tensors = (query.squeeze(1), key.squeeze(1), value.squeeze(1))
        return attend(*tensors, packed_seq_params).flatten(1).unsqueeze(1)
