"""What the fused quantisers of experts write equals quantising the produced values, expert by expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

import triton
import triton.language as tl

from mxdist.quant.kernels.forms import Form
from mxdist.quant.kernels.nonfinite import Flag
from mxdist.quant.kernels.options import Random, options_of
from mxdist.quant.kernels.permute import gather_rows, sum_copies
from mxdist.quant.kernels.quant_experts import ROWS_THERE, SWIGLU, Wanted, quantise_experts, swiglu
from mxdist.quant.kernels.quant_tiles import quantise_tiles
from mxdist.quant.kernels.segments import Segments
from mxdist.quant.kernels.swiglu import swiglu_backward
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Macro, Operand
from mxdist.quant.reference import fake_quantise
from tests.quant.kernels.data import DEVICE, matrix
from tests.quant.kernels.test_quantisers import assert_same

PLAIN = Operand()
TOKENS, EXPERTS, K = 150, 4, 128


@triton.jit
def _swiglu_kernel(gate, up, p, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    tl.store(out + i, swiglu(tl.load(gate + i), tl.load(up + i), tl.load(p + i)))


def routed() -> Segments:
    """Two copies of each token; expert 2 has none, and some copies go elsewhere."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.stack([torch.randperm(EXPERTS + 1, generator=generator)[:2] for _ in range(TOKENS)])
    return Segments.of(experts.masked_fill(experts == 2, -1).to(DEVICE), EXPERTS)


def wanted(operand: Operand) -> Wanted:
    return Wanted(options_of(operand), Random.of(Draw(7), 0, operand.rounding == "stochastic"))


def check(segments: Segments, produced: Tensor, row: object, column: object, operands: tuple[Operand, Operand]) -> None:
    """Compare both orientations of every expert with the reference on produced values [rows, K]."""
    for expert, size in enumerate(segments.sizes):
        part = produced[segments.span(expert)][:size]
        for got, operand, values in ((row, operands[0], part), (column, operands[1], part.t())):
            if got is None or not size:
                continue
            values_q = got.expert(segments, expert).dequantise()
            values_q = values_q[:size] if got is row else values_q[:, :size]
            assert_same(values_q, fake_quantise(values, operand, seed=7 + expert))


def test_every_copy_has_one_row_and_every_expert_whole_tiles() -> None:
    segments = routed()
    assert segments.sizes[2] == 0
    assert segments.rows == 128 * sum(segments.tiles) >= sum(segments.sizes)
    row = segments.slots[segments.slots >= 0].long()
    assert len(row.unique()) == len(row) == sum(segments.sizes)
    token = torch.arange(TOKENS, device=DEVICE).repeat_interleave(2).view(-1, 2)[segments.slots >= 0]
    assert torch.equal(segments.source[row].long(), token)
    values = torch.rand(TOKENS, 2, device=DEVICE)
    assert torch.equal(segments.collect(segments.spread(values)), values * (segments.slots >= 0))


@pytest.mark.parametrize("row", [PLAIN, Operand(macro=Macro()), Operand(rounding="stochastic")], ids=str)
def test_gathered_rows_are_quantised_along_both_axes(row: Operand) -> None:
    segments, x = routed(), matrix(TOKENS, K)
    column = Operand(rounding=row.rounding)
    flag = Flag(x.device, "error")
    rows, columns = quantise_experts(x, segments, row=wanted(row), column=wanted(column), flag=flag)
    produced = x[segments.source.clamp(min=0).long()]
    check(segments, produced, rows, columns, (row, column))
    if row is PLAIN:
        produced = produced * (segments.source >= 0)[:, None]  # rows that fill up are zeros
        rows, squares = quantise_experts(
            produced, segments, source=ROWS_THERE, row=wanted(row), column=wanted(column), column_form=Form.SQUARE,
            flag=flag,
        )  # fmt: skip
        check(segments, produced, rows, squares, (row, column))


def test_copied_bytes_equal_quantised_copies() -> None:
    segments, x = routed(), matrix(TOKENS, K)
    copied = gather_rows(quantise_tiles(x, PLAIN)[0], segments)
    check(segments, x[segments.source.clamp(min=0).long()], copied, None, (PLAIN, PLAIN))
    filling = segments.source < 0
    assert filling.any()
    assert not copied.data.float()[filling].any()


def test_swiglu_is_quantised_as_it_is_produced() -> None:
    segments = routed()
    n = segments.rows
    h, p = matrix(n, 2 * K, seed=1), torch.rand(n, device=DEVICE) * (segments.source >= 0)
    gate, up = h[:, :K].float().contiguous(), h[:, K:].float().contiguous()
    produced, spread = torch.empty_like(gate), p[:, None].expand(n, K).contiguous()
    for i in range(0, n * K, 4096):
        _swiglu_kernel[(1,)](*(v.view(-1)[i:] for v in (gate, up, spread, produced)), N=4096)
    torch.testing.assert_close(produced, torch.nn.functional.silu(gate) * up * p[:, None], rtol=1e-4, atol=1e-6)
    rows, columns = quantise_experts(
        h, segments, source=SWIGLU, probabilities=p, row=wanted(PLAIN), column=wanted(PLAIN),
        flag=Flag(h.device, "error"),
    )  # fmt: skip
    check(segments, produced, rows, columns, (PLAIN, PLAIN))


def test_the_gradients_of_swiglu_are_those_of_autograd() -> None:
    h, p, gradient = matrix(40, 2 * K, seed=1), torch.rand(40, device=DEVICE), matrix(40, K, seed=2)
    leaves = [h.double().requires_grad_(), p.double().requires_grad_()]
    a = torch.nn.functional.silu(leaves[0][:, :K]) * leaves[0][:, K:] * leaves[1][:, None]
    wanted_h, wanted_p = torch.autograd.grad(a, leaves, gradient.double())
    by_h, by_p = swiglu_backward(gradient, h, p)
    torch.testing.assert_close(by_h.double(), wanted_h, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(by_p.double(), wanted_p, rtol=1e-4, atol=1e-4)


def test_the_copies_of_a_token_add_up() -> None:
    segments = routed()
    rows = matrix(segments.rows, K)
    padded = torch.cat((rows.float(), torch.zeros(1, K, device=DEVICE)))
    wanted_sum = padded[segments.slots.long()].sum(1)
    torch.testing.assert_close(sum_copies(rows, segments).float(), wanted_sum, rtol=1e-2, atol=1e-6)
