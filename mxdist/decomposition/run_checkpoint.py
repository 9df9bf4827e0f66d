"""Checkpoints of runs as a source."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mxdist.control.checkpoints import CheckpointStore
from mxdist.decomposition.source import Read, Source, StoredTensor
from mxdist.errors import UserError
from mxdist.model.checkpoint_files import Region
from mxdist.model.run_safetensors import open_run_weights
from mxdist.model.run_weights import SHAPE_FILE
from mxdist.observe.run_directory import CHECKPOINTS, CONFIG_FILE, LEARNER_FOLDER

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class RunSource(Source):
    """The checkpoint of a run directory that `mxdist resume` would take, the newest that is whole; or the one whose
    directory (checkpoints/step_N) is given."""

    portion_elements = sys.maxsize  # a matrix is read once, whole

    def __init__(self, path: Path) -> None:
        """Read the metadata, and print to standard error which newer checkpoints are passed over.

        Raises:
            UserError: there is no complete checkpoint, or it is damaged.
        """
        folder = _learner_folder(path)
        self.title = f"{path} ({folder.parent.name})"
        self._weights = open_run_weights(folder)
        self.tensors = [
            StoredTensor(part.name, part.shape, _DTYPES.get(part.dtype, str(part.dtype)), part.matrix)
            for part in self._weights.tensors.values()
        ]

    @contextmanager
    def open(self, place: str) -> Iterator[Read]:
        """Read one stored matrix; yields the function that cuts Hugging Face tensors out of it."""
        matrix = self._weights.matrix(place)

        def read(name: str, region: Region) -> Tensor:
            return self._weights.cut(matrix, name)[region]

        yield read


def is_run(path: Path) -> bool:
    """True for a run directory and for one checkpoint in it."""
    return any((path / part).exists() for part in (CONFIG_FILE, CHECKPOINTS, f"{LEARNER_FOLDER}/{SHAPE_FILE}"))


def _learner_folder(path: Path) -> Path:
    if (path / LEARNER_FOLDER / SHAPE_FILE).is_file():
        return path / LEARNER_FOLDER
    checkpoint = CheckpointStore(path).newest(lambda line: print(line, file=sys.stderr))
    if checkpoint is None:
        raise UserError(f"the run {path} has no complete checkpoint yet; wait for one, or give another PATH")
    return checkpoint.learner_folder
