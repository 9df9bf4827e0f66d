"""The experts of a MoE layer, tokens in and tokens out, against the same steps in BF16, fused likewise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdist.quant.kernels.experts import experts_mlp, prepare_expert_weights
from mxdist.quant.kernels.permute import sum_copies
from mxdist.quant.kernels.quant_experts import swiglu
from mxdist.quant.kernels.segments import Segments
from mxdist.quant.kernels.swiglu import swiglu_backward
from mxdist.quant.recipe import Recipe
from tools.bench.shapes import EXPERT_COUNT, EXPERT_ROWS, EXPERTS
from tools.bench.timing import milliseconds

COPIES = 2
"""Copies of a token on this rank: 128 experts on 8 ranks with 8 chosen give 1.5 of 8."""


@triton.jit
def _gather_kernel(x, source, out, K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token, c = tl.load(source + row).to(tl.int64), tl.arange(0, K)
    tl.store(out + row * K + c, tl.load(x + token * K + c, mask=(token >= 0) & (c >= 0), other=0.0))


@triton.jit
def _swiglu_kernel(h, p, out, half, COLS: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, COLS)
    at = h + row * 2 * half + c
    gate, up = tl.load(at, mask=c < half).to(tl.float32), tl.load(at + half, mask=c < half).to(tl.float32)
    tl.store(out + row * half + c, swiglu(gate, up, tl.load(p + row)), mask=c < half)


class _Bf16Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, w1: Tensor, w2: Tensor, segments: Segments, ends: Tensor) -> Tensor:
        rows = _gathered(x, segments)
        h = torch._grouped_mm(rows, w1.transpose(1, 2), offs=ends)
        half, spread = h.shape[1] // 2, segments.spread(p)
        a = torch.empty(h.shape[0], half, dtype=h.dtype, device=h.device)
        _swiglu_kernel[(h.shape[0],)](h, spread, a, half, COLS=triton.next_power_of_2(half))
        y = torch._grouped_mm(a, w2.transpose(1, 2), offs=ends)
        ctx.save_for_backward(rows, spread, h, a, w1, w2, ends)
        ctx.segments = segments
        return sum_copies(y, segments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, p, h, a, w1, w2, ends = ctx.saved_tensors
        segments = ctx.segments
        dy = _gathered(grads[0], segments)
        da = torch._grouped_mm(dy, w2, offs=ends)
        dw2 = torch._grouped_mm(dy.t(), a, offs=ends)
        dh, dp = swiglu_backward(da, h, p)
        dx = sum_copies(torch._grouped_mm(dh, w1, offs=ends), segments)
        dw1 = torch._grouped_mm(dh.t(), rows, offs=ends)
        return dx, segments.collect(dp), dw1, dw2, None, None


def _gathered(x: Tensor, segments: Segments) -> Tensor:
    out = torch.empty(segments.rows, x.shape[1], dtype=x.dtype, device=x.device)
    _gather_kernel[(segments.rows,)](x, segments.source, out, K=x.shape[1])
    return out


def cases(recipes: tuple[Recipe, ...]) -> Iterator[tuple[str, str, float, float, bool]]:
    """Model, recipe or "bf16", milliseconds, operations in units of 1e9, and whether output and gradients fit."""
    for model, linears in EXPERTS.items():
        (_, outputs, hidden), (_, _, width) = linears
        tokens = EXPERT_ROWS // COPIES
        choice = torch.rand(tokens, EXPERT_COUNT // COPIES, device="cuda").argsort(1)[:, :1]
        routed = torch.cat([choice + i * (EXPERT_COUNT // COPIES) for i in range(COPIES)], 1)
        segments = Segments.of(routed, EXPERT_COUNT)
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        p = torch.rand(tokens, COPIES, device="cuda", requires_grad=True)
        w1, w2 = (
            (torch.randn(EXPERT_COUNT, n, k, device="cuda", dtype=torch.bfloat16) / k**0.5).requires_grad_()
            for n, k in ((outputs, hidden), (hidden, width))
        )
        dout = torch.randn_like(x)
        ends = torch.tensor([segments.span(e).stop for e in range(EXPERT_COUNT)], device="cuda", dtype=torch.int32)
        leaves = (x, p, w1, w2)
        work = 6e-9 * EXPERT_ROWS * hidden * (outputs + width)

        def bf16(x: Any = leaves, segments: Any = segments, ends: Any = ends, dout: Any = dout) -> tuple[Tensor, ...]:
            out = _Bf16Experts.apply(*x, segments, ends)
            return out.detach(), *torch.autograd.grad(out, x, dout)

        wanted = bf16()
        yield model, "bf16", milliseconds(bf16), work, True
        for recipe in recipes:

            def quantised(
                x: Any = leaves, segments: Any = segments, dout: Any = dout, recipe: Recipe = recipe
            ) -> tuple[Tensor, ...]:
                first, second = (prepare_expert_weights(w, recipe, "propagate") for w in x[2:])
                out = experts_mlp(
                    x[0], x[1], x[2], x[3], (first, second), segments, recipe, seed=1, nonfinite="propagate"
                )
                return out.detach(), *torch.autograd.grad(out, x, dout)

            # Exactness is tested; here only that nothing but quantisation noise lies between the two.
            near = all(
                bool((ours.float() - theirs.float()).norm() < 0.6 * theirs.float().norm())
                for ours, theirs in zip(quantised(), wanted, strict=True)
            )
            yield model, recipe.name, milliseconds(quantised), work, near
