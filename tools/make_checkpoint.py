"""Write a Hugging Face style directory of random Gaussian weights: safetensors shards, their index, config.json.

    python tools/make_checkpoint.py /tmp/3b                        # the shape of Qwen2.5-3B: 6.2 GB of BF16
    python tools/make_checkpoint.py /tmp/moe --shape qwen3-30b-a3b --layers 2
    python tools/make_checkpoint.py /tmp/big --gigabytes 20        # as many layers as that takes

For measuring and testing tools that read checkpoints: the weights mean nothing. One shard is in memory at a time, and
each tensor is seeded by its name, so neither the shard size nor --layers changes the values of a tensor.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from mxdist.errors import UserError
from mxdist.seeds import derive_seed

PIECE = 1 << 22  # elements drawn at a time, so that only a piece is ever held in float32


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2 (biases) or Qwen3 (norms of q and k) model, dense or with experts."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # of the dense feed-forward part, or of one expert
    vocab_size: int
    num_experts: int = 0
    tie_word_embeddings: bool = True


SHAPES = {
    "tiny": Shape("qwen3", 2, 256, 4, 2, 64, 768, 512),
    "tiny-moe": Shape("qwen3_moe", 2, 256, 4, 2, 64, 128, 512, num_experts=4, tie_word_embeddings=False),
    "qwen2.5-3b": Shape("qwen2", 36, 2048, 16, 2, 128, 11008, 151936),
    "qwen3-30b-a3b": Shape("qwen3_moe", 48, 2048, 32, 4, 128, 768, 151936, num_experts=128, tie_word_embeddings=False),
}


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face names and shapes, layer by layer."""
    hidden = shape.hidden_size
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for layer in range(shape.num_hidden_layers):
        yield from _layer_shapes(f"model.layers.{layer}", shape)
    yield "model.norm.weight", (hidden,)
    if not shape.tie_word_embeddings:
        yield "lm_head.weight", (shape.vocab_size, hidden)


def _layer_shapes(layer: str, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"{layer}.self_attn.{name}.weight", (rows, hidden)
        if shape.model_type == "qwen2":
            yield f"{layer}.self_attn.{name}.bias", (rows,)
    yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
    if shape.model_type != "qwen2":
        yield f"{layer}.self_attn.q_norm.weight", (shape.head_dim,)
        yield f"{layer}.self_attn.k_norm.weight", (shape.head_dim,)
    if shape.num_experts:
        yield f"{layer}.mlp.gate.weight", (shape.num_experts, hidden)
    experts = [f"experts.{index}." for index in range(shape.num_experts)] or [""]
    for expert in experts:
        yield f"{layer}.mlp.{expert}gate_proj.weight", (width, hidden)
        yield f"{layer}.mlp.{expert}up_proj.weight", (width, hidden)
        yield f"{layer}.mlp.{expert}down_proj.weight", (hidden, width)
    yield f"{layer}.input_layernorm.weight", (hidden,)
    yield f"{layer}.post_attention_layernorm.weight", (hidden,)


def write_checkpoint(directory: Path, shape: Shape, seed: int, std: float, shard_bytes: int) -> int:
    """Write the shards and the index of BF16 N(0, std) weights (norms 1, biases 0); return the bytes of weights."""
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise UserError(f"{directory} is not empty; give a new directory, or remove that one")
    shards = _shards(shape, shard_bytes)
    total = 0
    weight_map: dict[str, str] = {}
    for index, tensors in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        content = {name: _draw(name, size, seed, std) for name, size in tensors}
        save_file(content, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(content, file)
        total += sum(tensor.nbytes for tensor in content.values())
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1) + "\n")
    config = {**asdict(shape), "torch_dtype": "bfloat16"}
    if shape.num_experts:
        config["moe_intermediate_size"] = config["intermediate_size"]
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return total


def _shards(shape: Shape, shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = shard_bytes
    for name, size in tensor_shapes(shape):
        nbytes = 2 * torch.Size(size).numel()
        if shards[-1] and nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, size))
        room -= nbytes
    return shards


def _draw(name: str, size: tuple[int, ...], seed: int, std: float) -> torch.Tensor:
    if len(size) == 1:
        return torch.full(size, 0.0 if name.endswith(".bias") else 1.0, dtype=torch.bfloat16)
    tensor = torch.empty(size, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(derive_seed(seed, "checkpoint", name))
    for piece in tensor.view(-1).split(PIECE):
        piece.copy_(torch.empty(piece.shape).normal_(0.0, std, generator=generator))
    return tensor


def _with_size(shape: Shape, gigabytes: float) -> Shape:
    """The shape with as many layers as come nearest to that many gigabytes of BF16, at least one."""
    whole = [2 * torch.Size(size).numel() for _, size in tensor_shapes(replace(shape, num_hidden_layers=0))]
    layer = [2 * torch.Size(size).numel() for _, size in _layer_shapes("", shape)]
    return replace(shape, num_hidden_layers=max(1, round((gigabytes * 1e9 - sum(whole)) / sum(layer))))


def main(
    directory: Annotated[Path, typer.Argument(help="A new directory.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "qwen2.5-3b",
    layers: Annotated[int, typer.Option(min=0, help="Decoder layers; 0: as the shape has.")] = 0,
    gigabytes: Annotated[float, typer.Option(min=0, help="As many layers as come to this size; 0: off.")] = 0.0,
    std: Annotated[float, typer.Option(help="Standard deviation; the error's parts depend on it, see NUMERICS.md.")] = (
        2.0**-6
    ),
    seed: Annotated[int, typer.Option(help="Seed of all weights.")] = 0,
    shard_megabytes: Annotated[int, typer.Option(min=1, help="Size of a shard, and so of the memory needed.")] = 1000,
) -> None:
    """Write a Hugging Face style directory of random Gaussian weights."""
    if shape not in SHAPES:
        raise UserError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")
    chosen = SHAPES[shape]
    if gigabytes:
        chosen = _with_size(chosen, gigabytes)
    if layers:
        chosen = replace(chosen, num_hidden_layers=layers)
    total = write_checkpoint(directory, chosen, seed, std, shard_megabytes * 1_000_000)
    typer.echo(f"{directory}: {chosen.num_hidden_layers} layers, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"make_checkpoint: {error}")
