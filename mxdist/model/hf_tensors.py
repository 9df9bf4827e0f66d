"""What a rank holds of each Hugging Face tensor, whatever it is trained with: reading, writing, first values.

Which parameter holds what: ``weights`` for Megatron-core, ``transformers_model`` for DeepSpeed.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from mxdist.model.division import Division
from mxdist.model.draws import GradientDraws
from mxdist.model.linear_names import matrix_name
from mxdist.model.quantised_weight import QuantisedWeight
from mxdist.model.recipes import ModelRecipes
from mxdist.model.shape import ModelShape
from mxdist.quant.tensor import MXTensor, cat_rows
from mxdist.seeds import derive_seed


@dataclass(frozen=True)
class HfTensor:
    """What this rank holds of one Hugging Face tensor."""

    name: str
    parameter: nn.Parameter
    rows: tuple[slice, ...]  # of the parameter, in the order of the Hugging Face tensor
    linear: QuantisedWeight | None = None  # of ours, that owns the parameter
    is_expert: bool = False
    division: Division = field(default_factory=Division)  # over the tensor-parallel ranks
    is_copy: bool = False  # another rank holds the same and is the one that sends it

    @property
    def module(self) -> QuantisedWeight | None:
        """The linear that owns the parameter, when its weight is quantised."""
        return self.linear if self.linear is not None and self.linear.quantises_weight else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this rank's slice."""
        return (sum(part.stop - part.start for part in self.rows), *self.parameter.shape[1:])

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Of the Hugging Face tensor."""
        return self.division.whole(self.shape)

    @property
    def region(self) -> tuple[slice, ...]:
        """Where in the Hugging Face tensor this rank's slice lies."""
        return self.division.region(self.shape)

    @property
    def parameter_size(self) -> int:
        """Numbers in the parameter on this rank."""
        return self.parameter.numel()

    def whole(self, changed: bool = False) -> AbstractContextManager[None]:  # noqa: ARG002
        """Around ``read`` and, with ``changed``, writing; collective where ranks divide what each computes with."""
        return nullcontext()

    def read(self) -> Tensor:
        """The master weight's values of this rank's slice, as a copy or a view."""
        parts = [self.parameter.detach()[part] for part in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def write(self, values: Tensor) -> None:
        """Set the master weight's values; ``values`` must have the shape of this rank's slice."""
        if tuple(values.shape) != self.shape:
            raise ValueError(f"{self.name} has shape {self.shape}, not {tuple(values.shape)}")
        self.write_rows(0, values)

    @torch.no_grad()
    def write_rows(self, first: int, values: Tensor) -> None:
        """Set the values of consecutive rows of this rank's slice, from ``first`` on."""
        start = 0
        for part in self.rows:
            stop = start + part.stop - part.start
            begin, end = max(start, first), min(stop, first + len(values))
            if begin < end:
                target = slice(part.start + begin - start, part.start + end - start)
                self.parameter[target].copy_(values[begin - first : end - first])
            start = stop

    def quantised(self) -> tuple[MXTensor, Tensor]:
        """This rank's slice of the quantised weight: packed, and the very values that the forward pass multiplies."""
        assert self.module is not None
        packed, values = self.module.quantised(), self.module.quantised_values()
        assert values is not None
        return cat_rows([packed[part] for part in self.rows]), torch.cat([values[part] for part in self.rows])


def quantised_modules(tensors: Iterable[HfTensor]) -> tuple[str, ...]:
    """Hugging Face names of the quantised linears of this rank, sorted."""
    names = (tensor.name.removesuffix(".weight") for tensor in tensors if tensor.module is not None)
    return tuple(sorted(names))


def set_up_linears(tensors: Iterable[HfTensor], recipes: ModelRecipes, draws: GradientDraws) -> None:
    """Tell every linear its name, its recipe, and where its random draws come from."""
    for tensor in tensors:
        if tensor.linear is not None:
            name = tensor.name.removesuffix(".weight")
            recipe = recipes.of(name)
            is_fused = tensor.shape[0] < len(tensor.parameter)
            tensor.linear.name = matrix_name(name) if is_fused else name
            tensor.linear.recipe = recipe if recipe.quantises else None
            tensor.linear.draws = draws


def initialise(tensors: Iterable[HfTensor], shape: ModelShape, run_seed: int) -> None:
    """Random initial weights: N(0, initializer_range), norms 1, biases 0.

    Every tensor has a generator of its own, seeded with its Hugging Face name, and is drawn whole, so that the weights
    do not depend on how they are divided over ranks. As many are drawn at a time as torch has threads.
    """
    threads, remaining = torch.get_num_threads(), iter(tensors)
    with ThreadPoolExecutor(threads) as pool:
        while some := list(islice(remaining, threads)):
            drawn = pool.map(lambda each: _first_values(each, shape, run_seed), some)
            for tensor, values in zip(some, drawn, strict=True):
                with tensor.whole(changed=True):
                    tensor.write(values)


def _first_values(tensor: HfTensor, shape: ModelShape, run_seed: int) -> Tensor:
    if len(tensor.shape) == 1:
        return torch.full(tensor.shape, 0.0 if tensor.name.endswith(".bias") else 1.0)
    generator = torch.Generator().manual_seed(derive_seed(run_seed, "init", tensor.name))
    whole = torch.empty(tensor.whole_shape).normal_(0.0, shape.config.initializer_range, generator=generator)
    return whole[tensor.region]
