"""Which shapes a model can have, and over which layouts of processes it can be divided.

Raises ValueError, for the validators of ``schema``.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mxdist.config.schema import LearnerConfig, ModelConfig, RolloutConfig

BLOCK = 32
"""Elements that share a scale."""

MACRO_BLOCK = 128
"""Elements that share a macro-block factor."""


def check_shape(model: "ModelConfig") -> None:
    """Raise ValueError, one sentence, when its keys contradict each other, or a width is no whole number of blocks."""
    if model.num_attention_heads % model.num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads={model.num_key_value_heads} does not divide num_attention_heads="
            f"{model.num_attention_heads}; choose a divisor"
        )
    if model.num_experts and model.num_experts_per_tok > model.num_experts:
        raise ValueError(
            f"num_experts_per_tok={model.num_experts_per_tok} is more than num_experts={model.num_experts}; lower it"
        )
    if model.num_experts and model.family == "qwen2":
        raise ValueError("family=qwen2 has no experts here; use family=qwen3, or set num_experts=0")
    if model.family == "qwen2" and model.num_attention_heads * model.head_dim != model.hidden_size:
        raise ValueError(
            f"family=qwen2 has heads of hidden_size / num_attention_heads, but num_attention_heads * head_dim = "
            f"{model.num_attention_heads * model.head_dim} and hidden_size={model.hidden_size}; make them equal"
        )
    if model.num_experts and model.num_experts_per_tok == 1:
        raise ValueError(
            "num_experts_per_tok=1 leaves the router without a gradient, its one probability being "
            "always 1; use at least 2"
        )
    for key in ("hidden_size", "moe_intermediate_size", "intermediate_size"):
        if getattr(model, key) % BLOCK:
            raise ValueError(f"{key}={getattr(model, key)} is not a multiple of {BLOCK}, the MXFP4 block; round it up")
    if model.num_attention_heads * model.head_dim % BLOCK:
        raise ValueError(
            f"num_attention_heads * head_dim = {model.num_attention_heads * model.head_dim} is not a "
            f"multiple of {BLOCK}, the MXFP4 block; change one of them"
        )


def check_layout(model: "ModelConfig", learner: "LearnerConfig", quantum: int) -> None:
    """Raise ValueError, one sentence, when ``learner.ranks`` cannot hold ``model`` as asked.

    Args:
        quantum: elements along a row that are quantised together (1, ``BLOCK`` or ``MACRO_BLOCK``): ranks that share
            a row must share it at a multiple of these, or they would compute other codes than an undivided model.
    """
    tensor, pipeline, expert = learner.tensor_parallel, learner.pipeline_parallel, learner.expert_parallel
    _check_backend(model, learner)
    if learner.ranks % (tensor * pipeline):
        raise ValueError(
            f"learner.tensor_parallel={tensor} times learner.pipeline_parallel={pipeline} does not divide "
            f"learner.ranks={learner.ranks}; make learner.ranks a multiple of {tensor * pipeline}"
        )
    stage = learner.ranks // pipeline
    if stage % expert:
        ranks = f"learner.ranks={stage}" if pipeline == 1 else f"the {stage} learner ranks of a pipeline stage"
        raise ValueError(f"learner.expert_parallel={expert} does not divide {ranks}; choose a divisor of {stage}")
    if model.num_experts == 0 and expert > 1:
        raise ValueError(
            f"learner.expert_parallel={expert} needs experts, but model.num_experts is 0 "
            f"(a dense model); set learner.expert_parallel=1"
        )
    _divides("learner.expert_parallel", expert, "model.num_experts", model.num_experts)
    _divides("learner.pipeline_parallel", pipeline, "model.num_hidden_layers", model.num_hidden_layers)
    if tensor > 1:
        _check_tensor_parallel(model, tensor, quantum)


def _check_backend(model: "ModelConfig", learner: "LearnerConfig") -> None:
    """No key may be set that its backend has no use for."""
    if learner.backend == "megatron":
        for key, unused in (("zero_stage", 1), ("zero_offload", "none")):
            if getattr(learner, key) != unused:
                raise ValueError(
                    f"learner.{key}={getattr(learner, key)} is for learner.backend=deepspeed alone; "
                    f"leave it out, or set learner.backend=deepspeed"
                )
        return
    if model.num_experts:
        raise ValueError(
            f"learner.backend=deepspeed trains dense models, and model.num_experts={model.num_experts}; "
            f"set learner.backend=megatron"
        )
    for key in ("tensor_parallel", "pipeline_parallel", "expert_parallel"):
        if getattr(learner, key) > 1:
            raise ValueError(
                f"learner.backend=deepspeed divides by learner.zero_stage alone, and learner.{key}="
                f"{getattr(learner, key)}; set it to 1, or set learner.backend=megatron"
            )
    if learner.zero_offload == "weights" and learner.zero_stage != 3:
        raise ValueError(
            f"learner.zero_offload=weights needs learner.zero_stage=3, and it is {learner.zero_stage}; "
            f"set it to 3, or learner.zero_offload=optimizer"
        )


def check_engine_layout(model: "ModelConfig", rollout: "RolloutConfig", quantum: int) -> None:
    """The same for the processes that an engine is divided over; of experts each holds a slice of every one."""
    key, processes = "rollout.tensor_parallel", rollout.tensor_parallel
    if processes == 1:
        return
    if rollout.gpus_per_worker not in (0, processes):
        raise ValueError(
            f"{key}={processes} takes as many GPUs, and rollout.gpus_per_worker={rollout.gpus_per_worker:g}; "
            f"set it to {processes}"
        )
    _divides(key, processes, "model.num_key_value_heads", model.num_key_value_heads)
    widths = _cut_widths(model)
    if model.num_experts:
        widths["model.moe_intermediate_size"] = model.moe_intermediate_size
    _cut_between_groups(key, processes, widths, quantum)


def check_engine_vocabulary(rows: int, processes: int) -> None:
    """Raise ValueError when vLLM, which fills the vocabulary up to 64s, would give processes unequal slices of it."""
    if processes > 1 and rows % math.lcm(64, processes):
        wanted = math.lcm(64, processes)
        raise ValueError(
            f"rollout.tensor_parallel={processes} divides a vocabulary of a multiple of {wanted}, and this one has "
            f"{rows} rows; set model.vocab_size={-(-rows // wanted) * wanted}, or rollout.tensor_parallel=1"
        )


def _check_tensor_parallel(model: "ModelConfig", ranks: int, quantum: int) -> None:
    key = "learner.tensor_parallel"
    _divides(key, ranks, "model.num_key_value_heads", model.num_key_value_heads)
    _divides(key, ranks, "model.hidden_size", model.hidden_size)
    if model.vocab_size is not None:
        _divides(key, ranks, "model.vocab_size", model.vocab_size)
    _cut_between_groups(key, ranks, _cut_widths(model), quantum)


def _cut_widths(model: "ModelConfig") -> dict[str, int]:
    """By name, the inputs of linears that tensor parallelism cuts, but for experts'."""
    widths = {"model.num_attention_heads * model.head_dim": model.num_attention_heads * model.head_dim}
    if model.num_experts == 0:
        widths["model.intermediate_size"] = model.intermediate_size
    return widths


def _cut_between_groups(key: str, ranks: int, widths: dict[str, int], quantum: int) -> None:
    for name, width in widths.items():
        if width % (ranks * quantum):
            raise ValueError(
                f"{key}={ranks} would cut {name}={width} inside a group of {quantum} that is quantised together; "
                f"choose a smaller {key}, or a recipe without macro-block scaling"
            )


def _divides(key: str, ranks: int, name: str, count: int) -> None:
    if count % ranks:
        raise ValueError(f"{key}={ranks} does not divide {name}={count}; choose a divisor of {count}")
