"""Bare GEMMs of every linear shape, without quantising: FP8 forms, BF16, and Triton's dot_scaled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from mxdist.quant.kernels import dot_scaled
from mxdist.quant.kernels.forms import Form, Fp8Matrix
from mxdist.quant.kernels.gemm import matmul
from mxdist.quant.kernels.quant_rows import quantise_rows
from mxdist.quant.kernels.quant_tiles import quantise_tiles
from mxdist.quant.kernels.quant_weight import quantise_weight
from mxdist.quant.recipe import Operand
from mxdist.quant.reference import quantise
from tools.bench.shapes import EXPERT_COUNT, EXPERT_ROWS, EXPERTS, LINEARS, TOKENS
from tools.bench.timing import Ceilings, Row, is_rounding_only, milliseconds

_CHECKED = 128


def rows(ceilings: Ceilings) -> Iterator[Row]:
    """Forward, dgrad and wgrad of every linear; an expert's at its share of rows."""
    for model, linears in (LINEARS | EXPERTS).items():
        tokens = EXPERT_ROWS // EXPERT_COUNT if model in EXPERTS else TOKENS
        for name, outputs, inputs in linears:
            for product, m, n, k in (
                ("fwd", tokens, outputs, inputs),
                ("dgrad", tokens, inputs, outputs),
                ("wgrad", outputs, inputs, tokens),
            ):
                yield from _product(ceilings, f"{model} {name} {product} {m}x{n}x{k}", m, n, k, product == "fwd")


def _product(ceilings: Ceilings, label: str, m: int, n: int, k: int, emulated: bool) -> Iterator[Row]:
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    work = 2e-9 * m * n * k
    bf16 = milliseconds(lambda: a @ b.t())
    yield Row("gemms", f"{label} bf16", bf16, work / bf16, "TFLOP/s", work / bf16 / ceilings.bf16, 1.0, None)
    for form_a, form_b in ((Form.ROW, Form.ROW), (Form.TILE, Form.SQUARE), (Form.TILE, Form.TILE)):
        left, right = _as_form(a, form_a), _as_form(b, form_b)
        elapsed = milliseconds(partial(matmul, left, right))
        wanted = left.dequantise(torch.float64)[:_CHECKED] @ right.dequantise(torch.float64).t()
        correct = is_rounding_only(matmul(left, right)[:_CHECKED], wanted)
        speed = work / elapsed
        yield Row(
            "gemms", f"{label} {form_a} x {form_b}", elapsed, speed, "TFLOP/s", speed / ceilings.fp8, bf16 / elapsed,
            correct,
        )  # fmt: skip
    if emulated:
        left_q, right_q = quantise(a, Operand(), nonfinite="propagate"), quantise(b, Operand(), nonfinite="propagate")
        packed = dot_scaled.operand_of(left_q), dot_scaled.operand_of(right_q)
        elapsed = milliseconds(lambda: dot_scaled.matmul(*packed))
        wanted = left_q[:_CHECKED].dequantise().double() @ right_q.dequantise().double().t()
        speed = work / elapsed
        yield Row(
            "gemms", f"{label} tl.dot_scaled", elapsed, speed, "TFLOP/s", speed / ceilings.fp8, bf16 / elapsed,
            is_rounding_only(dot_scaled.matmul(*packed)[:_CHECKED], wanted),
        )  # fmt: skip


def _as_form(x: torch.Tensor, form: Form) -> Fp8Matrix:
    if form is Form.ROW:
        return quantise_rows(x, Operand())
    if form is Form.SQUARE:
        return quantise_weight(x, Operand()).forward
    tiles = quantise_tiles(x, Operand())[0]
    assert tiles is not None
    return tiles
