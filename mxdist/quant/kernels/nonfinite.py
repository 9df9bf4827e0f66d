"""The flag that quantiser kernels raise when a block holds NaN or Inf."""

from __future__ import annotations

import torch
from torch import Tensor

from mxdist.quant.layout import raise_nonfinite
from mxdist.quant.reference import NonFinite


class Flag:
    """An int32 on the device when `nonfinite` is "error"; otherwise nothing, and nobody waits for the device.

    nonfinite  or an int32 [1] of the caller's, 0, who looks at it later: nobody waits here.
    """

    def __init__(self, device: torch.device, nonfinite: NonFinite | Tensor) -> None:
        self.pointer: Tensor | None = nonfinite if isinstance(nonfinite, Tensor) else None
        self._looks = nonfinite == "error" if self.pointer is None else False
        if self._looks:
            self.pointer = torch.zeros(1, dtype=torch.int32, device=device)
        self.checked = self.pointer is not None

    def raise_if_set(self, x: Tensor, name: str) -> None:
        """ValueError with the position of the first NaN or Inf of x, if a kernel saw one."""
        if self._looks and self.pointer is not None and self.pointer.item():
            raise_nonfinite(x, name)
