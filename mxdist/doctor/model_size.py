"""How many numbers a learner rank and an engine hold of a model, by how they are kept. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from mxdist.config.layout import BLOCK
from mxdist.config.schema import Config, Gsm8kData
from mxdist.model.recipes import ModelRecipes, recipe_policy
from mxdist.quant.recipe import Operand

ENGINE_VOCABULARY_MULTIPLE = 64
"""vLLM rounds the rows of embedding and head up to this."""

TOGETHER = 2**26
"""``model.quantised_weight.TOGETHER``, which needs torch."""

ASSUMED_VOCABULARY = 32
"""Of the arithmetic task's character tokenizer, which is not built for an estimate."""


@dataclass(frozen=True)
class Matrix:
    """A linear of the decoder: ``count`` equal ones of [rows, columns], quantised as ``operand`` says (None: not)."""

    rows: int
    columns: int
    count: int
    operand: Operand | None
    is_expert: bool

    @property
    def numbers(self) -> int:
        return self.count * self.rows * self.columns

    @property
    def packed_bytes(self) -> int:
        """Of the packed form of all ``count``; 0 where nothing is quantised."""
        return self.count * self.rows * row_bytes(self.columns, self.operand) if self.operand else 0


@dataclass(frozen=True)
class Numbers:
    """What one process holds: linears, and everything that is never quantised."""

    matrices: tuple[Matrix, ...]
    plain: int  # embedding, head, norms, routers, biases
    head: int = field(default=0)  # of these, the head: no part of a sync or an engine where it is the embedding

    @property
    def expert(self) -> int:
        return sum(matrix.numbers for matrix in self.matrices if matrix.is_expert)

    @property
    def shared(self) -> int:
        """All but the experts'."""
        return self.plain + sum(matrix.numbers for matrix in self.matrices if not matrix.is_expert)

    @property
    def total(self) -> int:
        return self.expert + self.shared

    @property
    def quantised(self) -> int:
        return sum(matrix.numbers for matrix in self.matrices if matrix.operand)

    @property
    def packed_bytes(self) -> int:
        return sum(matrix.packed_bytes for matrix in self.matrices)

    @property
    def quantised_together(self) -> int:
        """Numbers that are quantised in one call, at most. Gate and up are one matrix in the learner."""
        groups: dict[tuple[int, Operand], int] = {}
        largest = 0
        for matrix in self.matrices:
            if matrix.operand:
                key = (matrix.columns, matrix.operand)
                groups[key] = groups.get(key, 0) + matrix.numbers
                largest = max(largest, 2 * matrix.rows * matrix.columns)
        return min(max(groups.values(), default=0), max(TOGETHER, largest))


def row_bytes(columns: int, operand: Operand) -> int:
    """Bytes of one packed row: the sizes of ``quant.tensor.part_shapes``, which needs torch."""
    unit = BLOCK if operand.hadamard != "none" else operand.block
    blocks = -(-columns // unit) * unit // operand.block
    values = blocks * operand.block // 2 + blocks  # codes and scales
    macro = -(-columns // operand.macro.size) if operand.macro else 0
    return values * (2 if operand.fallback else 1) + macro


def vocabulary(config: Config) -> int:
    """Rows of the embedding, before any tokenizer is built."""
    of_tokenizer = config.data.vocab_size if isinstance(config.data, Gsm8kData) else ASSUMED_VOCABULARY
    return config.model.vocab_size or of_tokenizer


def learner_stage(config: Config, stage: int) -> Numbers:
    """What each rank of pipeline stage ``stage`` holds."""
    model, learner = config.model, config.learner
    tensor, stages = learner.tensor_parallel, learner.pipeline_parallel
    layers = model.num_hidden_layers // stages
    matrices = tuple(_matrices(config, range(stage * layers, (stage + 1) * layers), tensor, learner.expert_parallel))
    embedding = vocabulary(config) // tensor * model.hidden_size
    first, last = stage == 0, stage == stages - 1
    tied = model.tie_word_embeddings and first and last
    head = embedding if last and not tied else 0
    plain = layers * _plain_of_layer(config, tensor) + (embedding if first else 0)
    return Numbers(matrices, plain + head + (model.hidden_size if last else 0), head)


def engine(config: Config) -> Numbers:
    """What an engine holds: all of the model, with the vocabulary rounded up."""
    model = config.model
    rows = -(-vocabulary(config) // ENGINE_VOCABULARY_MULTIPLE) * ENGINE_VOCABULARY_MULTIPLE
    embedding = rows * model.hidden_size
    head = 0 if model.tie_word_embeddings else embedding
    plain = model.num_hidden_layers * _plain_of_layer(config, 1) + model.hidden_size + embedding + head
    return Numbers(tuple(_matrices(config, range(model.num_hidden_layers), 1, 1)), plain, head)


def _matrices(config: Config, layers: range, tensor: int, expert: int) -> Iterator[Matrix]:
    recipes = ModelRecipes(recipe_policy(config), config.model.num_hidden_layers)
    for layer in layers:
        yield from _layer_matrices(config, recipes, layer, tensor, expert)


def _layer_matrices(config: Config, recipes: ModelRecipes, layer: int, tensor: int, expert: int) -> Iterator[Matrix]:
    model, at = config.model, f"model.layers.{layer}"
    hidden, query = model.hidden_size, model.num_attention_heads * model.head_dim
    key_value = model.num_key_value_heads * model.head_dim
    attention = (("q", query, hidden), ("k", key_value, hidden), ("v", key_value, hidden), ("o", hidden, query))
    for part, rows, columns in attention:
        operand = recipes.of(f"{at}.self_attn.{part}_proj").w
        cut = (rows, columns // tensor) if part == "o" else (rows // tensor, columns)
        yield Matrix(*cut, 1, operand, False)
    # The experts of a layer share their recipe.
    place, count = (f"{at}.mlp.experts.0", model.num_experts // expert) if model.num_experts else (f"{at}.mlp", 1)
    wide = model.moe_intermediate_size if model.num_experts else model.intermediate_size // tensor
    is_expert = model.num_experts > 0
    for part in ("gate", "up"):
        yield Matrix(wide, hidden, count, recipes.of(f"{place}.{part}_proj").w, is_expert)
    yield Matrix(hidden, wide, count, recipes.of(f"{place}.down_proj").w, is_expert)


def _plain_of_layer(config: Config, tensor: int) -> int:
    """Norms, router and biases of one layer on one rank."""
    model = config.model
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    own = heads * model.head_dim // tensor if model.family == "qwen2" else 2 * model.head_dim
    return 2 * model.hidden_size + own + model.num_experts * model.hidden_size
