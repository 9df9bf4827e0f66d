"""Which code quantises on a device, and which GEMMs a quantised weight is made for.

Quantisers are Triton's kernels where they run and the reference elsewhere, equal in every bit. `prepare_weight` alone
decides what multiplies in training: what it returns is what `linear.mx_linear` then does.

Triton is imported only when a tensor on a GPU is quantised; without it, and on a CPU, nothing here needs it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mxdist.quant import reference
from mxdist.quant.format import E8M0_NAN
from mxdist.quant.kernels import plan
from mxdist.quant.kernels.options import missing_in_packed, missing_in_terms
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Operand, Recipe
from mxdist.quant.reference import NonFinite
from mxdist.quant.tensor import MXTensor
from mxdist.quant.transform import Frozen

if TYPE_CHECKING:
    from mxdist.quant.kernels.prepared import HopperWeight

_log = logging.getLogger(__name__)


@lru_cache
def quantisers_lack(device: torch.device) -> str | None:
    """Return why the quantiser kernels cannot run on `device`, or None when they can."""
    if device.type != "cuda":
        return f"a {device.type} device has no Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


_said: set[str] = set()


def say_once(name: str, reason: str) -> None:
    """Log that `name`, a layer or tensor, runs on the reference: the first one only of those with the same reason."""
    if reason not in _said:
        _said.add(reason)
        _log.warning("%s runs on the reference backend: %s", name, reason)


def _reference_only(x: Tensor, operand: Operand, name: str) -> bool:
    lacking = quantisers_lack(x.device)
    if lacking is None:
        lacking = missing_in_terms(operand)
        lacking = lacking and f"the kernels do not do {lacking}"
    if lacking is not None and x.device.type != "cpu":
        say_once(name, lacking)
    return lacking is not None


def fake_quantise(
    x: Tensor,
    operand: Operand,
    *,
    seed: int | Draw | None = None,
    frozen: Frozen | None = None,
    name: str = "tensor",
    nonfinite: NonFinite = "error",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `reference.fake_quantise` of x, rounded to `dtype`, by whatever is fastest on x's device."""
    if _reference_only(x, operand, name):
        values = reference.fake_quantise(x, operand, seed=seed, frozen=frozen, name=name, nonfinite=nonfinite)
        return values.to(dtype)
    from mxdist.quant.kernels import quant_terms

    return quant_terms.fake_quantise(x, operand, seed=seed, frozen=frozen, name=name, nonfinite=nonfinite, dtype=dtype)


def quantise(
    x: Tensor,
    operand: Operand,
    *,
    seed: int | Draw | None = None,
    frozen: Frozen | None = None,
    name: str = "tensor",
    nonfinite: NonFinite = "error",
) -> MXTensor:
    """Return `reference.quantise` of x by whatever is fastest on x's device."""
    if _reference_only(x, operand, name):
        return reference.quantise(x, operand, seed=seed, frozen=frozen, name=name, nonfinite=nonfinite)
    from mxdist.quant.kernels import quant_terms

    return quant_terms.quantise(x, operand, seed=seed, frozen=frozen, name=name, nonfinite=nonfinite)


def dequantise(packed: MXTensor, dtype: torch.dtype) -> Tensor:
    """Return `packed.dequantise(dtype)` by whatever is fastest on its device; packed is [N, K], contiguous."""
    if quantisers_lack(packed.codes.device) is not None or missing_in_packed(packed.operand) is not None:
        return packed.dequantise(dtype)
    from mxdist.quant.kernels.packed import expand

    return expand(packed, dtype)


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedWeights:
    """Equal weights that were quantised together, in order.

    packed    each as `quantise` returns it
    prepared  each as `prepare_weight` returns it; None where that was not asked for
    found     int32 [weights + 1] on the device: not 0 for weights whose bytes lost something of `packed`, and last
              where any holds NaN or Inf
    """

    packed: list[MXTensor]
    prepared: Sequence[Tensor | HopperWeight | None]
    found: Tensor


def quantise_weights(
    weights: Tensor, count: int, recipe: Recipe, name: str = "weight", *, prepare: bool = True
) -> QuantisedWeights:
    """`quantise` and `prepare_weight` of `count` equal weights that stand one below the other, [count * N, K].

    Does not wait for a GPU: `found` is for the caller to look at, once for many calls, and `as_values` for weights
    that it names.
    """
    assert recipe.w is not None
    weights, rows = weights.detach(), len(weights) // count
    choice = _plan(weights, rows, recipe, None, name) if prepare else None
    found = torch.zeros(count + 1, dtype=torch.int32, device=weights.device)
    if _reference_only(weights, recipe.w, name):
        packed = reference.quantise(weights, recipe.w, name=name, nonfinite="propagate")
        found[count] = (packed.scales == E8M0_NAN).any()
    else:
        from mxdist.quant.kernels import quant_terms

        packed = quant_terms.quantise(weights, recipe.w, name=name, nonfinite=found[count:])
    parts = packed.split(rows)
    prepared: Sequence[Tensor | HopperWeight | None] = [None] * count
    if choice is not None:
        from mxdist.quant.kernels.prepared import prepare_weights

        prepared = prepare_weights(weights, count, recipe, choice, packed, name, found[:count])
    elif prepare:
        prepared = [dequantise(part, weights.dtype) for part in parts]
    return QuantisedWeights(parts, prepared, found)


def prepare_weight(
    weight: Tensor,
    recipe: Recipe,
    *,
    frozen: Frozen | None = None,
    name: str = "weight",
    nonfinite: NonFinite = "error",
) -> Tensor | HopperWeight:
    """Return a master weight [N, K], quantised as `recipe.w` says, in the form that `linear.mx_linear` multiplies.

    That is operands of FP8 GEMMs where the device and `kernels.plan` have some for this recipe and shape, and else
    values of the weight's dtype, for the reference; off the CPU the first weight of each reason is named in the log.

    frozen  lists the tiles of X that have a residual; given to `mx_linear` as well.
    """
    weight = weight.detach()
    choice = _plan(weight, len(weight), recipe, frozen, name)
    if choice is None:
        assert recipe.w is not None
        return fake_quantise(weight, recipe.w, name=name, nonfinite=nonfinite, dtype=weight.dtype)
    from mxdist.quant.kernels import prepared

    return prepared.prepare_weight(weight, recipe, choice, frozen=frozen, name=name, nonfinite=nonfinite)


def _plan(weights: Tensor, rows: int, recipe: Recipe, frozen: Frozen | None, name: str) -> plan.Plan | None:
    """What multiplies weights of so many rows; None is the reference."""
    if recipe.w is None:
        raise ValueError(f"recipe {recipe.name!r} leaves weights alone: {name} has no quantised weight.")
    lacking = quantisers_lack(weights.device)
    if lacking is None and weights.dtype not in (torch.bfloat16, torch.float32):
        lacking = f"the kernels multiply bfloat16 and float32, not {weights.dtype}"
    if lacking is None:
        listed = frozen is not None and frozen.tiles is not None
        choice = plan.backend(recipe, rows, weights.shape[1], weights.device, listed)
        if choice.forward.gemm is not plan.Gemm.REFERENCE:
            return choice
        lacking = choice.forward.reason
    if weights.device.type != "cpu":
        say_once(name, lacking)
    return None


def nonfinite_in_passing(device: torch.device) -> NonFinite:
    """What quantisers do about NaN and Inf inside a model: looking for them would make the host wait for a GPU.

    There they pass through, to the log-probabilities and to the gradients, which are looked at once per update.
    """
    return "error" if device.type == "cpu" else "propagate"
