"""Tiny random Hugging Face checkpoints, written by transformers itself."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mxdist.config.hf_config import model_settings
from mxdist.config.schema import ModelConfig
from mxdist.model.shape import ModelShape

Change = Callable[[dict[str, Tensor]], object]


def save_checkpoint(folder: Path, shape: ModelShape, dtype: torch.dtype = torch.float32, shard: str = "30KB") -> Path:
    """Random weights, biases and norms included, in many shards."""
    hf = shape.hf_config()
    settings = {key: value for key, value in hf.items() if key not in ("model_type", "torch_dtype", "architectures")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(hf["model_type"]), **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def config_of(folder: Path, **settings: object) -> ModelConfig:
    return ModelConfig(**{"path": str(folder), **model_settings(str(folder)), **settings})


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(folder: Path, change: Change) -> None:
    """Change the tensors of a checkpoint, and leave them in one file."""
    tensors = tensors_of(folder)
    change(tensors)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_in_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
