"""Work space that is kept between calls, because fresh memory is slower than the arithmetic done in it.

The quantiser makes a few chunk-sized temporaries per call. Asking the allocator for them each time means page faults
that cost several passes over the data on a CPU, so each thread keeps one buffer per use.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_KEPT_ELEMENTS = 1 << 20


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}


_buffers = _Buffers()


def scratch(name: str, like: Tensor) -> Tensor:
    """Return an uninitialised float32 tensor of `like`'s shape and device.

    On a CPU it is valid until this thread next asks for the same name, so it must not leave the function that asked,
    nor may that function call itself. Elsewhere, and for very large shapes, it is simply a new tensor.
    """
    if like.device.type != "cpu" or like.numel() > _KEPT_ELEMENTS:
        return torch.empty(like.shape, dtype=torch.float32, device=like.device)
    buffer = _buffers.by_name.get(name)
    if buffer is None or buffer.numel() < like.numel():
        with torch.inference_mode(False):  # a buffer made inside inference mode could not be written outside it
            buffer = torch.empty(like.numel(), dtype=torch.float32)
        _buffers.by_name[name] = buffer
    return buffer[: like.numel()].view(like.shape)
