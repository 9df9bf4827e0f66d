"""Which code quantises on a device: Triton's kernels where they run, the reference elsewhere. Equal in every bit.

Triton is imported only when a tensor on a GPU is quantised; without it, and on a CPU, nothing here needs it.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache

import torch
from torch import Tensor

from mxdist.quant import reference
from mxdist.quant.kernels.options import missing_in_terms
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Operand
from mxdist.quant.reference import NonFinite
from mxdist.quant.tensor import MXTensor
from mxdist.quant.transform import Frozen

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
