"""Bytes that a learner rank needs for one micro-batch beyond what it always holds. No torch.

Counted from what the modules of ``mxdist/model`` save for their backward pass; ``tests/doctor`` measures it.
"""

from dataclasses import dataclass

from mxdist.config.schema import Config
from mxdist.doctor.model_size import vocabulary
from mxdist.quant.recipe import Operand

FLOAT32 = 4
PIECE = 2**24
"""Elements of the distributions over the vocabulary that exist at a time: ``learner.scoring_pieces.PIECE``."""


@dataclass(frozen=True)
class Pass:
    """A full micro-batch: the budget of tokens, in sequences as long as the context and the longest answer allow."""

    tokens: int
    scored: int  # of these, tokens of answers
    element: int  # bytes of a number in the model's dtype
    on_gpu: bool


def element_bytes(config: Config) -> int:
    """Of a number in the model's dtype."""
    return 2 if config.model.dtype == "bfloat16" else FLOAT32


def full_pass(config: Config, on_gpu: bool) -> Pass:
    tokens = max(config.learner.micro_batch_tokens, config.context)
    scored = tokens * min(config.rollout.max_new_tokens, config.context - 1) // config.context
    return Pass(tokens, scored, element_bytes(config), on_gpu)


def activation_bytes(config: Config, stage: int, on_gpu: bool) -> int:
    """What the forward passes in flight on a rank of pipeline stage ``stage`` leave for the backward pass."""
    learner, run = config.learner, full_pass(config, on_gpu)
    layers = config.model.num_hidden_layers // learner.pipeline_parallel
    in_flight = learner.pipeline_parallel - stage  # one forward, one backward: earlier stages run ahead
    last = stage == learner.pipeline_parallel - 1
    inputs = run.tokens // learner.tensor_parallel * config.model.hidden_size * run.element
    end = _norm(run, config.model.hidden_size) // learner.tensor_parallel + inputs if last else 0
    return in_flight * (layers * (inputs if learner.recompute else _layer(config, run)) + end)


def recomputed_bytes(config: Config, on_gpu: bool) -> int:
    """The layer that is computed again in the backward pass, one at a time; 0 unless ``learner.recompute``."""
    return _layer(config, full_pass(config, on_gpu)) if config.learner.recompute else 0


def scoring_bytes(config: Config, stage: int, on_gpu: bool) -> int:
    """The logits, their gradient and, off the GPU, a piece of the distributions (``learner.scoring``); last stage."""
    learner, run = config.learner, full_pass(config, on_gpu)
    if stage != learner.pipeline_parallel - 1:
        return 0
    width = vocabulary(config) // learner.tensor_parallel
    piece = 0 if on_gpu else min(PIECE, run.scored * width) * (FLOAT32 + (run.element if run.element < FLOAT32 else 0))
    return 2 * run.tokens * width * run.element + piece


def _layer(config: Config, run: Pass) -> int:
    """Between tensor-parallel linears a rank has part of the tokens, inside them all tokens and part of the width."""
    model, tensor = config.model, config.learner.tensor_parallel
    hidden, query = model.hidden_size, model.num_attention_heads * model.head_dim // tensor
    key_value = model.num_key_value_heads * model.head_dim // tensor
    norms = 2 * _norm(run, hidden) // tensor
    if model.family == "qwen3":
        norms += _norm(run, query) + _norm(run, key_value)
    inputs = run.tokens * (hidden + query) * run.element  # of the q/k/v and the output projection
    feed_forward = _experts(config, run) // tensor if model.num_experts else _dense_feed_forward(config, run)
    return norms + inputs + _attention(config, run, query, key_value) + feed_forward


def _norm(run: Pass, width: int) -> int:
    """A fused kernel keeps its input; without one, the float32 input and the float32 result are kept."""
    return run.tokens * width * (run.element if run.on_gpu else 2 * FLOAT32)


def _attention(config: Config, run: Pass, query: int, key_value: int) -> int:
    """The projected q/k/v, of which the values are a part; rotated queries and keys, the output and its normalisers."""
    heads = config.model.num_attention_heads // config.learner.tensor_parallel
    kept = 3 * query + 3 * key_value
    return run.tokens * (kept * run.element + heads * FLOAT32)


def _dense_feed_forward(config: Config, run: Pass) -> int:
    """Input; gate and up; silu(gate), up with its offset, and the input of the down projection."""
    wide = config.model.intermediate_size // config.learner.tensor_parallel
    return run.tokens * (config.model.hidden_size + 5 * wide) * run.element


def _experts(config: Config, run: Pass) -> int:
    """The router's input; of each (token, expert) pair, as many as the rank sends when tokens spread evenly, input and
    output, gate and up, silu(gate) and the input of the down projection."""
    model = config.model
    pair = 2 * model.hidden_size + 4 * model.moe_intermediate_size
    return run.tokens * (model.hidden_size + model.num_experts_per_tok * pair) * run.element


AT_ONCE = {
    # (macro-block scaling, outlier fallback): bytes for a weight, bytes for an activation
    (False, False): (14, 17),
    (True, False): (19, 21),
    (False, True): (22, 25),
    (True, True): (26, 29),
}
"""Bytes a number that the reference quantiser takes at its worst moment, its result included, when a whole tensor is
done at once, as it is off the CPU; on a CPU it works in small pieces. Measured in bfloat16, see ``tests/doctor``."""


def quantising_bytes(operand: Operand | None, is_weight: bool) -> int:
    """Bytes a number of ``AT_ONCE``; 0 where nothing is quantised."""
    if operand is None:
        return 0
    return AT_ONCE[operand.macro is not None, operand.fallback is not None][0 if is_weight else 1]
