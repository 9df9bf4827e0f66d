"""Small tensors that the host makes for a device."""

import torch
from torch import Tensor


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A small tensor on the device, without waiting for what the device is doing."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
