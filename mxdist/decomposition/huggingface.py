"""Hugging Face checkpoints as a source. No config.json is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mxdist.decomposition.source import Read, Source, StoredTensor
from mxdist.model.checkpoint_files import CheckpointFiles

PORTION = 1 << 23
"""Elements: 16 MiB of BF16. Mapped pages count as memory of the process, so no more is read at once."""


class HuggingFaceSource(Source):
    """A safetensors file, or a directory of them."""

    portion_elements = PORTION

    def __init__(self, path: Path) -> None:
        """Read the headers of all files.

        Raises:
            UserError: a file is missing, truncated or no safetensors file; the message names it.
        """
        self.title = str(path)
        self._files = CheckpointFiles(path)
        self.tensors = [
            StoredTensor(tensor.name, tensor.shape, tensor.dtype, str(tensor.file))
            for tensor in self._files.tensors.values()
        ]

    @contextmanager
    def open(self, place: str) -> Iterator[Read]:  # noqa: ARG002
        """Yields the function that copies a region of a tensor out of its file."""
        yield self._files.read
