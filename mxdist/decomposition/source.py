"""What a checkpoint offers to the survey: the names and shapes of its tensors, and parts of their values."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from mxdist.model.checkpoint_files import Region

Read = Callable[[str, Region], Tensor]
"""(tensor name, region) -> values."""

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint. `dtype` is safetensors' name, such as BF16; `place` says what to open to read it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    place: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def element_bytes(self) -> int:
        """Of the types that can be quantised."""
        return _BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.elements * self.element_bytes


class Source(ABC):
    """A checkpoint. `open` is called from several threads at once."""

    title: str
    tensors: list[StoredTensor]  # in the order in which they are best read
    portion_elements: int  # elements to read at most before `open` is called anew; this bounds the memory

    @abstractmethod
    def open(self, place: str) -> AbstractContextManager[Read]:
        """Open a place; yields the function that reads the tensors stored there."""
