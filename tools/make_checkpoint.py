"""Write a Hugging Face style directory of random Gaussian weights: safetensors, an index if sharded, config.json.

    python tools/make_checkpoint.py /tmp/3b                        # the shape of Qwen2.5-3B: 6.2 GB of BF16
    python tools/make_checkpoint.py /tmp/moe --shape qwen3-30b-a3b --layers 2
    python tools/make_checkpoint.py /tmp/big --gigabytes 20        # as many layers as that takes
    python tools/make_checkpoint.py /tmp/small --shape qwen2.5-0.1b --tokenizer-from train.jsonl

For measuring and testing what reads checkpoints: the weights mean nothing. One tensor is in memory at a time and seeded
by its name, so neither the shard size nor --layers changes its values. A tokenizer is trained on the questions and
answers of a JSON-lines file, such as GSM8K's.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from mxdist.config.schema import ModelConfig
from mxdist.errors import UserError
from mxdist.model import checkpoint_writer
from mxdist.model.checkpoint_writer import Planned
from mxdist.model.shape import ModelShape
from mxdist.seeds import derive_seed
from mxdist.tasks.question_files import read_file
from mxdist.tasks.tokenizer import SETTINGS_FILE, train_byte_level_bpe

PIECE = 1 << 22  # elements drawn at a time, so that only a piece is ever held in float32
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def _shape(
    family: str, layers: int, hidden: int, heads: tuple[int, int, int], width: int, vocabulary: int, experts: int = 0
) -> ModelShape:
    """``heads``: query heads, key/value heads, their size. With experts ``width`` is that of one expert."""
    config = ModelConfig.model_validate(
        {
            "family": family,
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": heads[2],
            "num_experts": experts,
            "num_experts_per_tok": min(8, experts // 2) or 2,
            "moe_intermediate_size" if experts else "intermediate_size": width,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "tie_word_embeddings": not experts,
            "dtype": "bfloat16",
        }
    )
    return ModelShape(config, vocabulary, bos_token_id=1, stop_token_ids=(2,), pad_token_id=0)


SHAPES = {
    "tiny": _shape("qwen3", 2, 256, (4, 2, 64), 768, 512),
    "tiny-moe": _shape("qwen3", 2, 256, (4, 2, 64), 128, 512, experts=4),
    "qwen2.5-0.1b": _shape("qwen2", 12, 768, (12, 2, 64), 2048, 32768),
    "qwen2.5-3b": _shape("qwen2", 36, 2048, (16, 2, 128), 11008, 151936),
    "qwen3-30b-a3b": _shape("qwen3", 48, 2048, (32, 4, 128), 768, 151936, experts=128),
}


def with_layers(shape: ModelShape, layers: int) -> ModelShape:
    config = shape.config.model_copy(update={"num_hidden_layers": layers})
    return ModelShape(config, shape.vocab_size, shape.bos_token_id, shape.stop_token_ids, shape.pad_token_id)


def write_checkpoint(directory: Path, shape: ModelShape, seed: int, std: float, shard_bytes: int) -> int:
    """Write BF16 N(0, std) weights (norms 1, biases 0) and config.json; return the bytes of weights."""
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise UserError(f"{directory} is not empty; give a new directory, or remove that one")
    sizes = shape.tensor_shapes()
    plan = [Planned(name, size, torch.bfloat16) for name, size in sizes.items()]
    checkpoint_writer.write_checkpoint(directory, plan, lambda name: _draw(name, sizes[name], seed, std), shard_bytes)
    (directory / "config.json").write_text(json.dumps(shape.hf_config(), indent=2) + "\n")
    return sum(planned.nbytes for planned in plan)


def write_tokenizer(directory: Path, text_file: Path, vocab_size: int) -> int:
    """Train a byte-level BPE with a plain chat template on a file of questions and answers; return its size."""
    questions = read_file(text_file, "--tokenizer-from", "train")
    texts = [f"{question.question}\n{question.solution}" for question in questions]
    tokenizer = train_byte_level_bpe(texts, min(vocab_size, 8192))
    tokenizer.save(directory)
    settings = json.loads((directory / SETTINGS_FILE).read_text())
    (directory / SETTINGS_FILE).write_text(json.dumps(settings | {"chat_template": CHAT_TEMPLATE}, indent=2) + "\n")
    return tokenizer.vocab_size


def _draw(name: str, size: tuple[int, ...], seed: int, std: float) -> torch.Tensor:
    if len(size) == 1:
        return torch.full(size, 0.0 if name.endswith(".bias") else 1.0, dtype=torch.bfloat16)
    tensor = torch.empty(size, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(derive_seed(seed, "checkpoint", name))
    for piece in tensor.view(-1).split(PIECE):
        piece.copy_(torch.empty(piece.shape).normal_(0.0, std, generator=generator))
    return tensor


def _with_size(shape: ModelShape, gigabytes: float) -> ModelShape:
    """The shape with as many layers as come nearest to that many gigabytes of BF16, at least one."""
    sizes = [
        sum(2 * torch.Size(size).numel() for size in with_layers(shape, layers).tensor_shapes().values())
        for layers in (1, 2)
    ]
    layer = sizes[1] - sizes[0]
    return with_layers(shape, max(1, round((gigabytes * 1e9 - sizes[0]) / layer) + 1))


def main(
    directory: Annotated[Path, typer.Argument(help="A new directory.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "qwen2.5-3b",
    layers: Annotated[int, typer.Option(min=0, help="Decoder layers; 0: as the shape has.")] = 0,
    gigabytes: Annotated[float, typer.Option(min=0, help="As many layers as come to this size; 0: off.")] = 0.0,
    std: Annotated[float, typer.Option(help="Standard deviation; the error's parts depend on it, see NUMERICS.md.")] = (
        2.0**-6
    ),
    seed: Annotated[int, typer.Option(help="Seed of all weights.")] = 0,
    shard_megabytes: Annotated[int, typer.Option(min=1, help="Size of a shard.")] = 1000,
    tokenizer_from: Annotated[Path | None, typer.Option(help="JSON lines to train a tokenizer on.")] = None,
) -> None:
    """Write a Hugging Face style directory of random Gaussian weights."""
    if shape not in SHAPES:
        raise UserError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")
    chosen = SHAPES[shape]
    if gigabytes:
        chosen = _with_size(chosen, gigabytes)
    if layers:
        chosen = with_layers(chosen, layers)
    total = write_checkpoint(directory, chosen, seed, std, shard_megabytes * 1_000_000)
    typer.echo(f"{directory}: {chosen.config.num_hidden_layers} layers, {total / 1e9:.2f} GB")
    if tokenizer_from:
        typer.echo(f"tokenizer of {write_tokenizer(directory, tokenizer_from, chosen.vocab_size)} tokens")


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"make_checkpoint: {error}")
