"""The flag that quantiser kernels raise when a block holds NaN or Inf."""

from __future__ import annotations

import torch
from torch import Tensor

from mxdist.quant.layout import raise_nonfinite
from mxdist.quant.reference import NonFinite


class Flag:
    """An int32 on the device when `nonfinite` is "error"; otherwise nothing, and nobody waits for the device."""

    def __init__(self, device: torch.device, nonfinite: NonFinite) -> None:
        self.checked = nonfinite == "error"
        self.pointer: Tensor | None = torch.zeros(1, dtype=torch.int32, device=device) if self.checked else None

    def raise_if_set(self, x: Tensor, name: str) -> None:
        """ValueError with the position of the first NaN or Inf of x, if a kernel saw one."""
        if self.pointer is not None and self.pointer.item():
            raise_nonfinite(x, name)
