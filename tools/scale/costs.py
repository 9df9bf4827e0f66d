"""The cost model of a step: bytes over the network, seconds of learner, engines, controller. Prints SCALE.md's tables.

    python -m tools.scale.costs

Rates of the H200 are those measured in tools/bench/results; those of the network and the share of a GPU's arithmetic
that a whole model reaches are assumptions, marked as such. Formulas stand beside each quantity in SCALE.md.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from mxdist.config.model_costs import forward_flops, parameters
from mxdist.config.schema import ModelConfig

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "2026-11-22_h200.json"
MXFP4_BITS = 4.25  # a code of 4 bits, and a scale of 8 for 32 of them
QUICKSTART = (ModelConfig(num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=32), 16)
QWEN3_30B = (
    ModelConfig(
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        max_position_embeddings=40960,
        dtype="bfloat16",
    ),
    151_936,
)


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and of its share of the network."""

    flops: float  # a second, reached by a whole model; assumed: 40 % of the measured peak of BF16 products
    memory: float  # bytes a second, measured copy
    network: float = 50e9  # bytes a second each way; assumed: one 400 Gbit/s port a GPU
    node_network: float = 400e9  # assumed: eight of them
    gpus: int = 8  # of a node
    trajectories: float = 2_800.0  # a second through the controller, measured with 512 workers (controller_load)


@dataclass(frozen=True)
class Work:
    """One step."""

    sequences: int
    prompt: int = 150  # tokens
    answer: int = 280  # tokens of the mean answer
    longest: int = 1024  # tokens of the longest answer
    sequences_of_engine: int = 512  # decoded together (rollout.max_sequences)

    @property
    def tokens(self) -> int:
        return self.sequences * (self.prompt + self.answer)


@dataclass(frozen=True)
class Layout:
    """GPUs of the learner, and of the engines (one each)."""

    learner: int
    engines: int
    expert_parallel: int = 8


def h200() -> Machine:
    measured = json.loads(RESULTS.read_text())
    return Machine(flops=0.4 * measured["bf16_tflops"] * 1e12, memory=measured["copy_tb_per_s"] * 1e12)


def sync_bytes(model: ModelConfig, vocabulary: int, fallback: bool = True, macro_blocks: bool = True) -> int:
    """Bytes of one version of the packed weights: what every node with engines fetches at a sync.

    Outlier fallback sends a second MXFP4 tensor beside the first, macro-block scaling a byte for each (started) 128
    elements of a row; what is not quantised travels in ``model.dtype``.
    """
    quantised, factors = 0, 0
    for rows, columns, count in _linears(model):
        quantised += rows * columns * count
        factors += rows * -(-columns // 128) * count
    width = 4 if model.dtype == "float32" else 2
    norms = 2 * model.head_dim * model.num_hidden_layers if model.family == "qwen3" else 0  # of queries and keys
    rest = parameters(model, vocabulary) - quantised + norms
    packed = quantised * MXFP4_BITS / 8 * (2 if fallback else 1)
    return int(packed + (factors if macro_blocks else 0) + rest * width)


def _linears(model: ModelConfig) -> list[tuple[int, int, int]]:
    """(rows, columns, how many) of all quantised linears."""
    layers, hidden, head = model.num_hidden_layers, model.hidden_size, model.head_dim
    experts, width = (
        model.num_experts or 1,
        model.moe_intermediate_size if model.num_experts else model.intermediate_size,
    )
    return [
        (model.num_attention_heads * head, hidden, layers),
        (model.num_key_value_heads * head, hidden, 2 * layers),
        (hidden, model.num_attention_heads * head, layers),
        (width, hidden, 2 * layers * experts),
        (hidden, width, layers * experts),
    ]


def dispatch_bytes(model: ModelConfig, tokens: int, expert_parallel: int) -> float:
    """Bytes that ``tokens`` tokens of one rank send to other ranks' experts, in a forward and a backward pass.

    A token goes to its experts' ranks and comes back, in BF16 (float32 on a CPU), and its gradient does the same; a
    share of 1 / expert_parallel stays where it is.
    """
    width = 4 if model.dtype == "float32" else 2
    there_and_back = 2 * tokens * model.num_experts_per_tok * model.hidden_size * width
    return 2 * model.num_hidden_layers * there_and_back * (1 - 1 / expert_parallel)


def gradient_bytes(model: ModelConfig, vocabulary: int, layout: Layout) -> float:
    """Bytes that one rank sends in an update: float32 gradients reduced, and parameters gathered, in rings."""
    experts = 3 * model.hidden_size * model.moe_intermediate_size * model.num_experts * model.num_hidden_layers
    shared = parameters(model, vocabulary) - experts
    copies = layout.learner // layout.expert_parallel
    width = 4 + (4 if model.dtype == "float32" else 2)
    return width * (shared * (1 - 1 / layout.learner) + experts / layout.expert_parallel * (1 - 1 / max(copies, 1)))


def learner_seconds(model: ModelConfig, vocabulary: int, work: Work, layout: Layout, machine: Machine) -> float:
    """Arithmetic of an update: old log-probabilities, forward, and twice that backward."""
    flops = forward_flops(model, vocabulary, work.prompt + work.answer) * work.sequences
    return 4 * flops / (layout.learner * machine.flops)


def engine_seconds(model: ModelConfig, vocabulary: int, work: Work, layout: Layout, machine: Machine) -> float:
    """Decoding reads all weights for each token of the longest answer, and each sequence's cache for its own tokens."""
    waves = -(-work.sequences // (layout.engines * work.sequences_of_engine))
    weights = waves * work.longest * parameters(model, vocabulary) * 2
    of_token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * 2
    cache = work.sequences / layout.engines * work.answer * (work.prompt + work.answer / 2) * of_token
    reading = (weights + cache) / machine.memory
    flops = forward_flops(model, vocabulary, work.prompt + work.answer) * work.sequences
    return max(reading, flops / (layout.engines * machine.flops))


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of a synchronous step."""

    layout: Layout
    engines: float
    controller: float
    learner: float
    dispatch: float
    gradients: float
    batch: float  # every node of the learner fetches the whole of it
    sync: float

    @property
    def total(self) -> float:
        return sum((self.engines, self.controller, self.learner, self.dispatch, self.gradients, self.batch, self.sync))


def step(model: ModelConfig, vocabulary: int, work: Work, layout: Layout, machine: Machine) -> Step:
    tokens = work.tokens // layout.learner
    # Old log-probabilities are a forward pass more. Expert parallelism stays inside a node, whose links are 9 times as
    # fast as the network (NVLink: 450e9 bytes a second each way).
    dispatch = 1.5 * dispatch_bytes(model, tokens, layout.expert_parallel) / (9 * machine.network)
    batch = work.sequences * (work.prompt + work.longest) * (8 + 1 + 4)
    nodes = -(-layout.learner // machine.gpus)
    # One object is sent from holder to holder: its time grows with the number of doublings, not of nodes.
    doublings = max(nodes - 1, 0).bit_length()
    engine_nodes = -(-layout.engines // machine.gpus)
    return Step(
        layout=layout,
        engines=engine_seconds(model, vocabulary, work, layout, machine),
        controller=work.sequences / machine.trajectories,
        learner=learner_seconds(model, vocabulary, work, layout, machine),
        dispatch=dispatch,
        gradients=gradient_bytes(model, vocabulary, layout) / machine.network,
        batch=batch * doublings / machine.network,
        sync=sync_bytes(model, vocabulary) * max(engine_nodes.bit_length(), 1) / machine.network,
    )


def balanced(model: ModelConfig, vocabulary: int, work: Work, gpus: int, machine: Machine) -> Step:
    """The division of the GPUs, in whole nodes, with the shortest synchronous step."""
    layouts = [Layout(learner, gpus - learner) for learner in range(machine.gpus, gpus, machine.gpus)]
    return min((step(model, vocabulary, work, layout, machine) for layout in layouts), key=lambda step: step.total)


def _row(name: str, found: Step, sequences: int) -> str:
    parts = (found.engines, found.controller, found.learner, found.dispatch, found.gradients, found.batch, found.sync)
    numbers = " | ".join(f"{part:.1f}" for part in (*parts, found.total))
    return f"| {name} | {sequences:,} | {found.layout.learner} + {found.layout.engines} | {numbers} |"


def main() -> None:
    model, vocabulary = QWEN3_30B
    machine = h200()
    parts = "engines | controller | learner | dispatch | gradients | batch | sync | step"
    print(f"| GPUs | sequences | learner + engines | {parts} |\n{'|---' * 11}|")
    for gpus in (64, 1024):
        for sequences in sorted({2_048, 32 * gpus}):
            found = balanced(model, vocabulary, Work(sequences), gpus, machine)
            print(_row(str(gpus), found, sequences))
    faster = replace(machine, trajectories=10 * machine.trajectories)
    found = balanced(model, vocabulary, Work(32_768), 1024, faster)
    print(_row("1024, controller ten times as fast", found, 32_768))
    print(
        f"\nsync: {sync_bytes(model, vocabulary) / 1e9:.1f} GB with outlier fallback and macro-blocks, "
        f"{sync_bytes(model, vocabulary, False) / 1e9:.1f} GB with macro-blocks alone, "
        f"{2 * parameters(model, vocabulary) / 1e9:.1f} GB in BF16"
    )
    print(f"dispatch: {dispatch_bytes(model, 16_384, 8) / 1e9:.1f} GB of 16,384 tokens of a rank, forward and backward")
    print(f"gradients: {gradient_bytes(model, vocabulary, Layout(64, 64)) / 1e9:.1f} GB of a rank of 64")


if __name__ == "__main__":
    main()
