"""What a directory must hold to be a checkpoint, and the sentence for everything it may lack."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mxdist.config.schema import ModelConfig
from mxdist.errors import UserError
from mxdist.model.checkpoint_contents import open_checkpoint
from mxdist.model.shape import ModelShape
from tests.model.checkpoints import rewrite, save_checkpoint, tensors_of
from tests.model.ranks import DENSE, MOE, shape_of

QWEN2 = DENSE.model_copy(update={"family": "qwen2"})
TIED = {"tie_word_embeddings": True}
KINDS = {
    "qwen2": QWEN2,
    "qwen2 tied": QWEN2.model_copy(update=TIED),
    "qwen3": DENSE,
    "qwen3 tied": DENSE.model_copy(update=TIED),
    "qwen3 with experts": MOE,
}
NAME = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model", shape_of(DENSE))


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves_is_what_a_shape_expects(tmp_path: Path, kind: str) -> None:
    shape = shape_of(KINDS[kind])
    files = open_checkpoint(save_checkpoint(tmp_path, shape), shape)
    assert len({tensor.file for tensor in files.tensors.values()}) > 3
    assert {name: tensor.shape for name, tensor in files.tensors.items()} == shape.tensor_shapes()


def test_regions_are_read_as_they_were_saved(folder: Path) -> None:
    files = open_checkpoint(folder, shape_of(DENSE))
    for name, tensor in tensors_of(folder).items():
        region = tuple(slice(size // 3, size - size // 4) for size in tensor.shape)
        assert torch.equal(files.read(name, region), tensor[region])


WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (
        lambda tensors: [tensors.pop(NAME), tensors.pop("lm_head.weight")],
        rf"lacks {NAME} \(2 tensors missing\)",
    ),
    "extra": (lambda tensors: tensors.update(visual=torch.ones(2)), r"holds visual \(1 tensor too many\)"),
    "shape": (
        lambda tensors: tensors.update({NAME: torch.ones(3, 4)}),
        rf"{NAME} in .*model.safetensors has the shape \[3, 4\], but by config.json it is \[32, 64\]",
    ),
    "type": (
        lambda tensors: tensors.update({NAME: torch.ones(32, 64, dtype=torch.uint8)}),
        rf"{NAME} in .* is of type U8",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_checkpoint_of_something_else_is_refused_by_tensor(folder: Path, fault: str) -> None:
    change, complaint = WRONG[fault]
    rewrite(folder, change)
    with pytest.raises(UserError, match=complaint):
        open_checkpoint(folder, shape_of(DENSE))


def test_damaged_and_missing_files_are_named(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    content = second.read_bytes()
    second.write_bytes(content[:-10])
    with pytest.raises(UserError, match=f"{second.name} is truncated"):
        open_checkpoint(folder, shape_of(DENSE))
    second.write_bytes(content[:20] + bytes(40) + content[60:])
    with pytest.raises(UserError, match=f"{second.name} is truncated or no safetensors file"):
        open_checkpoint(folder, shape_of(DENSE))
    second.write_bytes(content)
    first.unlink()
    with pytest.raises(UserError, match=f"the shard .*{first.name} is missing"):
        open_checkpoint(folder, shape_of(DENSE))


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/no'\ntR.")
    with pytest.raises(UserError, match=r"only pickled weights \(\*.bin\), which are never opened"):
        open_checkpoint(tmp_path, shape_of(DENSE))


def test_two_files_with_one_tensor_and_no_index_are_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    shard = sorted(folder.glob("*.safetensors"))[0]
    (folder / "model-copy.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(UserError, match=r"is in .* and in .*, and no model.safetensors.index.json"):
        open_checkpoint(folder, shape_of(DENSE))


def test_a_tied_checkpoint_may_hold_its_output_layer(tmp_path: Path) -> None:
    model = ModelConfig(**DENSE.model_dump() | TIED)
    folder = save_checkpoint(tmp_path, ModelShape(model, 40, 1, (2,), 0))
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" in open_checkpoint(folder, shape_of(model)).tensors
