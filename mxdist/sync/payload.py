"""Weight payloads: from tensors to what crosses a process boundary, and back.

A payload holds numpy arrays that share memory with the tensors they were made of (nothing is copied until the
transport sends it), so send it before the learner's next update. Dense tensors travel as float32 or as bfloat16,
whichever the sender holds; numpy has no bfloat16, so a uint16 array is the bit pattern of bfloat16 values, and nothing
else is ever sent as uint16. Checksums of values are taken of their float32 form, the same for both.
"""

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from mxdist.errors import ParityError
from mxdist.messages import TensorEntry, WeightPayload
from mxdist.quant.checksum import checksum
from mxdist.quant.tensor import MXTensor
from mxdist.sync.parity import Checksums

VALUES = "values"
"""The part of a dense tensor; in checksums also the values that a GEMM reads, in float32 form."""


def dense_entry(name: str, tensor: Tensor) -> TensorEntry:
    """Entry of a tensor that stays in high precision (float32 or bfloat16, any shape), as the learner holds it."""
    return TensorEntry(
        name, "dense", tuple(tensor.shape), {VALUES: as_array(tensor)}, {VALUES: values_checksum(tensor)}
    )


def mx_entry(name: str, packed: MXTensor, values: Tensor) -> TensorEntry:
    """Entry of a quantised tensor.

    Args:
        packed: the bytes that are sent.
        values: of packed.shape and the model's dtype: what the learner's GEMM multiplies. Only its checksum is sent;
            the engine dequantises the bytes and must arrive at the same.
    """
    if tuple(values.shape) != packed.shape:
        raise ValueError(f"{name}: the learner's values are {tuple(values.shape)}; the packed tensor is {packed.shape}")
    parts = packed.parts()
    checksums = {part: checksum(tensor) for part, tensor in parts.items()} | {VALUES: values_checksum(values)}
    return TensorEntry(name, "mx", packed.shape, {part: as_array(tensor) for part, tensor in parts.items()}, checksums)


def values_checksum(values: Tensor) -> int:
    """Checksum of values in float32 form, so that it does not depend on the dtype they are held in."""
    return checksum(values.float())


def as_array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as a numpy array, bfloat16 as uint16. TypeError for other dtypes than are ever sent."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype not in (torch.float32, torch.uint8):
        raise TypeError(f"weights are sent as float32, bfloat16 or packed uint8, not as {tensor.dtype}")
    return tensor.numpy()


def as_tensor(array: np.ndarray) -> Tensor:
    """Inverse of ``as_array``: a tensor on the array's memory. Read it only: the array may be shared and read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def gather_entries(payloads: Iterable[WeightPayload]) -> dict[str, TensorEntry]:
    """All ranks' entries by name. ParityError when two ranks send the same tensor."""
    entries: dict[str, TensorEntry] = {}
    for payload in payloads:
        for entry in payload.entries:
            if entry.name in entries:
                raise ParityError(f"the learner sent {entry.name} twice; each tensor must come from one rank")
            entries[entry.name] = entry
    return entries


def learner_checksums(payloads: Iterable[WeightPayload]) -> Checksums:
    """Checksums of what the learner computes with, of all ranks together."""
    return {name: entry.checksums for name, entry in gather_entries(payloads).items()}
