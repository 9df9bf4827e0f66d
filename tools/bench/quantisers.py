"""The quantiser kernels: bytes that must move, over the copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mxdist.quant.kernels.forms import Form
from mxdist.quant.kernels.quant_rows import quantise_rows
from mxdist.quant.kernels.quant_tiles import quantise_tiles
from mxdist.quant.kernels.quant_weight import quantise_weight
from mxdist.quant.recipe import Macro, Operand
from mxdist.quant.reference import fake_quantise
from tools.bench.timing import Ceilings, Row, milliseconds

TOKENS = 16384
WIDTHS = (2048, 4096, 11008, 22016)
_CHECKED = 256
_PLAIN, _RANDOM = Operand(), Operand(rounding="stochastic")
_ROTATED = Operand(hadamard="plain", rounding="stochastic")


def rows(ceilings: Ceilings) -> Iterator[Row]:
    """One row per kernel and width."""
    for width in WIDTHS:
        x = torch.randn(TOKENS, width, device="cuda", dtype=torch.bfloat16)
        for name, traffic, work, check in _kernels(x):
            elapsed = milliseconds(work)
            speed = x.numel() * traffic / elapsed / 1e9
            label = f"{name} [{TOKENS}, {width}]"
            yield Row("quantisers", label, elapsed, speed, "TB/s", speed / ceilings.copy, None, check())


def _kernels(x: Tensor) -> Iterator[tuple[str, float, Callable[[], object], Callable[[], bool | None]]]:
    """Name, bytes per element that must move, the work, and its comparison with the reference on some rows."""
    few = x[:_CHECKED]
    free: dict[str, Any] = {"nonfinite": "propagate"}

    def same(got: Tensor, operand: Operand, by_column: bool = False) -> bool:
        return torch.equal(got, fake_quantise(few.t() if by_column else few, operand, seed=5))

    def rounded(operand: Operand) -> Callable[[], bool]:
        return lambda: same(quantise_rows(few, operand, draw=5).dequantise(), operand)

    def tiled(operand: Operand) -> Callable[[], bool]:
        def check() -> bool:
            by_row, _ = quantise_tiles(few, operand, row_draw=5)
            return by_row is not None and same(by_row.dequantise(), operand)

        return check

    def turned(form: Form, operand: Operand) -> Callable[[], bool]:
        def check() -> bool:
            _, by_column = quantise_tiles(few, column=operand, column_form=form, column_draw=5)
            return by_column is not None and same(by_column.dequantise(), operand, True)

        return check

    def weighed() -> bool:
        both = quantise_weight(few, _PLAIN)
        return same(both.forward.dequantise(), _PLAIN) and same(both.transposed.dequantise().t(), _PLAIN)

    scales = 4 / 128
    macro = Operand(macro=Macro())
    yield "row scales", 3.0, lambda: quantise_rows(x, _PLAIN, **free), rounded(_PLAIN)
    yield "row scales, stochastic", 3.0, lambda: quantise_rows(x, _RANDOM, draw=5, **free), rounded(_RANDOM)
    yield "tiles by row", 3 + scales, lambda: quantise_tiles(x, _PLAIN, **free), tiled(_PLAIN)
    yield "tiles by row, macro factors", 3 + scales, lambda: quantise_tiles(x, macro, **free), tiled(macro)
    yield "tiles by column", 3 + scales, lambda: quantise_tiles(x, column=_PLAIN, **free), turned(Form.TILE, _PLAIN)
    yield (
        "squares by column", 3.0, lambda: quantise_tiles(x, column=_PLAIN, column_form=Form.SQUARE, **free),
        turned(Form.SQUARE, _PLAIN),
    )  # fmt: skip
    yield (
        "tiles by column, rotated, stochastic", 3 + scales,
        lambda: quantise_tiles(x, column=_ROTATED, column_draw=5, **free), lambda: None,
    )  # fmt: skip
    yield (
        "tiles by row and by column", 4 + 2 * scales, lambda: quantise_tiles(x, _PLAIN, _PLAIN, **free),
        lambda: tiled(_PLAIN)() and turned(Form.TILE, _PLAIN)(),
    )  # fmt: skip
    yield "weight, both orientations", 4.0, lambda: quantise_weight(x, _PLAIN, **free), weighed
