"""Several sequences in one row of tokens: how they lie there, and attention within each. Knows no training backend."""

import inspect
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.transfer import sent


class PackedSequences:
    """Sequences of ``lengths`` tokens, one after the other, in one row.

    ``micro_batch`` counts the passes of an optimizer update from 0; random draws of a recomputed layer depend on it.
    """

    def __init__(self, lengths: tuple[int, ...], device: torch.device, micro_batch: int = 0) -> None:
        self.lengths = lengths
        self.micro_batch = micro_batch
        self._device = device

    @cached_property
    def _on_device(self) -> Tensor:
        """The lengths, int64 [sequences]."""
        return sent(torch.tensor(self.lengths, dtype=torch.int64), self._device)

    @cached_property
    def starts(self) -> Tensor:
        """Of each sequence and, last, the number of tokens, int32 [sequences + 1]."""
        return F.pad(self._on_device.cumsum(0), (1, 0)).to(torch.int32)

    @cached_property
    def positions(self) -> Tensor:
        """Of each token in its sequence, int64 [tokens]."""
        first = self.starts[:-1].repeat_interleave(self._on_device, output_size=sum(self.lengths))
        return torch.arange(sum(self.lengths), device=self._device) - first

    @property
    def is_even(self) -> bool:
        return len(set(self.lengths)) == 1

    @cached_property
    def padded_from(self) -> Tensor:
        """The token that each place of the right-padded [sequences, longest] holds; padding repeats the last one."""
        places = torch.arange(max(self.lengths), device=self._device)
        return (self.starts[:-1, None] + torch.minimum(places, self._on_device[:, None] - 1)).flatten()

    @cached_property
    def padded_to(self) -> Tensor:
        """The place of each token in the right-padded [sequences, longest], flat, int64 [tokens]."""
        row = torch.arange(len(self.lengths), device=self._device)
        rows = row.repeat_interleave(self._on_device, output_size=sum(self.lengths))
        return rows * max(self.lengths) + self.positions


def attend(query: Tensor, key: Tensor, value: Tensor, packing: PackedSequences) -> Tensor:
    """Causal attention within each sequence.

    Args:
        query: [tokens, heads, head].
        key, value: [tokens, groups, head]; ``groups`` divides ``heads``.
    Returns:
        [tokens, heads, head].
    """
    by = _by_flash if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else _by_padding
    return by(query, key, value, packing)


def _by_flash(query: Tensor, key: Tensor, value: Tensor, packing: PackedSequences) -> Tensor:
    """torch's flash attention over sequences of various lengths; its arguments have changed between releases."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        causal["enable_gqa"] = True
    else:
        repeats = query.shape[1] // key.shape[1]
        # torch's repeat_interleave waits for the GPU, twice.
        key, value = (each.unsqueeze(2).expand(-1, -1, repeats, -1).flatten(1, 2) for each in (key, value))
    longest = max(packing.lengths)
    output = varlen_attn(query, key, value, packing.starts, packing.starts, longest, longest, **causal)
    assert isinstance(output, Tensor)  # and not a pair, which is returned only when asked for
    return output


def _by_padding(query: Tensor, key: Tensor, value: Tensor, packing: PackedSequences) -> Tensor:
    """Right-padded for the time of the attention: no token attends to what lies behind it."""
    shape = (len(packing.lengths), max(packing.lengths))

    def padded(tensor: Tensor) -> Tensor:  # [sequences, heads, longest, head]
        tokens = tensor if packing.is_even else tensor[packing.padded_from]
        return tokens.unflatten(0, shape).transpose(1, 2)

    output = F.scaled_dot_product_attention(padded(query), padded(key), padded(value), is_causal=True, enable_gqa=True)
    flat = output.transpose(1, 2).flatten(0, 1)  # [sequences * longest, heads, head]
    return flat if packing.is_even else flat[packing.padded_to]
