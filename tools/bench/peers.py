"""Other projects' quantisers to MXFP4 on the same data, where they are installed and run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from triton.testing import do_bench

from mxdist.quant.recipe import Operand
from mxdist.quant.reference import quantise
from tools.bench.shapes import TOKENS
from tools.bench.timing import Ceilings, Row

WIDTHS = (2048, 11008)
_CHECKED = 256
absent: dict[str, str] = {}
"""Why a peer has no row, once `rows` has looked."""


def torchao() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """torchao's conversion, the ceil rule: E8M0 codes and nibbles of [rows, K]. ImportError without torchao."""
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

    return lambda x: to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.RCEIL)


def agrees(x: Tensor, convert: Callable[[Tensor], tuple[Tensor, Tensor]]) -> bool:
    """True when nibbles and scales are ours, but for the sign of zero; x has no zero block and no wide tiles."""
    scales, packed = convert(x)
    ours, theirs = quantise(x, Operand()), packed.view(torch.uint8)
    for shift in (0, 4):
        minus_zero = (theirs >> shift & 15) == 8
        theirs = torch.where(minus_zero, theirs ^ (8 << shift), theirs)
    return torch.equal(ours.codes, theirs) and torch.equal(ours.scales, scales.view(torch.uint8))


def rows(ceilings: Ceilings) -> Iterator[Row]:
    """torchao's conversion, compiled as its users compile it, over the copy bandwidth."""
    try:
        convert = torch.compile(torchao())
        for width in WIDTHS:
            x = torch.randn(TOKENS, width, device="cuda", dtype=torch.bfloat16)
            correct = agrees(x[:_CHECKED], convert)
            elapsed = float(do_bench(lambda x=x: convert(x), rep=100, return_mode="median"))
            speed = x.numel() * (2 + 17 / 32) / elapsed / 1e9
            label = f"torchao to_mx, compiled, packed [{TOKENS}, {width}]"
            yield Row("peers", label, elapsed, speed, "TB/s", speed / ceilings.copy, None, correct)
    except Exception as error:  # whatever goes wrong in another project is its row's absence, not ours
        absent["torchao"] = f"{type(error).__name__}: {error}".splitlines()[0]
