"""The reference model: transformers' own Qwen3, given the weights that a learner exported."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from mxdist.messages import WeightPayload
from mxdist.model.shape import ModelShape


def transformers_model(shape: ModelShape, payloads: Sequence[WeightPayload], folder: Path) -> PreTrainedModel:
    """Write unquantised payloads as a Hugging Face folder and load it, in float32."""
    tensors = {entry.name: entry.parts["values"] for payload in payloads for entry in payload.entries}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(shape.hf_config()))
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def logprobs_of(model: PreTrainedModel, tokens: np.ndarray, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of every token after the first, with gradient, float32 [sequences, length - 1]."""
    inputs = torch.from_numpy(tokens)
    logits = model(input_ids=inputs).logits[:, :-1] / temperature
    return torch.log_softmax(logits, -1).gather(-1, inputs[:, 1:, None]).squeeze(-1)
