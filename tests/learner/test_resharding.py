"""A checkpoint goes through every layout of two ranks and comes back with the same bits, the optimizer's included."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mxdist.config.schema import Supervised
from mxdist.model.checkpoint_reader import CheckpointReader
from tests.learner.batches import random_batch
from tests.model.ranks import MOE, RankProcesses

LAYOUTS: dict[str, dict[str, Any]] = {
    "EP2": {"ranks": 2, "expert_parallel": 2},
    "TP2": {"ranks": 2, "expert_parallel": 1, "tensor_parallel": 2},
    "PP2": {"ranks": 2, "expert_parallel": 1, "pipeline_parallel": 2},
    "DP2": {"ranks": 2, "expert_parallel": 1},
    "EP1": {"ranks": 1, "expert_parallel": 1},
}


def stored(directory: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint."""
    reader = CheckpointReader(directory)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(state, storage_reader=reader, no_dist=True)
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


def exported(payloads: list[Any]) -> dict[str, np.ndarray]:
    return {entry.name: entry.parts["values"] for payload in payloads for entry in payload.entries}


def test_a_checkpoint_goes_through_all_layouts_and_comes_back_unchanged(ranks: RankProcesses, tmp_path: Path) -> None:
    names = [*LAYOUTS, "EP2"]
    weights: dict[str, np.ndarray] = {}
    for index, name in enumerate(names):
        folder = tmp_path / str(index)
        folder.mkdir()
        with ranks.learners(MOE, "bf16", run={"seed": index}, **LAYOUTS[name]) as learners:
            if index == 0:
                for seed in range(2):
                    learners.call("update", random_batch(12, seed=seed), Supervised(), 1e-2)
                weights = exported(learners.call("export", 0))
            else:
                learners.call("load", tmp_path / str(index - 1))
                loaded = exported(learners.call("export", 0))
                assert loaded.keys() == weights.keys()
                assert all(np.array_equal(loaded[key], value) for key, value in weights.items()), name
            learners.call("save", folder)
            learners.call("save_finished", True)
    first, last = stored(tmp_path / "0"), stored(tmp_path / str(len(names) - 1))
    assert any("exp_avg_sq" in name for name in first)
    assert first == last
