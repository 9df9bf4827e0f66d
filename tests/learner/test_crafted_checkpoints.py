"""Checkpoints into which someone has put code are refused in a sentence, and the code does not run."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from mxdist.errors import UserError
from mxdist.model.run_weights import RunWeights
from tests.model.ranks import DENSE, RankProcesses


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        return Path.touch, (self._proof,)


def metadata_of(folder: Path) -> Metadata:
    return FileSystemReader(folder).read_metadata()


def write_metadata(folder: Path, metadata: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def into_metadata(folder: Path, payload: Payload) -> None:
    metadata = metadata_of(folder)
    metadata.planner_data = payload
    write_metadata(folder, metadata)


def instead_of_metadata(folder: Path, payload: Payload) -> None:
    write_metadata(folder, payload)


def into_common(folder: Path, payload: Payload) -> None:
    torch.save({"step": payload}, folder / "common.pt")


def instead_of_a_tensor(folder: Path, payload: Payload) -> None:
    """An entry of bytes is what torch's loader unpickles without restriction."""
    torch.save(payload, folder / "crafted")
    metadata, key = metadata_of(folder), "decoder.final_layernorm.weight"
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    info = _StorageInfo("crafted", 0, (folder / "crafted").stat().st_size)
    metadata.storage_data[MetadataIndex(key)] = info
    write_metadata(folder, metadata)


def test_code_in_a_checkpoint_is_refused_and_never_runs(ranks: RankProcesses, tmp_path: Path) -> None:
    sound, proof = tmp_path / "sound", tmp_path / "proof"
    sound.mkdir()
    with ranks.learners(DENSE, "bf16", 2) as learners:
        learners.call("save", sound)
        learners.call("save_finished", True)
        for craft, complaint in (
            (into_metadata, r"\.metadata asks for pathlib"),
            (instead_of_metadata, r"\.metadata asks for"),
            (instead_of_a_tensor, r"\.metadata lists decoder\.final_layernorm\.weight that is not a tensor"),
            (into_common, r"common\.pt holds more than plain values"),
        ):
            folder = tmp_path / craft.__name__
            shutil.copytree(sound, folder)
            craft(folder, Payload(proof))
            with pytest.raises(UserError, match=complaint) as refused:
                learners.call("load", folder)
            assert "\n" not in str(refused.value)
            if craft is not into_common:
                with pytest.raises(UserError, match=complaint):
                    RunWeights(folder)
        learners.call("load", sound)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()  # the payload does what it is meant to
