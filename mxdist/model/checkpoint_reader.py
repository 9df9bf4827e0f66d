"""Opens the metadata of a learner's checkpoint, which is a pickle, without running what someone may have put into it.

Tensors are read by `torch.load(weights_only=True)`, and the metadata by an unpickler that knows no more than the
classes of which `torch.distributed.checkpoint` makes it. Entries of anything but a tensor, which that library would
unpickle without restriction, are refused.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from mxdist.errors import UserError

COMMON_FILE = "common.pt"  # what is not a tensor of the model or of its optimizer
NEVER_ASKED_FOR = "._extra_state"  # empty objects that layers once left in checkpoints

_CLASSES = {
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},  # the layout of a name
}


class CheckpointReader(FileSystemReader):
    """A reader of the learner's folder of a checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002
        """As the base class does.

        Raises:
            UserError: it asks for other classes, or does not describe tensors.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        with open(path, "rb") as stream:
            metadata = _Unpickler(stream, str(path)).load()
        entries = metadata.state_dict_metadata if isinstance(metadata, Metadata) else {"": None}
        for name, entry in entries.items():
            if not isinstance(entry, TensorStorageMetadata) and NEVER_ASKED_FOR not in name:
                raise _refusal(path, f"lists {name or 'something'} that is not a tensor")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, path: str) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        known = name in _CLASSES.get(module, ())
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise _refusal(self._path, f"asks for {module}.{name}")


def read_common(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors.

    Raises:
        UserError: the file holds more than numbers, words and their containers.
    """
    path = folder / COMMON_FILE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise _refusal(path, "holds more than plain values") from None


def _refusal(path: object, why: str) -> UserError:
    return UserError(f"{path} {why}, which no checkpoint of a run does, and is not opened; choose another checkpoint")
