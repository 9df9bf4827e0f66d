"""Inputs for the property-based tests: tensors that hold every kind of float32 a quantiser can trip over."""

import hypothesis.strategies as st
import torch
from torch import Tensor

from mxdist.quant.recipe import Fallback, Macro, Operand, ScaleRule

KINDS = ("gaussian", "ties", "subnormal", "huge", "wide", "zeros", "outlier", "constant")


@st.composite
def tensors(draw: st.DrawFn, max_rows: int = 5, max_k: int = 300) -> Tensor:
    """A float32 tensor [rows, K] of one of `KINDS`, K of any size, with some exact zeros of both signs."""
    rows, k = draw(st.integers(1, max_rows)), draw(st.integers(1, max_k))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, k, generator=generator)
    kind = draw(st.sampled_from(KINDS))
    if kind == "ties":  # multiples of 1/4 of powers of two: every decision point of the grid
        x = torch.randint(-32, 33, (rows, k), generator=generator) * 0.25 * 2.0 ** draw(st.integers(-130, 100))
    elif kind == "subnormal":
        x = x * 2.0**-128 * 2.0 ** -draw(st.integers(0, 20))
    elif kind == "huge":
        x = (x * 2.0**125).clamp(-3.4e38, 3.4e38)
    elif kind == "wide":  # magnitudes over the whole range of float32
        x = x * 2.0 ** torch.randint(-140, 100, (rows, k), generator=generator)
    elif kind == "zeros":
        x = x * (torch.rand(rows, k, generator=generator) < 0.02)
    elif kind == "outlier":
        x[draw(st.integers(0, rows - 1)), draw(st.integers(0, k - 1))] = 2.0 ** draw(st.integers(0, 30))
    elif kind == "constant":
        x = torch.full((rows, k), draw(st.floats(-(2.0**99), 2.0**99, width=32)))
    x[torch.rand(rows, k, generator=generator) < 0.05] = 0.0
    x[torch.rand(rows, k, generator=generator) < 0.05] = -0.0
    return x.to(torch.float32)


def operands() -> st.SearchStrategy[Operand]:
    """Every deterministic combination of block, scale rule, macro-block scaling and whole-tensor fallback."""
    static = st.builds(Macro, size=st.sampled_from((64, 128)), method=st.just("static"), bits=st.sampled_from((3, 8)))
    search = st.builds(Macro, size=st.sampled_from((64, 128)), method=st.just("search"), bits=st.sampled_from((2, 4)))
    folded = st.builds(Macro, method=st.just("folded"))
    fallback = st.builds(Fallback, alpha=st.sampled_from((0.0, 0.3, 0.5, 1.0)))
    return st.builds(
        Operand,
        block=st.sampled_from((16, 32)),
        scale_rule=st.sampled_from((ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.EVEN)),
        macro=st.one_of(st.none(), static, search, folded),
        fallback=st.one_of(st.none(), fallback),
    )


def bits(x: Tensor) -> Tensor:
    """The float32 bit patterns, so that comparisons see the sign of zero."""
    return x.contiguous().view(torch.int32)
