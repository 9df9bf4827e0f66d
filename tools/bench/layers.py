"""Whole linears as training runs them, every quantisation included, against BF16: the figures that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdist.quant.backend import prepare_weight
from mxdist.quant.fallback import choose_tiles, tile_maxima
from mxdist.quant.kernels.plan import plan
from mxdist.quant.kernels.prepared import HopperWeight
from mxdist.quant.linear import mx_linear
from mxdist.quant.recipe import Fallback, Macro, Operand, Recipe, get_recipe
from mxdist.quant.reference import fake_quantise
from mxdist.quant.transform import Frozen
from tools.bench import experts
from tools.bench.shapes import LINEARS, TOKENS
from tools.bench.timing import Ceilings, Row, is_rounding_only, milliseconds

_CHECKED = 128
_NEAREST = {"dy_dgrad": Operand(), "x_wgrad": Operand(), "dy_wgrad": Operand()}
_MACRO = Operand(macro=Macro())
RECIPES = (
    Recipe("W4A4G4 to nearest", x_fwd=Operand(), w=Operand(), **_NEAREST),
    get_recipe("mxfp4_g4"),
    Recipe("W4A4G4 with MBS on X and dY", x_fwd=_MACRO, w=Operand(), **(_NEAREST | {"dy_dgrad": _MACRO})),
)
PAPER = get_recipe("mxfp4")
_LISTED = Operand(macro=Macro(), fallback=Fallback(fraction=0.05))
_FOLDED = Operand(macro=Macro(method="folded"))
_OF = _NEAREST | {"dy_dgrad": _MACRO}
LAYER_RECIPES = (
    *RECIPES,
    PAPER,
    Recipe("W4A4G4 with MBS, in W's bytes", x_fwd=_MACRO, w=_FOLDED, **_OF),
    Recipe("W4A4G4 with MBS and OF of 5 % of tiles, listed", x_fwd=_LISTED, w=_FOLDED, **_OF),
    Recipe("W4A4 with MBS and OF of 5 % of tiles, listed", x_fwd=_LISTED, w=_FOLDED),
    get_recipe("mxfp4_mbs"),
    get_recipe("mxfp4_mbs_of"),
)
"""RECIPES, and those that the fused experts do not do; the last is the paper's, OF on whole tensors."""


def rows(ceilings: Ceilings) -> Iterator[Row]:
    """Every layer with every recipe, forward and backward; the paper's mode forward alone, too."""
    for model, linears in LINEARS.items():
        cases = [_Case(outputs, inputs) for _, outputs, inputs in linears]
        work = sum(2e-9 * TOKENS * outputs * inputs for _, outputs, inputs in linears)
        forward_bf16, both_bf16 = _total(cases, _Case.bf16_forward), _total(cases, _Case.bf16_both)
        yield _row(ceilings, f"{model} forward, bf16", forward_bf16, work, forward_bf16, None)
        elapsed = _total(cases, lambda case: case.forward(PAPER))
        yield _row(ceilings, f"{model} forward, {PAPER.name}", elapsed, work, forward_bf16, _correct(cases, PAPER))
        yield _row(ceilings, f"{model} forward and backward, bf16", both_bf16, 3 * work, both_bf16, None)
        for recipe in LAYER_RECIPES:
            elapsed = _total(cases, partial(_Case.both, recipe=recipe))
            label = f"{model} forward and backward, {recipe.name}"
            yield _row(ceilings, label, elapsed, 3 * work, both_bf16, _correct(cases, recipe))
    yield from _experts(ceilings)


class _Case:
    """One linear: its tensors and its work. Weights are quantised in every step, as with one micro-batch."""

    def __init__(self, outputs: int, inputs: int) -> None:
        self.x = torch.randn(TOKENS, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        self.w = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        self.dy = torch.randn(TOKENS, outputs, device="cuda", dtype=torch.bfloat16)
        self.tiles: dict[float, Frozen] = {}

    def bf16_forward(self) -> Tensor:
        return F.linear(self.x.detach(), self.w.detach())

    def bf16_both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.linear(self.x, self.w), (self.x, self.w), self.dy)

    def frozen(self, recipe: Recipe) -> Frozen:
        """The tiles that get a residual, as a calibration would list them; nothing for other recipes."""
        if recipe.x_fwd is None or recipe.x_fwd.fallback is None or recipe.x_fwd.fallback.fraction is None:
            return Frozen()
        share = recipe.x_fwd.fallback.fraction
        if share not in self.tiles:
            self.tiles[share] = Frozen(tiles=choose_tiles(tile_maxima(self.x.detach()), share))
        return self.tiles[share]

    def prepared(self, recipe: Recipe) -> HopperWeight:
        weight = prepare_weight(self.w, recipe, frozen=self.frozen(recipe), nonfinite="propagate")
        assert isinstance(weight, HopperWeight), plan(recipe, self.w.shape[0], self.w.shape[1]).why()
        return weight

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """What every call is given."""
        return {"seed": 1, "nonfinite": "propagate", "frozen": self.frozen(recipe)}

    def forward(self, recipe: Recipe) -> Tensor:
        x, w = self.x.detach(), self.w.detach()
        return mx_linear(x, w, self.prepared(recipe), recipe, **self.settings(recipe))

    def both(self, recipe: Recipe) -> tuple[Tensor, ...]:
        y = mx_linear(self.x, self.w, self.prepared(recipe), recipe, **self.settings(recipe))
        return torch.autograd.grad(y, (self.x, self.w), self.dy)


def _total(cases: list[_Case], work: Callable[[_Case], object]) -> float:
    return sum(milliseconds(partial(work, case)) for case in cases)


def _correct(cases: list[_Case], recipe: Recipe) -> bool:
    """Forward outputs against float64 of the reference's operands."""
    assert recipe.x_fwd is not None
    assert recipe.w is not None
    for case in cases:
        x = fake_quantise(case.x.detach()[:_CHECKED], recipe.x_fwd, frozen=case.frozen(recipe))
        w = fake_quantise(case.w.detach(), recipe.w)
        if case.prepared(recipe).values is not None:  # a GEMM in bfloat16 has operands in bfloat16
            x, w = x.bfloat16(), w.bfloat16()
        wanted = x.double() @ w.double().t()
        if not is_rounding_only(case.forward(recipe)[:_CHECKED], wanted):
            return False
    return True


def _row(ceilings: Ceilings, label: str, elapsed: float, work: float, bf16: float, correct: bool | None) -> Row:
    speed = work / elapsed
    peak = ceilings.bf16 if label.endswith("bf16") else ceilings.fp8
    return Row("layers", label, elapsed, speed, "TFLOP/s", speed / peak, bf16 / elapsed, correct)


def _experts(ceilings: Ceilings) -> Iterator[Row]:
    bf16 = 0.0
    for model, name, elapsed, work, correct in experts.cases(RECIPES):
        bf16 = elapsed if name == "bf16" else bf16
        label = f"{model} in all, forward and backward, {name}"
        yield _row(ceilings, label, elapsed, work, bf16, None if name == "bf16" else correct)
