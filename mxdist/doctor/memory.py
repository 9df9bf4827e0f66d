"""Bytes of each process of a run: a learner rank of every pipeline stage, an engine, and what a weight sync holds.

Formulas, for n numbers in a dtype of d bytes, of which q are quantised into p packed bytes:

    weights            n d
    main gradients     4 n                          Megatron's gradient buffer is float32
    optimizer          (8 + 4 [d < 4]) n / ranks    two moments, and the float32 master weight unless n d is it already;
                                                    divided over the ranks that hold the same numbers
    quantised weights  q d + p                      what GEMMs read, and the packed form: values, or on a GPU with FP8
                                                    the bytes of W and of W^T, which are at most as many in bfloat16
    weights on their way   what a rank sends in a sync, on a GPU; rollout.max_lag + 1 versions where engines read them
                           there

With DeepSpeed (``_zero_state``) the optimizer always has a float32 copy of the weights, 12 n / ranks; ZeRO stages 2 and
3 divide the gradients, 3 also the weights, of which it gathers up to ``LIVE`` numbers, and keeps p alone.
"""

from dataclasses import dataclass

from mxdist.config.schema import Config
from mxdist.config.turns import broadcast_lacks
from mxdist.doctor.activations import (
    FLOAT32,
    activation_bytes,
    element_bytes,
    full_pass,
    quantising_bytes,
    recomputed_bytes,
    scoring_bytes,
)
from mxdist.doctor.model_size import Numbers, engine, learner_stage, vocabulary
from mxdist.sync.layout import versions_held

MIB = 2**20
CPU_SCRATCH = 9 * MIB  # the reference quantiser's work space on a CPU, kept between calls
LIVE = 10**9  # stage3_max_live_parameters, DeepSpeed's own choice
BUCKET = 2 * 10**8  # numbers of a gradient that are reduced together, as learner/zero_policy.py asks
OF_AN_UPDATE = frozenset(("activations", "logits, or a layer", "requantising"))
"""Items of a learner that are free between updates."""
AWAKE = frozenset(("weights", "packed weights", "KV cache", "loading weights"))
"""Items of an engine that are free while it sleeps."""
CUDA_CONTEXT = 1536 * MIB  # of a process: CUDA context, kernels, cuBLAS and NCCL buffers; assumed, not computed


@dataclass(frozen=True)
class ProcessMemory:
    """What one process needs on its device at its worst moment."""

    name: str
    count: int  # processes like it
    items: dict[str, int]  # bytes, by what they are for
    given_back: frozenset[str] = frozenset()  # items that are free while others have their turn (rollout.sleep)

    @property
    def total(self) -> int:
        return sum(self.items.values())

    @property
    def largest(self) -> str:
        return max(self.items, key=lambda name: self.items[name])

    @property
    def resting(self) -> "ProcessMemory":
        """While others have their turn on the same device."""
        kept = {name: held for name, held in self.items.items() if name not in self.given_back}
        return ProcessMemory(self.name, self.count, kept)


def learner_memory(config: Config, on_gpu: bool) -> list[ProcessMemory]:
    """One entry for each pipeline stage, whose ranks are alike."""
    stages = config.learner.pipeline_parallel
    return [_learner_stage(config, stage, on_gpu) for stage in range(stages)]


def _learner_stage(config: Config, stage: int, on_gpu: bool) -> ProcessMemory:
    learner, element = config.learner, element_bytes(config)
    numbers = learner_stage(config, stage)
    ranks = learner.ranks // learner.pipeline_parallel
    with_experts = ranks // learner.expert_parallel  # ranks that hold the same experts
    state = 2 * FLOAT32 + (FLOAT32 if element < FLOAT32 else 0)
    activations = activation_bytes(config, stage, on_gpu)
    passing = max(
        scoring_bytes(config, stage, on_gpu), _quantising_input(config, on_gpu), recomputed_bytes(config, on_gpu)
    )
    held = {
        "weights": numbers.total * element,
        "main gradients": numbers.total * FLOAT32,
        "optimizer": state * (numbers.shared // config.data_parallel + numbers.expert // with_experts),
        "quantised weights": numbers.quantised * element + numbers.packed_bytes,
    }
    items = {
        **(held if learner.backend == "megatron" else _zero_state(config, numbers, on_gpu)),
        "activations": activations,
        "logits, or a layer": passing,
        # Done when no activations are held, so only what goes beyond them counts.
        "requantising": max(0, _requantising(numbers, element, on_gpu) - activations - passing),
        "weights on their way": _buckets(config, numbers) if on_gpu or config.sync.transport == "delta" else 0,
        "work space": (CUDA_CONTEXT if on_gpu else CPU_SCRATCH if numbers.quantised else 0),
    }
    name = "learner rank" if learner.pipeline_parallel == 1 else f"learner rank, stage {stage}"
    return ProcessMemory(name, ranks, items, OF_AN_UPDATE)


def _buckets(config: Config, numbers: Numbers) -> int:
    """What a sync's buckets take of the memory of the rank that sends the most: one that others leave it to."""
    versions = versions_held(config.sync.transport, config.rollout.max_lag + 1)
    held = (numbers.total - numbers.quantised) * element_bytes(config) + numbers.packed_bytes
    if config.learner.backend == "deepspeed":  # ranks take turns
        return versions * held // config.learner.ranks
    # The first of tensor-parallel ranks has the matrices of all of them, and its own experts.
    shared = numbers.shared * config.learner.tensor_parallel
    return versions * held * (shared + numbers.expert) // max(1, numbers.total)


def _zero_state(config: Config, numbers: Numbers, on_gpu: bool) -> dict[str, int]:
    """What a rank of DeepSpeed's holds between passes; what is offloaded is not on the GPU."""
    learner, total, element = config.learner, numbers.total, element_bytes(config)
    divided = learner.zero_stage == 3
    own = 0 if on_gpu and learner.zero_offload == "weights" else total * element // learner.ranks
    gradients = total * FLOAT32 // (learner.ranks if learner.zero_stage > 1 else 1)
    return {
        "weights": own + min(total, LIVE) * element if divided else total * element,
        "main gradients": gradients + min(total, BUCKET) * FLOAT32,
        "optimizer": 0 if on_gpu and learner.zero_offload != "none" else 3 * FLOAT32 * total // learner.ranks,
        "quantised weights": numbers.packed_bytes + (0 if divided else numbers.quantised * element),
    }


def _quantising_input(config: Config, on_gpu: bool) -> int:
    """Of the widest input of a linear, while it is quantised."""
    if not on_gpu:
        return 0
    model, tokens = config.model, full_pass(config, on_gpu).tokens
    widths = [model.hidden_size, model.num_attention_heads * model.head_dim // config.learner.tensor_parallel]
    if model.num_experts:
        wide = max(model.hidden_size, model.moe_intermediate_size) * model.num_experts_per_tok
    else:
        wide = model.intermediate_size // config.learner.tensor_parallel
    operands = {matrix.operand for matrix in engine(config).matrices}
    return tokens * max(*widths, wide) * max(quantising_bytes(operand, is_weight=False) for operand in operands)


def _requantising(numbers: Numbers, element: int, on_gpu: bool) -> int:
    """Weights of one width are put into one matrix, up to a limit, and quantised in one call."""
    together = numbers.quantised_together
    operands = {matrix.operand for matrix in numbers.matrices}
    at_once = max(quantising_bytes(operand, is_weight=True) for operand in operands) if on_gpu else 0
    return together * (element + at_once)


def engine_memory(config: Config, on_gpu: bool) -> ProcessMemory:
    """One process of an engine: it holds all of the model, or its share of every matrix."""
    numbers, element = engine(config), element_bytes(config)
    rollout = config.rollout
    divided = rollout.tensor_parallel
    scores = rollout.max_sequences * vocabulary(config) * (element + 2 * FLOAT32)  # logits, float32 ones, log-probs
    items = {
        # Of quantised ones: on a CPU.
        "weights": (numbers.total - (numbers.quantised if on_gpu else 0)) * element // divided,
        "packed weights": numbers.packed_bytes // divided,
        "KV cache": rollout.kv_cache_mib * MIB,
        "logits and scores": scores,
        # While weights are loaded, or multiplied with many tokens on a GPU, the largest fused matrix exists as values.
        "loading weights": max(0, _largest_fused(config) * element // divided - scores),
        "work space": CUDA_CONTEXT if on_gpu else CPU_SCRATCH if numbers.quantised else 0,
    }
    if _may_broadcast(config, on_gpu):  # every process receives all of them, before any is written
        items["weights received"] = sync_bytes(config)
    if config.sync.transport == "delta" and not on_gpu:
        items["weights to lay changes over"] = sync_bytes(config)
    return ProcessMemory("rollout engine", rollout.workers * divided, items, AWAKE)


def _may_broadcast(config: Config, on_gpu: bool) -> bool:
    between_hosts = config.sync.transport == "auto" and config.cluster.address is not None
    return config.sync.transport == "broadcast" or (on_gpu and between_hosts and broadcast_lacks(config) is None)


def _largest_fused(config: Config) -> int:
    model = config.model
    if model.num_experts:
        return model.num_experts * 2 * model.moe_intermediate_size * model.hidden_size
    return 2 * model.intermediate_size * model.hidden_size


def kv_bytes_per_token(config: Config) -> int:
    """In each process of an engine."""
    model, divided = config.model, config.rollout.tensor_parallel
    heads = -(-model.num_key_value_heads // divided)
    return 2 * model.num_hidden_layers * heads * model.head_dim * element_bytes(config)


def sync_bytes(config: Config) -> int:
    """Of one version of the weights on its way: packed where quantised, in the model's dtype elsewhere. Host memory."""
    numbers = engine(config)
    return (numbers.total - numbers.quantised) * element_bytes(config) + numbers.packed_bytes
