"""Other projects on the same data, where they are installed and run.

torchao            its conversion to MXFP4
sgl-deep-gemm      its FP8 GEMM with block scales, on our operands
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from triton.testing import do_bench

from mxdist.quant.kernels.forms import Fp8Matrix
from mxdist.quant.kernels.gemm import matmul
from mxdist.quant.kernels.quant_tiles import quantise_tiles
from mxdist.quant.kernels.quant_weight import quantise_weight
from mxdist.quant.recipe import Operand
from mxdist.quant.reference import quantise
from tools.bench.shapes import LINEARS, TOKENS
from tools.bench.timing import Ceilings, Row, is_rounding_only, milliseconds

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


def deep_gemm() -> Callable[[Fp8Matrix, Fp8Matrix, Tensor], None]:
    """DeepGEMM's product with 1 x 128 by 128 x 128 scales, into a tensor. ImportError without sgl-deep-gemm."""
    import deep_gemm

    return lambda a, b, out: deep_gemm.fp8_gemm_nt((a.data, a.scale), (b.data, b.scale.contiguous()), out)


def rows(ceilings: Ceilings) -> Iterator[Row]:
    """Rows of every peer that is there; `absent` says why the others are not."""
    absent.clear()
    for name, table in (("torchao", _conversions), ("sgl-deep-gemm", _products)):
        try:
            yield from table(ceilings)
        except Exception as error:  # whatever goes wrong in another project is its row's absence, not ours
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]


def _conversions(ceilings: Ceilings) -> Iterator[Row]:
    """torchao's conversion, compiled as its users compile it, over the copy bandwidth."""
    convert = torch.compile(torchao())
    for width in WIDTHS:
        x = torch.randn(TOKENS, width, device="cuda", dtype=torch.bfloat16)
        correct = agrees(x[:_CHECKED], convert)
        elapsed = float(do_bench(lambda x=x: convert(x), rep=100, return_mode="median"))
        speed = x.numel() * (2 + 17 / 32) / elapsed / 1e9
        label = f"torchao to_mx, compiled, packed [{TOKENS}, {width}]"
        yield Row("peers", label, elapsed, speed, "TB/s", speed / ceilings.copy, None, correct)


def _products(ceilings: Ceilings) -> Iterator[Row]:
    """DeepGEMM on the operands of every linear's forward pass, beside the vendor's kernel that we use."""
    multiply = deep_gemm()
    for name, outputs, inputs in LINEARS["Qwen2.5-3B"]:
        x = torch.randn(TOKENS, inputs, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
        left, right = quantise_tiles(x, Operand())[0], quantise_weight(w, Operand()).forward
        assert left is not None
        out = x.new_empty(TOKENS, outputs)
        multiply(left, right, out)
        wanted = left.dequantise(torch.float64)[:_CHECKED] @ right.dequantise(torch.float64).t()
        bf16 = milliseconds(partial(torch.matmul, x, w.t()))
        theirs = milliseconds(partial(multiply, left, right, out))
        ours = milliseconds(partial(matmul, left, right))
        work = 2e-9 * TOKENS * outputs * inputs
        for label, elapsed, values in (("sgl-deep-gemm", theirs, out), ("the vendor's", ours, matmul(left, right))):
            yield Row(
                "peers", f"{name} {TOKENS}x{outputs}x{inputs} 1x128 by 128x128, {label}", elapsed, work / elapsed,
                "TFLOP/s", work / elapsed / ceilings.fp8, bf16 / elapsed, is_rounding_only(values[:_CHECKED], wanted),
            )  # fmt: skip
