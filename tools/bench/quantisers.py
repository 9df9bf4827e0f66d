"""The quantiser kernels: bytes that must move, over the copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxdist.quant.fallback import choose_tiles, tile_maxima
from mxdist.quant.kernels import quant_terms
from mxdist.quant.kernels.forms import Form
from mxdist.quant.kernels.quant_norm import quantise_norm
from mxdist.quant.kernels.quant_residual import quantise_with_residual
from mxdist.quant.kernels.quant_rows import quantise_rows
from mxdist.quant.kernels.quant_tiles import quantise_tiles
from mxdist.quant.kernels.quant_weight import quantise_weight
from mxdist.quant.recipe import Fallback, Macro, Operand
from mxdist.quant.reference import fake_quantise, quantise
from mxdist.quant.transform import Frozen
from tools.bench.timing import Ceilings, Row, milliseconds

TOKENS = 16384
WIDTHS = (2048, 4096, 11008, 22016)
_CHECKED = 256
_PLAIN, _RANDOM = Operand(), Operand(rounding="stochastic")
_ROTATED = Operand(hadamard="plain", rounding="stochastic")
_FOLDED = Operand(macro=Macro(method="folded"))
_LISTED = Operand(macro=Macro(), fallback=Fallback(fraction=0.05))
_BOTH = Operand(macro=Macro(), fallback=Fallback())
_SEARCHED = Operand(macro=Macro(method="search", bits=4), fallback=Fallback())


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

    def weighed(operand: Operand) -> Callable[[], bool]:
        def check() -> bool:
            both = quantise_weight(few, operand)
            return same(both.forward.dequantise(), operand) and same(both.transposed.dequantise().t(), operand)

        return check

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
    yield "weight, both orientations", 4.0, lambda: quantise_weight(x, _PLAIN, **free), weighed(_PLAIN)
    yield "weight, macro factors in its bytes", 4.0, lambda: quantise_weight(x, _FOLDED, **free), weighed(_FOLDED)
    yield from _terms(x, free)


def _terms(x: Tensor, free: dict[str, Any]) -> Iterator[tuple[str, float, Callable[[], object], Callable[[], bool]]]:
    """As `_kernels`, of the kernels with outlier fallback and of packed bytes."""
    few = x[:_CHECKED]
    frozen = Frozen(tiles=choose_tiles(tile_maxima(few), 0.05))
    share = len(frozen.tiles if frozen.tiles is not None else ()) * 128 / x.shape[1]

    def listed() -> bool:
        got, k = quantise_with_residual(few, _LISTED, frozen.tiles).dequantise(), few.shape[1]
        total = got[:, :k].reshape(len(few), -1, 128)
        assert frozen.tiles is not None
        total.index_add_(1, frozen.tiles, got[:, k:].reshape(len(few), -1, 128))
        wanted = fake_quantise(few, _LISTED, frozen=frozen)
        return bool(((total.flatten(1) - wanted).abs() <= wanted.abs() * 2.0**-22).all())  # their sum is rounded

    gain = torch.ones(x.shape[1], device=x.device, dtype=x.dtype)

    def normed() -> bool:
        got, inverse = quantise_norm(few, gain, 1e-6, _PLAIN)
        return torch.equal(got.dequantise(), fake_quantise(few.float() * inverse[:, None], _PLAIN))

    yield "tiles by row of RMSNorm", 3 + 4 / 128, lambda: quantise_norm(x, gain, 1e-6, _PLAIN, **free), normed
    yield (
        "tiles by row, macro factors, OF of 5 % listed", 3 + 4 / 128 + share * (1 + 4 / 128),
        lambda: quantise_with_residual(x, _LISTED, frozen.tiles, **free), listed,
    )  # fmt: skip
    for name, operand in (("macro factors and OF", _BOTH), ("searched factors and OF", _SEARCHED)):
        yield (
            f"values, {name}", 4.0,
            partial(quant_terms.fake_quantise, x, operand, dtype=torch.bfloat16, **free),
            partial(_same_values, few, operand),
        )  # fmt: skip
    for name, operand, size in (("plain", _PLAIN, 2 + 17 / 32), ("searched factors and OF", _SEARCHED, 3 + 18 / 256)):
        work = partial(quant_terms.quantise, x, operand, **free)
        yield f"packed, {name}", size, work, partial(_same_bytes, few, operand)


def _same_values(x: Tensor, operand: Operand) -> bool:
    return torch.equal(quant_terms.fake_quantise(x, operand), fake_quantise(x, operand))


def _same_bytes(x: Tensor, operand: Operand) -> bool:
    got, wanted = quant_terms.quantise(x, operand).parts(), quantise(x, operand).parts()
    return all(torch.equal(got[key], part) for key, part in wanted.items())
