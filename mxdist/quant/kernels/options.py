"""Which operands the kernels can quantise, turned into the constants that a kernel is compiled for. No Triton here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mxdist.quant.format import SCALE_CARRY, TILE
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Operand, ScaleRule
from mxdist.quant.scaling import saturates


class UnsupportedOperandError(ValueError):
    """An operand that these kernels do not do; the message says what does."""


@dataclass(frozen=True, slots=True)
class Options:
    """An operand as a kernel sees it.

    carry         added to the bits of a block's maximum before its exponent is read (`format.SCALE_CARRY`)
    saturate      magnitudes may exceed 6 scales: clamp them
    macro_bits    mantissa bits of the static macro factor, 0 without
    stochastic    round stochastically
    hadamard      rotate runs of 32 first, and leave the values rotated
    """

    carry: int
    saturate: bool
    macro_bits: int
    stochastic: bool
    hadamard: bool


@lru_cache
def options_of(operand: Operand) -> Options:
    """Return the options of an activation's or gradient's operand, or raise `UnsupportedOperandError`."""
    missing = missing_feature(operand)
    if missing is not None:
        raise UnsupportedOperandError(f"the kernels do not do {missing}: the reference backend does.")
    return Options(
        carry=SCALE_CARRY[operand.scale_rule],
        saturate=saturates(operand.scale_rule),
        macro_bits=operand.macro.bits if operand.macro is not None else 0,
        stochastic=operand.rounding == "stochastic",
        hadamard=operand.hadamard == "plain",
    )


def missing_feature(operand: Operand) -> str | None:
    """Return what of an activation's or gradient's operand the kernels lack, or None when they do all of it."""
    checks = (
        (operand.block != 32, f"blocks of {operand.block}"),
        (operand.square, "square blocks outside weights"),
        (operand.scale_rule is ScaleRule.BEST, "the scale rule 'best'"),
        (operand.macro is not None and operand.macro.method != "static", "searched macro factors outside weights"),
        (operand.macro is not None and operand.macro.size != 128, "macro blocks of 64"),
        (operand.fallback is not None, "outlier fallback"),
        (operand.hadamard == "signed", "random signs before Hadamard"),
        (operand.mean, "mean removal"),
    )
    return next((text for lacks, text in checks if lacks), None)


METHODS = {"static": 1, "search": 2, "folded": 3}
"""Macro methods as `terms` numbers them; 0 is none."""


@dataclass(frozen=True, slots=True)
class TermOptions:
    """An operand as the kernels of `quant_terms` see it: `Options` with every macro method and outlier fallback.

    flagged  only some tiles have a residual
    """

    carry: int
    saturate: bool
    method: int
    bits: int
    stochastic: bool
    fallback: bool
    flagged: bool
    alpha: float

    @staticmethod
    @lru_cache
    def of(operand: Operand) -> TermOptions:
        """Return the options of an operand, or raise `UnsupportedOperandError`."""
        missing = missing_in_terms(operand)
        if missing is not None:
            raise UnsupportedOperandError(f"the kernels do not do {missing}: the reference backend does.")
        macro, fallback = operand.macro, operand.fallback
        return TermOptions(
            carry=SCALE_CARRY[operand.scale_rule],
            saturate=saturates(operand.scale_rule),
            method=METHODS[macro.method] if macro else 0,
            bits=macro.bits if macro else 8,
            stochastic=operand.rounding == "stochastic",
            fallback=fallback is not None,
            flagged=fallback is not None and fallback.fraction is not None,
            alpha=fallback.alpha if fallback else 0.0,
        )


def missing_in_terms(operand: Operand) -> str | None:
    """Return what of an operand the kernels of `quant_terms` lack, or None when they do all of it."""
    checks = (
        (operand.block != 32, f"blocks of {operand.block}"),
        (operand.square, "square blocks outside weights"),
        (operand.scale_rule is ScaleRule.BEST, "the scale rule 'best'"),
        (operand.macro is not None and operand.macro.size != 128, "macro blocks of 64"),
        (operand.hadamard != "none", "Hadamard here"),
        (operand.mean, "mean removal"),
    )
    return next((text for lacks, text in checks if lacks), None)


DECODE_ROWS = 64
"""Rows, or rows of an expert, up to which `decode` multiplies; with more, reading weights is no longer what counts."""

TILE_ROWS = 256
"""Rows up to which the FP8 kernel of `decode_tiles` multiplies what `runs_in_tiles`; with more, unpacking pays."""


def runs_in_tiles(weight: Operand, k: int, x: Operand | None) -> bool:
    """True when `decode_tiles` multiplies packed weights [N, k] of this operand with rows quantised by operand x."""
    if x is None or x.rounding != "nearest" or x.hadamard != "none" or missing_feature(x) is not None:
        return False
    macro = weight.macro is None or weight.macro.size == TILE
    one_term = weight.block == 32 and macro and weight.fallback is None and missing_in_packed(weight) is None
    return one_term and k % TILE == 0


def missing_in_packed(operand: Operand) -> str | None:
    """Return what of a weight's operand `packed` and `decode` cannot read from its bytes, or None when all of it."""
    if operand.hadamard != "none":
        return "rotated values"
    return "values whose mean was removed" if operand.mean else None


@dataclass(frozen=True, slots=True)
class Random:
    """A `Draw` as kernel arguments: the seed, and where the piece lies; see `philox.uniform`."""

    seed: int = 0
    stream: int = 0
    row: int = 0
    first_call: int = 0
    calls_per_row: int = 0

    @classmethod
    def of(cls, draw: Draw | int | None, k: int, needed: bool) -> Random:
        """Return the arguments for a piece [rows, k]; ValueError when random bits are needed and there is no seed."""
        if draw is None:
            if needed:
                raise ValueError("stochastic rounding draws random numbers: it needs a seed.")
            return NO_RANDOM
        if isinstance(draw, int):
            draw = Draw(draw)
        seed = draw.seed & 0xFFFFFFFFFFFFFFFF
        signed = seed - (1 << 64) if seed >> 63 else seed  # a kernel's 64-bit integers are signed
        return cls(signed, draw.stream, draw.row, draw.column // 8, -(-(draw.columns or k) // 8))


NO_RANDOM = Random()
