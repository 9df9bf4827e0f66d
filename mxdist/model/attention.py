"""Several sequences in one row of tokens: how they lie there, their rotary positions, and attention within each.

Megatron hands ``packed_seq_params`` of a forward pass down to the rotary embedding and to every core attention, through
recomputed layers as well; a ``Packing`` travels there. Everything else in a decoder treats tokens one by one.
"""

import inspect
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class Packing(PackedSeqParams):
    """Sequences of ``lengths`` tokens, one after the other, in one row.

    ``micro_batch`` counts the passes of an optimizer update from 0; random draws of a recomputed layer depend on it.
    """

    def __init__(self, lengths: tuple[int, ...], device: torch.device, micro_batch: int = 0) -> None:
        super().__init__(qkv_format="sbhd", max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
        self.lengths = lengths
        self.micro_batch = micro_batch
        self._device = device

    @cached_property
    def starts(self) -> Tensor:
        """Of each sequence and, last, the number of tokens, int32 [sequences + 1]."""
        lengths = torch.tensor((0, *self.lengths), dtype=torch.int64, device=self._device)
        return lengths.cumsum(0).to(torch.int32)

    @cached_property
    def positions(self) -> Tensor:
        """Of each token in its sequence, int64 [tokens]."""
        lengths = torch.tensor(self.lengths, device=self._device)
        first = self.starts[:-1].repeat_interleave(lengths, output_size=sum(self.lengths))
        return torch.arange(sum(self.lengths), device=self._device) - first

    @property
    def is_even(self) -> bool:
        return len(set(self.lengths)) == 1

    @cached_property
    def padded_from(self) -> Tensor:
        """The token that each place of the right-padded [sequences, longest] holds; padding repeats the last one."""
        lengths = torch.tensor(self.lengths, device=self._device)
        places = torch.arange(max(self.lengths), device=self._device)
        return (self.starts[:-1, None] + torch.minimum(places, lengths[:, None] - 1)).flatten()

    @cached_property
    def padded_to(self) -> Tensor:
        """The place of each token in the right-padded [sequences, longest], flat, int64 [tokens]."""
        lengths = torch.tensor(self.lengths, device=self._device)
        row = torch.arange(len(self.lengths), device=self._device)
        return row.repeat_interleave(lengths) * max(self.lengths) + self.positions


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
        attend = _by_flash if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else _by_padding
        return attend(*tensors, packed_seq_params).flatten(1).unsqueeze(1)


def _by_flash(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """torch's flash attention over sequences of various lengths; its arguments have changed between releases."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        causal["enable_gqa"] = True
    else:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    longest = max(packing.lengths)
    output = varlen_attn(query, key, value, packing.starts, packing.starts, longest, longest, **causal)
    assert isinstance(output, Tensor)  # and not a pair, which is returned only when asked for
    return output


def _by_padding(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """Right-padded for the time of the attention: no token attends to what lies behind it."""
    shape = (len(packing.lengths), max(packing.lengths))

    def padded(tensor: Tensor) -> Tensor:  # [sequences, heads, longest, head]
        tokens = tensor if packing.is_even else tensor[packing.padded_from]
        return tokens.unflatten(0, shape).transpose(1, 2)

    output = F.scaled_dot_product_attention(padded(query), padded(key), padded(value), is_causal=True, enable_gqa=True)
    flat = output.transpose(1, 2).flatten(0, 1)  # [sequences * longest, heads, head]
    return flat if packing.is_even else flat[packing.padded_to]
