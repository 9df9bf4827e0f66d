"""The quantised weight that a linear multiplies with: made from the master weight, once after every optimizer step.

A module that has one is a ``QuantisedWeight``. Its forward, its backward and the export to the rollout engines use the
same cached tensors, and a cache that no longer belongs to the master weight raises instead of being used.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mxdist.model.draws import GradientDraws
from mxdist.quant.backend import QuantisedWeights, quantise_weights
from mxdist.quant.layout import raise_nonfinite
from mxdist.quant.recipe import Recipe
from mxdist.quant.tensor import MXTensor

if TYPE_CHECKING:
    from mxdist.quant.kernels.prepared import HopperWeight

Observer = Callable[["QuantisedWeight", Tensor, Tensor], None]
"""Is shown a linear, its input [..., in] before quantising and its output [..., out]."""


TOGETHER = 2**26
"""Numbers quantised in one call, at most, unless one weight has more: a call needs up to 28 bytes for each."""


class _Kept(NamedTuple):
    """What a module has of its quantised weight."""

    quantised: MXTensor
    prepared: "Tensor | HopperWeight | None"
    made_from: tuple[int, int]
    fingerprint: Tensor | int  # a tensor on the device, for which nobody waits before ``quantised``


class QuantisedWeight:
    """Mixed into a linear module that has a ``weight`` parameter [out, in]. ``recipe`` None: high precision."""

    weight: nn.Parameter
    name = "linear"  # Hugging Face's, or the fused one of ``linear_names``
    recipe: Recipe | None = None
    draws: GradientDraws | None = None
    observer: Observer | None = None
    keeps_prepared = True
    """Whether what products take is kept from one optimizer update to the next, and not made when they take it."""
    _kept: _Kept | None = None

    @property
    def weight_size(self) -> tuple[int, int]:
        """[out, in] of the weight while this rank computes with it."""
        rows, columns = self.weight.shape
        return rows, columns

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

    def store(
        self, quantised: MXTensor, prepared: "Tensor | HopperWeight | None", fingerprint: Tensor | int
    ) -> None:  # fmt: skip
        """Take the packed form [out, in] of the present master weight, what products take, and its ``sums_of_bits``."""
        self._keep(_Kept(quantised, prepared, self._identity(), fingerprint))

    def multiply_as_values(self) -> None:
        """From now on products take the values of the packed form: their bytes do not hold all of it."""
        kept = self._fresh()
        if kept.prepared is not None and not isinstance(kept.prepared, Tensor):
            self._keep(kept._replace(prepared=kept.prepared.as_values(kept.quantised, self.weight.dtype)))

    def forget(self) -> None:
        """The master weight is about to change."""
        self._keep(None)

    def _keep(self, kept: _Kept | None) -> None:
        # ``nn.Module`` would look for a parameter, a module and a buffer of this name first, twice for each weight.
        self.__dict__["_kept"] = kept

    def prepared(self) -> "Tensor | HopperWeight | None":
        """W_q as ``mx_linear`` takes it; None when the recipe leaves weights alone."""
        return self._fresh().prepared if self.quantises_weight else None

    def quantised_values(self) -> Tensor | None:
        """The values [out, in] that products multiply, in the dtype of the weight: kept, or read from their bytes."""
        prepared = self.prepared()
        return prepared if prepared is None or isinstance(prepared, Tensor) else prepared.dequantise(self.weight.dtype)

    def quantised(self) -> MXTensor:
        """The packed form of what ``quantised_values`` returns, after looking at the master weight's bits as well."""
        kept = self._fresh()
        if bool(self.sums_of_bits(self.weight.detach(), 1)[0] != kept.fingerprint):
            raise RuntimeError(f"{self} has a new master weight: call requantise(model) before using it")
        return kept.quantised

    def packed(self) -> MXTensor:
        """What ``quantised`` returns, without looking at the master weight's bits: there may be thousands of them."""
        return self._fresh().quantised

    def _identity(self) -> tuple[int, int]:
        # Sees in-place changes through the parameter. The distributed optimizer writes past it, into the buffer that
        # the parameter is a view of: ``forget_before_step`` covers that.
        weight = self.weight
        return weight._version, weight.data_ptr()

    @staticmethod
    def sums_of_bits(weights: Tensor, count: int) -> Sequence[Tensor | int]:
        """One number for each of ``count`` equal weights that stand one below the other, as int64 on their device.

        Another number for any change of a single element, and for all but one in 2^64 others.
        """
        # The wider the words, the less a GPU has to add up; which ones depends on the shape alone.
        wide = weights.shape[1] * weights.element_size() % 8 == 0
        if wide and weights.storage_offset() * weights.element_size() % 8:
            weights = weights.clone()
        return weights.view(torch.int64 if wide else torch.int16).reshape(count, -1).sum(1, dtype=torch.int64).unbind()

    def _fresh(self) -> _Kept:
        kept = self._kept
        if kept is None or kept.made_from != self._identity():
            raise RuntimeError(f"the quantised weight of {self} is stale: call requantise(model) first")
        return kept


def quantised_weights(model: nn.Module) -> Iterator[QuantisedWeight]:
    """The modules of ``model`` whose weight is quantised."""
    for module in model.modules():
        if isinstance(module, QuantisedWeight) and module.quantises_weight:
            yield module


@torch.no_grad()
def requantise(model: nn.Module) -> None:
    """Quantise every master weight anew.

    Rows are independent of each other, so weights of one shape and recipe are quantised together, up to ``TOGETHER``.
    The host waits for the device once, at the end.

    Raises:
        ValueError: a weight holds NaN or Inf. The model then refuses to compute.
    """
    runs: list[tuple[list[QuantisedWeight], Tensor]] = []
    together: dict[tuple, list[QuantisedWeight]] = {}
    for module in quantised_weights(model):
        key = (module.weight_size, module.weight.dtype, id(module.recipe))  # hashing recipes takes longer
        together.setdefault(key, []).append(module)
    for alike in together.values():
        for modules in _runs(alike):
            runs.append((modules, _requantise_together(modules).found))
    if runs:
        numbers = iter(torch.cat([found for _, found in runs]).tolist())
        for modules, _ in runs:
            rounded, nonfinite = [next(numbers) for _ in modules], next(numbers)
            if nonfinite:
                forget(model)
                _raise_nonfinite(modules)
            for module, lossy in zip(modules, rounded, strict=True):
                if lossy:
                    module.multiply_as_values()


def _raise_nonfinite(modules: "Sequence[QuantisedWeight]") -> None:
    with modules[0].whole_weights(modules):
        for module in modules:
            raise_nonfinite(module.weight.detach(), f"the weight of {module.name}")


def _requantise_together(modules: "Sequence[QuantisedWeight]") -> QuantisedWeights:
    """Modules alike in shape, dtype and recipe."""
    first, recipe = modules[0], modules[0].recipe
    assert recipe is not None
    assert recipe.w is not None
    with first.whole_weights(modules):
        masters = [module.weight.detach() for module in modules]
        weights = torch.cat(masters) if len(masters) > 1 else masters[0]
        result = quantise_weights(weights, len(modules), recipe, first.name, prepare=first.keeps_prepared)
        fingerprints = first.sums_of_bits(weights, len(modules))
        parts = zip(modules, result.packed, result.prepared, fingerprints, strict=True)
        for module, packed, prepared, fingerprint in parts:
            module.store(packed, prepared, fingerprint)
    return result


def _runs(alike: list[QuantisedWeight]) -> Iterator[list[QuantisedWeight]]:
    """Consecutive ones of weights alike in shape, with at most ``TOGETHER`` numbers in all or alone."""
    count = max(1, TOGETHER // math.prod(alike[0].weight_size))
    for start in range(0, len(alike), count):
        yield alike[start : start + count]


def forget(model: nn.Module) -> None:
    """Drop every quantised weight: until ``requantise`` the model refuses to compute."""
    for module in quantised_weights(model):
        module.forget()


def forget_before_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """From now on no step of ``optimizer`` can leave a stale quantised weight behind."""
    optimizer.register_step_pre_hook(lambda *_: forget(model))
