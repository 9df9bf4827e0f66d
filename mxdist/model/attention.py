"""Packed sequences in Megatron-core: their rotary positions, and attention within each.

Megatron hands ``packed_seq_params`` of a forward pass down to every core attention, through recomputed layers as well;
a ``Packing`` travels there. Everything else in a decoder treats tokens one by one. Positions are embedded here and not
by Megatron, which takes twenty kernels for it.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mxdist.model.packing import PackedSequences, attend
from mxdist.model.rotary import Rotation, rotate, rotation


class Packing(PackedSequences, PackedSeqParams):
    """As Megatron takes it."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device, micro_batch: int = 0) -> None:
        PackedSeqParams.__init__(self, qkv_format="sbhd", max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
        PackedSequences.__init__(self, lengths, device, micro_batch)
        self._rotation: Rotation | None = None

    def rotation(self, head: int, base: float, dtype: torch.dtype) -> Rotation:
        """Angles that begin anew with every sequence; the same for all layers, hence made once."""
        if self._rotation is None:
            self._rotation = rotation(self.positions, head, base, dtype)
        return self._rotation


class PackedAttention(nn.Module):
    """Causal attention within each sequence of a ``Packing``, on the heads of this tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, rotary_base: float, **_: Any) -> None:
        super().__init__()
        self._rotary_base = rotary_base
        if config.softmax_scale is not None or config.attention_dropout or config.window_size:
            raise ValueError("attention here has the usual scale, no dropout and no window")

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, _: None, packed_seq_params: Packing, **__: Any
    ) -> Tensor:
        """Attend.

        Args:
            query: [tokens, 1, heads, head], positions not yet in it.
            key, value: [tokens, 1, groups, head]; ``groups`` divides ``heads``.
        Returns:
            [tokens, 1, heads * head].
        """
        turned = packed_seq_params.rotation(query.shape[-1], self._rotary_base, query.dtype)
        query, key = (rotate(part.squeeze(1), turned) for part in (query, key))
        return attend(query, key, value.squeeze(1), packed_seq_params).flatten(1).unsqueeze(1)
