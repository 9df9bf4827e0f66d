"""Which GEMM each of a linear's three products runs on, and why. No Triton here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import torch

from mxdist.quant.kernels.forms import Form
from mxdist.quant.kernels.options import missing_feature, missing_in_terms
from mxdist.quant.recipe import Operand, Recipe


class Gemm(StrEnum):
    """How a product is computed.

    ROW, BLOCK, TILE  FP8 with a scale per row, with 1 x 128 by 128 x 128 scales, with 1 x 128 scales on both sides
    BF16              a GEMM in the input's dtype, bfloat16 in training, on dequantised operands
    REFERENCE         the reference quantiser and a GEMM in the input's dtype
    """

    ROW = "fp8 row scales"
    BLOCK = "fp8 1x128 by 128x128 scales"
    TILE = "fp8 1x128 by 1x128 scales"
    BF16 = "bf16"
    REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Choice:
    """A product's kernel and the reason in words."""

    gemm: Gemm
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The choices for Y = X W^T, dX = dY W and dW = dY^T X."""

    forward: Choice
    dgrad: Choice
    wgrad: Choice

    @property
    def weight_form(self) -> Form:
        """The form that `forward` and `dgrad` want their weights in."""
        return {Gemm.ROW: Form.ROW, Gemm.TILE: Form.TILE}.get(self.forward.gemm, Form.SQUARE)

    def why(self) -> str:
        """Three lines: product, kernel, reason."""
        names = {"Y = X W^T": self.forward, "dX = dY W": self.dgrad, "dW = dY^T X": self.wgrad}
        return "\n".join(f"{name:12} {choice.gemm}: {choice.reason}" for name, choice in names.items())


def backend(recipe: Recipe, outputs: int, inputs: int, device: torch.device, listed: bool = False) -> Plan:
    """Return what runs for a weight [outputs, inputs] on `device`; `Plan.why` says why.

    listed  the tiles that get an outlier fallback are listed (`Frozen.tiles`), not found by a threshold.

    On a device without FP8 tensor cores, and where one of the three products needs it, all of them are the reference.
    """
    lacking = device_lacks(device)
    if lacking is not None:
        choice = Choice(Gemm.REFERENCE, lacking)
        return Plan(choice, choice, choice)
    chosen = plan(recipe, outputs, inputs, listed)
    for part in (chosen.forward, chosen.dgrad, chosen.wgrad):
        if part.gemm is Gemm.REFERENCE:
            return Plan(part, part, part)
    return chosen


@lru_cache
def plan(recipe: Recipe, outputs: int, inputs: int, listed: bool = False) -> Plan:
    """Return the plan for a weight [outputs, inputs]; `listed` as for `backend`.

    Row scales are the fastest exact FP8 GEMM on Hopper, by 2 to 10 %, but rows have to be read twice to be quantised,
    and weights too; with quantisation counted, blocks win (`tools/bench`, table "layers").
    """
    forward = _forward(recipe, outputs, inputs, listed)
    if forward.gemm is Gemm.REFERENCE:
        return Plan(forward, forward, forward)
    return Plan(forward, _dgrad(recipe, forward), _wgrad(recipe, outputs, inputs))


def without_bytes(chosen: Plan, reason: str) -> Plan:
    """Return the plan for a weight of which no bytes can be made: `chosen` but for them."""
    choice = Choice(Gemm.BF16, reason)
    return Plan(choice, choice, chosen.wgrad)


def _forward(recipe: Recipe, outputs: int, inputs: int, listed: bool) -> Choice:
    x, w = recipe.x_fwd, recipe.w
    if x is None or w is None:
        return Choice(Gemm.REFERENCE, "an operand of the forward GEMM stays in high precision")
    if x.fallback is not None or w.fallback is not None:
        return _with_fallback(x, w, outputs, inputs, listed)
    reason = missing_feature(x) or _missing_in_weight(w) or ("Hadamard on x_fwd" if x.hadamard != "none" else None)
    if reason is not None:
        return Choice(Gemm.REFERENCE, f"the kernels do not do {reason}")
    if outputs % 16:
        return Choice(Gemm.REFERENCE, f"FP8 GEMMs need output features in multiples of 16, not {outputs}")
    if w.macro is not None and w.macro.method != "folded":
        return Choice(Gemm.TILE, "macro factors on both operands need a scale per 1x128 tile on both sides")
    if outputs % 128 or inputs % 128:
        if x.macro is not None or w.macro is not None:
            return Choice(Gemm.REFERENCE, f"128x128 scales need whole squares, not [{outputs}, {inputs}]")
        return Choice(Gemm.ROW, f"[{outputs}, {inputs}] is not made of whole 128x128 squares")
    if x.macro is not None:
        return Choice(Gemm.BLOCK, "X has a macro factor per 1x128 tile, W none or one in its bytes")
    return Choice(Gemm.BLOCK, "tiles are quantised in one read; row scales gain less in the GEMM than a second costs")


def _with_fallback(x: Operand, w: Operand, outputs: int, inputs: int, listed: bool) -> Choice:
    reason = missing_in_terms(x) or missing_in_terms(w)
    if reason is not None:
        return Choice(Gemm.REFERENCE, f"the kernels do not do {reason}")
    if w.fallback is not None:
        return Choice(Gemm.BF16, "both terms of W fit bfloat16, not one E4M3 byte; FP8 takes a product for each pair")
    if x.fallback is not None and x.fallback.fraction is None:
        return Choice(Gemm.BF16, "X has a residual everywhere: in FP8 twice the GEMM, in bfloat16 one")
    if not listed:
        return Choice(Gemm.BF16, "a threshold may flag tiles anywhere along K; FP8 needs them listed (Frozen.tiles)")
    if outputs % 128 or inputs % 128 or w.rounding == "stochastic":
        return Choice(Gemm.BF16, f"[{outputs}, {inputs}] is not made of whole 128x128 squares rounded to nearest")
    if w.macro is not None and w.macro.method != "folded":
        return Choice(Gemm.TILE, "the listed tiles lengthen K; macro factors on both sides need 1x128 scales on both")
    return Choice(Gemm.BLOCK, "the listed tiles' residuals lengthen K, as do copies of W's tiles")


def _dgrad(recipe: Recipe, forward: Choice) -> Choice:
    dy = recipe.dy_dgrad
    if dy is None:
        return Choice(Gemm.BF16, "the recipe keeps dY in high precision here")
    reason = missing_feature(dy) or ("Hadamard on dy_dgrad" if dy.hadamard != "none" else None)
    if reason is not None:
        return Choice(Gemm.REFERENCE, f"the kernels do not do {reason}")
    if forward.gemm is Gemm.BF16:
        return Choice(Gemm.BF16, "W has no bytes")
    if forward.gemm is Gemm.TILE:
        return Choice(Gemm.BF16, "W's macro factors vary along dgrad's contraction, so no scale can hold them")
    if forward.gemm is Gemm.ROW and dy.macro is not None:
        return Choice(Gemm.BF16, "dY has macro factors but W has row scales")
    return Choice(forward.gemm, "W^T shares the forward's bytes")


def _wgrad(recipe: Recipe, outputs: int, inputs: int) -> Choice:
    dy, x = recipe.dy_wgrad, recipe.x_wgrad
    if dy is None and x is None:
        return Choice(Gemm.BF16, "the recipe keeps dY in high precision, and X as the forward quantised it")
    if dy is None or x is None:
        return Choice(Gemm.REFERENCE, "the kernels do not do a dW with only one operand quantised for it")
    reason = missing_feature(dy) or missing_feature(x)
    if reason is not None:
        return Choice(Gemm.REFERENCE, f"the kernels do not do {reason}")
    if dy.hadamard != x.hadamard:
        return Choice(Gemm.REFERENCE, "only one operand of dW is rotated")
    if x.macro is not None:
        return Choice(Gemm.TILE, "X^T has a macro factor per 1x128 tile")
    if inputs % 128 or outputs % 16:
        return Choice(Gemm.REFERENCE, f"128x128 scales need whole squares, not [{outputs}, {inputs}]")
    return Choice(Gemm.BLOCK, "tiles along tokens are quantised in one read; row scales would need a second")


def _missing_in_weight(w: Operand) -> str | None:
    if w.macro is None:
        plain = Operand(block=w.block, scale_rule=w.scale_rule, mean=w.mean)
        reason = missing_feature(plain)
        return reason or ("stochastic weights" if w.rounding == "stochastic" else None)
    return missing_in_terms(w)


def device_lacks(device: torch.device) -> str | None:
    """Return why `device` cannot run the FP8 GEMMs, or None when it can."""
    if device.type != "cuda":
        return f"a {device.type} device has no FP8 tensor cores"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"compute capability {major}.{minor} is not 9.0"
    return None
