"""Checkpoints for the tests, and the command as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.make_checkpoint import SHAPES, write_checkpoint

ROOT = Path(__file__).parents[2]

Run = subprocess.CompletedProcess[str]


def mxdist(*arguments: str | Path) -> Run:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mxdist", "decompose", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def gaussian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 layers with 4 experts, in 7 shards."""
    folder = tmp_path_factory.mktemp("gaussian")
    write_checkpoint(folder, SHAPES["tiny-moe"], seed=0, std=2.0**-6, shard_bytes=500_000)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[dict[str, Tensor]], Path]:
    """Write tensors as the single file of a directory."""

    def save(tensors: dict[str, Tensor]) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return folder

    return save


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
