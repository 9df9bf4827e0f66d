"""The quantised weight that a linear multiplies with: made from the master weight, once after every optimizer step.

A module that has one is a ``QuantisedWeight``. Its forward, its backward and the export to the rollout engines use the
same cached tensors, and a cache that no longer belongs to the master weight raises instead of being used.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mxdist.model.draws import GradientDraws
from mxdist.quant.backend import prepare_weights, quantise
from mxdist.quant.recipe import Recipe
from mxdist.quant.tensor import MXTensor

if TYPE_CHECKING:
    from mxdist.quant.kernels.prepared import HopperWeight

Observer = Callable[["QuantisedWeight", Tensor, Tensor], None]
"""Is shown a linear, its input [..., in] before quantising and its output [..., out]."""


TOGETHER = 2**26
"""Numbers quantised in one call, at most, unless one weight has more: a call needs up to 28 bytes for each."""


class QuantisedWeight:
    """Mixed into a linear module that has a ``weight`` parameter [out, in]. ``recipe`` None: high precision."""

    weight: nn.Parameter
    name = "linear"  # Hugging Face's, or the fused one of ``linear_names``
    recipe: Recipe | None = None
    draws: GradientDraws | None = None
    observer: Observer | None = None
    keeps_prepared = True
    """Whether what products take is kept from one optimizer update to the next, and not made when they take it."""
    _quantised: MXTensor | None = None
    _prepared: "Tensor | HopperWeight | None" = None
    _made_from: tuple[int, int] | None = None
    _fingerprint: Tensor | int = 0  # a tensor on the device, for which nobody waits before ``quantised``

    @property
    def weight_size(self) -> tuple[int, int]:
        """[out, in] of the weight while this rank computes with it."""
        return len(self.weight), self.weight.shape[1]

    @property
    def input_is_repeated(self) -> bool:
        """Whether another rank has the same input, and counts it."""
        return False

    @property
    def output_is_repeated(self) -> bool:
        """Whether another rank has the same output, and counts it."""
        return False

    @staticmethod
    def whole_weights(linears: "Sequence[QuantisedWeight]") -> AbstractContextManager[None]:  # noqa: ARG004
        """Around reading the master weights of linears of this class; collective where ranks divide them."""
        return nullcontext()

    @property
    def quantises_weight(self) -> bool:
        return self.recipe is not None and self.recipe.w is not None

    def seed(self) -> int | None:
        """For the draws of the present micro-batch; None when the recipe takes none."""
        if self.recipe is None or not self.recipe.needs_seed:
            return None
        if self.draws is None:
            raise RuntimeError(f"recipe {self.recipe.name} draws random numbers, but {self.name} was given no seeds")
        return self.draws.seed(self.name)

    def show(self, x: Tensor, y: Tensor) -> None:
        """Called with every product this linear computes; costs nothing unless somebody observes."""
        if self.observer is not None:
            self.observer(self, x, y)

    def store(self, quantised: MXTensor, prepared: "Tensor | HopperWeight | None") -> None:
        """Take the packed form [out, in] of the present master weight, and what products take of it."""
        self._quantised, self._prepared = quantised, prepared
        self._made_from = self._identity()
        self._fingerprint = self._sum_of_bits()

    def forget(self) -> None:
        """The master weight is about to change."""
        self._quantised = self._prepared = self._made_from = None

    def prepared(self) -> "Tensor | HopperWeight | None":
        """W_q as ``mx_linear`` takes it; None when the recipe leaves weights alone."""
        if not self.quantises_weight:
            return None
        self._raise_if_stale()
        return self._prepared

    def quantised_values(self) -> Tensor | None:
        """The values [out, in] that products multiply, in the dtype of the weight: kept, or read from their bytes."""
        prepared = self.prepared()
        return prepared if prepared is None or isinstance(prepared, Tensor) else prepared.dequantise(self.weight.dtype)

    def quantised(self) -> MXTensor:
        """The packed form of what ``quantised_values`` returns, after looking at the master weight's bits as well."""
        self._raise_if_stale()
        assert self._quantised is not None
        if bool(self._sum_of_bits() != self._fingerprint):
            raise RuntimeError(f"{self} has a new master weight: call requantise(model) before using it")
        return self._quantised

    def packed(self) -> MXTensor:
        """What ``quantised`` returns, without looking at the master weight's bits: there may be thousands of them."""
        self._raise_if_stale()
        assert self._quantised is not None
        return self._quantised

    def _identity(self) -> tuple[int, int]:
        # Sees in-place changes through the parameter. The distributed optimizer writes past it, into the buffer that
        # the parameter is a view of: ``forget_before_step`` covers that.
        weight = self.weight
        return weight._version, weight.data_ptr()

    def _sum_of_bits(self) -> Tensor | int:
        return self.weight.detach().view(torch.int16).sum(dtype=torch.int64)

    def _raise_if_stale(self) -> None:
        if self._made_from != self._identity():
            raise RuntimeError(f"the quantised weight of {self} is stale: call requantise(model) first")


def quantised_weights(model: nn.Module) -> Iterator[QuantisedWeight]:
    """The modules of ``model`` whose weight is quantised."""
    for module in model.modules():
        if isinstance(module, QuantisedWeight) and module.quantises_weight:
            yield module


@torch.no_grad()
def requantise(model: nn.Module) -> None:
    """Quantise every master weight anew.

    Rows are independent of each other, so weights of one width and operand are quantised together, up to ``TOGETHER``.
    """
    together: dict[tuple, list[QuantisedWeight]] = {}
    for module in quantised_weights(model):
        key = (module.weight_size, module.weight.dtype, module.recipe)
        together.setdefault(key, []).append(module)
    for alike in together.values():
        for modules in _runs(alike):
            _requantise_together(modules)


def _requantise_together(modules: "Sequence[QuantisedWeight]") -> None:
    """Modules alike in shape, dtype and recipe."""
    first, recipe = modules[0], modules[0].recipe
    assert recipe is not None
    assert recipe.w is not None
    with first.whole_weights(modules):
        weights = torch.cat([module.weight for module in modules])
    quantised = quantise(weights, recipe.w)
    prepared: Sequence[Tensor | HopperWeight | None] = [None] * len(modules)
    if first.keeps_prepared:
        prepared = prepare_weights(weights, len(modules), recipe, quantised, first.name)
    rows = first.weight_size[0]
    for index, module in enumerate(modules):
        module.store(quantised[index * rows : (index + 1) * rows], prepared[index])


def _runs(modules: list[QuantisedWeight]) -> Iterator[list[QuantisedWeight]]:
    """Consecutive modules, with at most ``TOGETHER`` numbers in all or alone."""
    run: list[QuantisedWeight] = []
    for module in modules:
        if run and sum(math.prod(each.weight_size) for each in [*run, module]) > TOGETHER:
            yield run
            run = []
        run.append(module)
    if run:
        yield run


def forget(model: nn.Module) -> None:
    """Drop every quantised weight: until ``requantise`` the model refuses to compute."""
    for module in quantised_weights(model):
        module.forget()


def forget_before_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """From now on no step of ``optimizer`` can leave a stale quantised weight behind."""
    optimizer.register_step_pre_hook(lambda *_: forget(model))
