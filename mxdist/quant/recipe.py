"""Which numbers are quantised and how: small frozen dataclasses, named presets, JSON in and out. No torch here.

A linear has three GEMMs and five operands:

    forward   Y  = X_fwd  W^T         contraction over K (input features)
    dgrad     dX = dY_dgrad W         contraction over N (output features)
    wgrad     dW = dY_wgrad^T X_wgrad contraction over T (tokens)

A `Recipe` names an `Operand` for each; None keeps that operand in high precision. The recipe travels to the rollout
engine inside a config.json, so reading it is strict: an unknown key is an error, never ignored.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any, Literal

BLOCK_SIZES = (16, 32)
MACRO_SIZES = (64, 128)
MAX_SEARCH_BITS = 4


class ScaleRule(StrEnum):
    """How the power-of-two block scale follows from the block's largest magnitude m (NUMERICS.md 2).

    FLOOR  2^(floor(log2 m) - 2): the OCP rule; magnitudes in (6, 8) scale units saturate.
    CEIL   2^ceil(log2(m / 6)): never saturates; the rule of arXiv 2605.20402.
    EVEN   halves CEIL's scale when m lands below 3.5 units (OAS of arXiv 2603.08713, AMD Quark "even"): values
           between 6 and 7 units saturate, the others gain a finer grid.
    BEST   the better of CEIL and CEIL / 2 by squared error, block by block: the power-of-two form of
           four-over-six (arXiv 2512.02010). For weights; costs a second rounding.
    """

    FLOOR = "floor"
    CEIL = "ceil"
    EVEN = "even"
    BEST = "best"


@dataclass(frozen=True, slots=True)
class Macro:
    """Macro-block scaling: one factor f in [1, 2) shared by `size` elements, x_hat = Q(f x) / f (NUMERICS.md 5).

    size    elements that share a factor: 128, or 64.
    method  "static": f from the macro block's largest magnitude, truncated to `bits` mantissa bits (activations);
            "search": the least squared error among the 2^bits factors 1 + j / 2^bits (weights);
            "folded": the least squared error among the decode factors 1/f of {1, 1.25, 1.5}, which stay exact in an
            E4M3 byte; not the method of the papers, hence its own name.
    bits    mantissa bits of f; ignored by "folded".
    """

    size: int = 128
    method: Literal["static", "search", "folded"] = "static"
    bits: int = 8

    def __post_init__(self) -> None:
        if self.size not in MACRO_SIZES:
            raise ValueError(f"macro block size {self.size} is not one of {MACRO_SIZES}.")
        if self.method not in ("static", "search", "folded"):
            raise ValueError(f"macro method {self.method!r} is not one of static, search, folded.")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"macro factors have 1 to 8 mantissa bits, not {self.bits}.")
        if self.method == "search" and self.bits > MAX_SEARCH_BITS:
            raise ValueError(
                f"macro search tries 2**bits factors, so bits is at most {MAX_SEARCH_BITS}, not {self.bits}."
            )


@dataclass(frozen=True, slots=True)
class Fallback:
    """Outlier fallback (OF): a second MXFP4 tensor for the residual, x_hat = Q(x) + alpha Q(x - Q(x)) (NUMERICS.md 6).

    alpha     weight of the residual in [0, 1]; 0.5 is the paper's, 1 is the least squared error.
    fraction  None: every block has a residual (the paper). Otherwise only 128-tiles whose largest magnitude exceeds
              a threshold do, and the threshold is steered so that about this fraction of tiles is flagged.
    """

    alpha: float = 0.5
    fraction: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"the outlier fallback's alpha lies in [0, 1], not at {self.alpha}.")
        if self.fraction is not None and not 0.0 < self.fraction < 1.0:
            raise ValueError(f"the flagged fraction lies strictly between 0 and 1, not at {self.fraction}.")


@dataclass(frozen=True, slots=True)
class Operand:
    """How one GEMM operand becomes MXFP4. Blocks run along the contraction axis, which callers put last.

    block       elements per E8M0 scale: 32 (MXFP4), or 16.
    square      True: one scale per block x block square (weights), so that W and W^T quantise identically. Macro
                factors and E4M3 tiles become squares too, so rows depend on one another in groups of 128.
    scale_rule  see `ScaleRule`.
    macro       macro-block scaling or None.
    fallback    outlier fallback or None.
    rounding    "nearest" (ties to even) or "stochastic" (unbiased, gradients only; needs a seed).
    hadamard    "none", "plain" (32-point Hadamard along the contraction axis before quantising, undone after) or
                "signed" (the same after random signs drawn from the seed).
    mean        True: a frozen per-channel mean is taken off before quantising and added back in high precision.
    """

    block: int = 32
    square: bool = False
    scale_rule: ScaleRule = ScaleRule.CEIL
    macro: Macro | None = None
    fallback: Fallback | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    hadamard: Literal["none", "plain", "signed"] = "none"
    mean: bool = False

    def __post_init__(self) -> None:
        if self.block not in BLOCK_SIZES:
            raise ValueError(f"block size {self.block} is not one of {BLOCK_SIZES}.")
        try:
            object.__setattr__(self, "scale_rule", ScaleRule(self.scale_rule))
        except ValueError:
            rules = ", ".join(ScaleRule)
            raise ValueError(f"unknown scale rule {self.scale_rule!r}; choose one of {rules}.") from None
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding {self.rounding!r} is neither nearest nor stochastic.")
        if self.hadamard not in ("none", "plain", "signed"):
            raise ValueError(f"hadamard {self.hadamard!r} is not one of none, plain, signed.")
        if self.square and self.hadamard != "none":
            raise ValueError("square blocks are shared by rows and columns, so they do not go with Hadamard.")
        if self.rounding == "stochastic" and self.scale_rule is not ScaleRule.CEIL:
            raise ValueError("stochastic rounding is unbiased only without saturation: it needs the ceil scale rule.")
        searches = self.macro is not None and self.macro.method != "static"
        if self.rounding == "stochastic" and searches:
            raise ValueError("a macro factor is searched for rounding to nearest, not for stochastic rounding.")
        if self.scale_rule is ScaleRule.BEST and searches:
            raise ValueError("the best scale rule and a searched macro factor are two searches: choose one of them.")

    @property
    def needs_seed(self) -> bool:
        """True when quantising draws random numbers."""
        return self.rounding == "stochastic" or self.hadamard == "signed"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What every operand of every quantised linear becomes; None keeps an operand in high precision.

    x_fwd, w            forward operands. dX uses the quantised W too, so that both passes see one function.
    dy_dgrad            dY in dX = dY W_q, blocks along N.
    x_wgrad, dy_wgrad   operands of dW = dY^T X, blocks along tokens. x_wgrad None reuses the forward's quantised X:
                        the paper's mode is W4A4 forward with high-precision gradients on quantised operands.
    """

    name: str
    x_fwd: Operand | None = None
    w: Operand | None = None
    dy_dgrad: Operand | None = None
    x_wgrad: Operand | None = None
    dy_wgrad: Operand | None = None

    def __post_init__(self) -> None:
        for field in OPERAND_NAMES[1:]:
            operand = getattr(self, field)
            flags = operand is not None and operand.fallback is not None and operand.fallback.fraction is not None
            if operand is not None and (operand.mean or flags):
                raise ValueError(f"recipe {self.name!r}: only x_fwd has a frozen mean or threshold, not {field}.")

    def __hash__(self) -> int:
        # Plans are kept by recipe and looked up in every product, where hashing all operands would show.
        return hash(self.name)

    @property
    def quantises(self) -> bool:
        """True when any operand of any GEMM is quantised (False for bf16)."""
        return any(getattr(self, field) is not None for field in OPERAND_NAMES)

    @property
    def needs_seed(self) -> bool:
        """True when some operand draws random numbers, so that `mx_linear` must be given a seed."""
        operands = (self.x_fwd, self.w, self.dy_dgrad, self.x_wgrad, self.dy_wgrad)
        return any(operand.needs_seed for operand in operands if operand is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain JSON-serialisable dict that `from_dict` turns back into an equal recipe."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Inverse of `to_dict`. ValueError on an unknown or missing key, or on a value out of range."""
        given = checked_keys(cls, data)
        for key in OPERAND_NAMES:
            if given.get(key) is not None:
                given[key] = _operand_from_dict(given[key])
        return cls(**given)


OPERAND_NAMES = ("x_fwd", "w", "dy_dgrad", "x_wgrad", "dy_wgrad")


def checked_keys(cls: type, data: object) -> dict[str, Any]:
    """Return a copy of `data` after checking that it is a dict whose keys are fields of `cls`."""
    label = cls.__name__.lower()
    if not isinstance(data, dict):
        raise ValueError(f"a {label} is written as an object with keys, not as {data!r}.")
    known = {field.name for field in fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"unknown {label} key {', '.join(map(repr, unknown))}; known: {', '.join(sorted(known))}.")
    if "name" in known and not isinstance(data.get("name"), str):
        raise ValueError(f"a {label} needs a name.")
    return dict(data)


def _operand_from_dict(data: object) -> Operand:
    given = checked_keys(Operand, data)
    if given.get("macro") is not None:
        given["macro"] = Macro(**checked_keys(Macro, given["macro"]))
    if given.get("fallback") is not None:
        given["fallback"] = Fallback(**checked_keys(Fallback, given["fallback"]))
    return Operand(**given)


def _presets() -> dict[str, Recipe]:
    """The named recipes. MBS is static for activations and searched for weights; OF acts on both operands.

    _g4 adds gradients: both backward operands of dY rounded stochastically, and the two operands of dW, which run
    along tokens, rotated. The rotation is the plain one: arXiv 2605.09825 finds that random signs do not help.
    _g4_nearest rounds gradients to nearest and rotates nothing: the fastest, and biased.
    """
    static, searched, fallback = Macro(method="static"), Macro(method="search", bits=4), Fallback(alpha=0.5)
    gradients = {
        "dy_dgrad": Operand(rounding="stochastic"),
        "x_wgrad": Operand(hadamard="plain"),
        "dy_wgrad": Operand(hadamard="plain", rounding="stochastic"),
    }
    forward = (
        Recipe("bf16"),
        Recipe("mxfp4", x_fwd=Operand(), w=Operand()),
        Recipe("mxfp4_mbs", x_fwd=Operand(macro=static), w=Operand(macro=searched)),
        Recipe("mxfp4_of", x_fwd=Operand(fallback=fallback), w=Operand(fallback=fallback)),
        Recipe(
            "mxfp4_mbs_of",
            x_fwd=Operand(macro=static, fallback=fallback),
            w=Operand(macro=searched, fallback=fallback),
        ),
    )
    g4 = [replace(recipe, name=f"{recipe.name}_g4", **gradients) for recipe in forward if recipe.quantises]
    to_nearest = {name: Operand() for name in gradients}
    nearest = replace(forward[1], name="mxfp4_g4_nearest", **to_nearest)
    return {recipe.name: recipe for recipe in (*forward, *g4, nearest)}


PRESETS = _presets()


def get_recipe(name: str) -> Recipe:
    """Return the preset called `name`. ValueError lists the presets when there is none."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"unknown recipe {name!r}; choose one of {', '.join(PRESETS)}.") from None
