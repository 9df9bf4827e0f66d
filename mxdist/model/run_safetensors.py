"""The model in a run's checkpoint as safetensors by Hugging Face name: what the DeepSpeed learner leaves of it."""

from pathlib import Path

import torch
from torch import Tensor

from mxdist.model.checkpoint_files import CheckpointFiles
from mxdist.model.run_weights import RunWeights, StoredMatrixPart

WEIGHTS = "weights"  # a folder of the learner's folder
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


class SafetensorsRunWeights(RunWeights):
    """A matrix is a tensor."""

    def cut(self, matrix: Tensor, name: str) -> Tensor:  # noqa: ARG002
        return matrix

    def matrix(self, place: str) -> Tensor:
        return self._files.read(place, tuple(slice(0, size) for size in self._files.tensors[place].shape))

    def _open_reader(self) -> None:
        self._files = CheckpointFiles(self.folder / WEIGHTS)

    def _find_tensors(self) -> dict[str, StoredMatrixPart]:
        return {
            name: StoredMatrixPart(name, tensor.shape, DTYPES[tensor.dtype], name, (slice(0, tensor.shape[0]),))
            for name, tensor in self._files.tensors.items()
        }


def open_run_weights(folder: Path) -> RunWeights:
    """The model of the learner's ``folder`` of a checkpoint, whichever backend wrote it. UserError when damaged."""
    return SafetensorsRunWeights(folder) if (folder / WEIGHTS).is_dir() else RunWeights(folder)
