"""The shape of a Hugging Face checkpoint, read from its config.json. No torch, no transformers."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mxdist.config.json_file import read_json_object
from mxdist.errors import UserError

SUPPORTED = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3",
}
"""Architectures that learner and engine can build, and their ``model.family``."""

_COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
_COPIED_WITH_EXPERTS = ("num_experts_per_tok", "moe_intermediate_size")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_name(text: str) -> bool:
    """Whether it has the form of a name on the hub, owner/name, and is no path below a folder that is here."""
    return _HUB_NAME.fullmatch(text) is not None and not Path(text).parent.exists()


def model_directory(path: str, only: Sequence[str] | None = None) -> Path:
    """The local directory of ``model.path``; a hub name is downloaded (and found again in the hub's cache).

    Args:
        only: file names, when nothing else is needed yet.
    Raises:
        UserError: neither a directory nor something the hub gave.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if not is_hub_name(path):
        raise UserError(
            f"model.path={path} is no directory; give one with config.json and safetensors, or a Hugging Face hub name"
        )
    import huggingface_hub

    wanted = list(only) if only else ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # never code, never pickles
    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=wanted))
    except Exception as error:  # the library and the network raise what they like
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"model.path={path} is no directory here and could not be read from the Hugging Face hub ({reason}); "
            f"check the name and the network, or give a directory"
        ) from None


def model_settings(path: str) -> dict[str, Any]:
    """The keys of ``schema.ModelConfig`` that the config.json of ``model.path`` decides.

    Raises:
        UserError: no config.json, not JSON, an architecture or a feature that is not supported, code of its own.
    """
    file = model_directory(path, only=["config.json"]) / "config.json"
    missing = f"model.path={path} holds no config.json; give a Hugging Face checkpoint's directory"
    found = read_json_object(file, missing)
    try:
        _refuse_unsupported(found, file)
        return _settings(found)
    except KeyError as error:
        raise UserError(f"{file} has no {error.args[0]}; it is not complete, fetch it again") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        # text for a number, a list for an object
        raise UserError(f"{file} holds a value of the wrong kind ({error}); fetch it again") from None


def _refuse_unsupported(found: Mapping[str, Any], file: Path) -> None:
    architectures = found.get("architectures") or ["none named"]
    if not isinstance(architectures, list):
        raise TypeError(f"architectures is {architectures!r} and no list")
    if "auto_map" in found:
        raise UserError(f"{file} asks for code of the checkpoint's own (auto_map), which is never run; remove it there")
    if architectures[0] not in SUPPORTED:
        raise UserError(
            f"{file} is of architecture {architectures[0]}, which is not supported; supported are "
            f"{', '.join(SUPPORTED)}"
        )
    if "quantization_config" in found:
        raise UserError(
            f"{file} says that its weights are quantised already (quantization_config); give the checkpoint in BF16, "
            f"which is what 'mxdist export' writes without --form mxfp4"
        )
    rope = found.get("rope_scaling") or found.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    family = SUPPORTED[architectures[0]]
    features = {
        f"rope of type {kind}": kind != "default",
        "use_sliding_window": bool(found.get("use_sliding_window")),
        f"hidden_act {found.get('hidden_act')}": found.get("hidden_act", "silu") != "silu",
        "attention_bias": family == "qwen3" and bool(found.get("attention_bias")),
        "mlp_only_layers": bool(found.get("mlp_only_layers")),
        "decoder_sparse_step other than 1": found.get("decoder_sparse_step", 1) != 1,
    }
    for name, used in features.items():
        if used:
            raise UserError(f"{file} uses {name}, which is not supported; give a checkpoint without it")


def _settings(found: Mapping[str, Any]) -> dict[str, Any]:
    has_experts = found["architectures"][0] == "Qwen3MoeForCausalLM"
    rope = found.get("rope_parameters") or {}
    heads = found["num_attention_heads"]
    return {
        "family": SUPPORTED[found["architectures"][0]],
        **{key: found[key] for key in _COPIED},
        **({key: found[key] for key in _COPIED_WITH_EXPERTS} if has_experts else {}),
        # Published checkpoints say num_experts, transformers 5 writes num_local_experts.
        "num_experts": found.get("num_local_experts") or found["num_experts"] if has_experts else 0,
        # transformers leaves these out where they have their default
        "head_dim": found.get("head_dim") or found["hidden_size"] // heads,
        "rope_theta": float(found.get("rope_theta") or rope["rope_theta"]),
        "tie_word_embeddings": bool(found.get("tie_word_embeddings", False)),
        "norm_topk_prob": bool(found.get("norm_topk_prob", False)) if has_experts else True,
        "initializer_range": float(found.get("initializer_range", 0.02)),
    }
