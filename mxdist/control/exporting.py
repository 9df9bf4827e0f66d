"""`mxdist export`: the newest checkpoint of a run as a Hugging Face directory. One process, no Ray, no Megatron.

bf16    plain BF16 safetensors: transformers and vLLM load them with nothing of this project installed
mxfp4   the codes, scales and factors that the run's engines computed with, and the rest in the run's dtype; vLLM
        loads it where this project's plugin is installed
"""

import errno
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mxdist.config import load_config
from mxdist.control.checkpoints import CheckpointStore
from mxdist.errors import UserError
from mxdist.model.checkpoint_writer import Planned, write_checkpoint
from mxdist.model.linear_names import linear_names
from mxdist.model.packed_checkpoint import quantisation_config
from mxdist.model.recipes import ModelRecipes, model_recipes
from mxdist.model.run_safetensors import open_run_weights
from mxdist.model.run_weights import SHAPE_FILE, RunWeights
from mxdist.observe.run_directory import CONFIG_FILE, TOKENIZER
from mxdist.quant.backend import quantise
from mxdist.quant.recipe import Operand
from mxdist.quant.tensor import part_shapes

Form = Literal["bf16", "mxfp4"]
SHARD_BYTES = 4 << 30


def export(run_dir: Path, out: Path, form: Form, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``out``, whole or not at all.

    Raises:
        UserError: no complete checkpoint; ``out`` exists and is not empty, or cannot be written; nothing is quantised
            in a run whose packed form is asked for.
    """
    checkpoint = CheckpointStore(run_dir).existing(lambda line: print(line, file=sys.stderr))
    state, weights = checkpoint.state, open_run_weights(checkpoint.learner_folder)
    names = _checked_names(weights)
    source: _Bf16
    if form == "bf16":
        source = _Bf16(weights)
        config = weights.shape.hf_config() | {"torch_dtype": "bfloat16"}
    else:
        recipes = _recipes(run_dir)
        source = _Packed(weights, recipes)
        config = weights.shape.hf_config() | {"quantization_config": quantisation_config(recipes, packed=True)}
    plan = [planned for name in names for planned in source.plan(name)]
    nbytes = sum(planned.nbytes for planned in plan)
    with _appearing_whole(out, nbytes) as partial:
        files = write_checkpoint(partial, plan, source.value, shard_bytes)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in sorted((run_dir / TOKENIZER).glob("*")):
            shutil.copyfile(file, partial / file.name)
    count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
    print(f"{out}: step {state.step} in {form}, {len(plan)} tensors, {nbytes / 1e9:.3f} GB in {count}")


class _Bf16:
    """Every tensor rounded to BF16; of a run in bfloat16 that is what it is."""

    def __init__(self, weights: RunWeights) -> None:
        self._weights = weights
        self._matrix = lru_cache(2)(weights.matrix)  # q, k and v lie in one; their biases in another

    def plan(self, name: str) -> list[Planned]:
        return [Planned(name, self._weights.tensors[name].shape, torch.bfloat16)]

    def value(self, name: str) -> Tensor:
        return self.stored(name).to(torch.bfloat16)

    def stored(self, name: str) -> Tensor:
        """As the checkpoint has it."""
        return self._weights.cut(self._matrix(self._weights.tensors[name].matrix), name)


class _Packed(_Bf16):
    """Quantised linears as bytes, "MODULE.codes" and so on; everything else as the run computed with it."""

    def __init__(self, weights: RunWeights, recipes: ModelRecipes) -> None:
        super().__init__(weights)
        operands = {f"{name}.weight": recipes.of(name).w for name in linear_names(weights.shape.config)}
        self._operands: dict[str, Operand] = {name: operand for name, operand in operands.items() if operand}
        self._parts: Callable[[str], dict[str, Tensor]] = lru_cache(1)(self._quantised)

    def plan(self, name: str) -> list[Planned]:
        part = self._weights.tensors[name]
        if name not in self._operands:
            return [Planned(name, part.shape, part.dtype)]
        module = name.removesuffix(".weight")
        shapes = part_shapes(part.shape, self._operands[name])
        return [Planned(f"{module}.{key}", shape, torch.uint8) for key, shape in shapes.items()]

    def value(self, name: str) -> Tensor:
        if name in self._weights.tensors:
            return self.stored(name)
        module, _, key = name.rpartition(".")
        return self._parts(f"{module}.weight")[key]

    def _quantised(self, name: str) -> dict[str, Tensor]:
        return quantise(self.stored(name), self._operands[name]).parts()


def _checked_names(weights: RunWeights) -> list[str]:
    """Every tensor of the model, layer by layer. UserError when the checkpoint has others."""
    wanted = weights.shape.tensor_shapes()
    if {name: part.shape for name, part in weights.tensors.items()} != wanted:
        raise UserError(
            f"the checkpoint {weights.folder} holds another model than its {SHAPE_FILE} says; choose another"
        )
    return list(wanted)


def _recipes(run_dir: Path) -> ModelRecipes:
    config = load_config(run_dir / CONFIG_FILE)
    recipes = model_recipes(config)
    if all(recipes.of(name).w is None for name in linear_names(config.model)):
        raise UserError(f"the run {run_dir} quantises no weights (recipe {config.recipe}); export it with --form bf16")
    return recipes


@contextmanager
def _appearing_whole(out: Path, nbytes: int) -> Iterator[Path]:
    """A directory beside ``out`` that takes its place when the block ends well, and else is removed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty directory; choose another OUT_DIR")
    partial: Path | None = None
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.absolute().parent))
        partial.chmod(0o755)
        if (free := shutil.disk_usage(partial).free) < nbytes:
            raise UserError(f"{out} needs {nbytes / 1e9:.1f} GB of space, and {free / 1e9:.1f} GB are free; make room")
        yield partial
        partial.rename(out.absolute())
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise UserError(f"{out} was filled by another process meanwhile; choose another OUT_DIR") from None
        raise UserError(f"{out} cannot be written: {error.strerror or error}; choose another OUT_DIR") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
