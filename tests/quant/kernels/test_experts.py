"""Experts, interpreted: what the fused quantisers write is the reference's, and so is what the whole computes."""

from __future__ import annotations

from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from mxdist.quant.kernels.experts import experts_mlp, fused_experts_lack
from mxdist.quant.kernels.forms import Form
from mxdist.quant.kernels.gemm import right
from mxdist.quant.kernels.nonfinite import Flag
from mxdist.quant.kernels.options import Random, options_of
from mxdist.quant.kernels.permute import without_filling
from mxdist.quant.kernels.plan import plan
from mxdist.quant.kernels.prepared import HopperWeight, prepare_weight
from mxdist.quant.kernels.quant_experts import ROWS_THERE, SWIGLU, Wanted, quantise_experts
from mxdist.quant.kernels.segments import ByColumn, ByRow, Segments
from mxdist.quant.kernels.swiglu import Swiglu, swiglu_backward
from mxdist.quant.linear import mx_linear
from mxdist.quant.philox import Draw
from mxdist.quant.recipe import Macro, Operand, Recipe, get_recipe
from mxdist.quant.reference import fake_quantise, quantise
from tests.quant.kernels.data import DEVICE, matrix
from tests.quant.kernels.test_quantisers import assert_same

PLAIN = Operand()
K = 128
SIZES = (150, 1, 0, 129)
"""Rows of each expert: one of them has one, one none."""
NEAREST = get_recipe("mxfp4_g4_nearest")
MACRO = Recipe("macro", Operand(macro=Macro()), PLAIN, Operand(macro=Macro()), PLAIN, PLAIN)


def arranged() -> Segments:
    return Segments.of_sizes(SIZES, DEVICE)


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


def filled_up(rows: Tensor, segments: Segments) -> Tensor:
    return rows[segments.source.clamp(min=0).long()] * (segments.source >= 0)[:, None]


def test_every_row_has_a_place_and_every_expert_whole_tiles() -> None:
    segments = arranged()
    assert (segments.sizes, segments.tiles, segments.first) == (SIZES, (2, 1, 0, 2), (0, 2, 3, 3))
    assert segments.rows == 128 * 5
    assert segments.table.tolist() == [
        [0, 2, 0, 0, 150], [0, 2, 0, 0, 150], [2, 1, 4, 1, 1], [3, 2, 8, 3, 129], [3, 2, 8, 3, 129]
    ]  # fmt: skip
    rows = torch.arange(sum(SIZES), dtype=torch.int32, device=DEVICE)
    assert torch.equal(segments.source[segments.slots.long()], rows)
    assert int((segments.source >= 0).sum()) == sum(SIZES)
    starts = [segments.slots[start].item() for start in (0, 150, 151)]
    assert starts == [segments.span(expert).start for expert in (0, 1, 3)]


def test_operands_made_for_all_experts_are_those_of_each() -> None:
    segments = arranged()
    by_row, columns = ByRow.empty(segments, 256), ByColumn.empty(segments, 256, Form.TILE, rotated=False)
    squares = ByColumn.empty(segments, 256, Form.SQUARE, rotated=False)
    for each in (by_row, columns, squares):
        each.data.view(torch.uint8).copy_(torch.arange(each.data.numel()).view(each.data.shape) % 120)
        each.scale.copy_(torch.arange(each.scale.numel()))
    for e, size in enumerate(SIZES):
        if size:
            lefts = (by_row.lefts(segments)[e], by_row), (columns.lefts(segments)[e], columns)
            for got, of in lefts:
                alone = of.expert(segments, e)
                assert torch.equal(got.data.view(torch.uint8), alone.data.view(torch.uint8))
                assert torch.equal(got.scale[0], alone.scale)
                assert got.scale[0].stride() == alone.scale.stride()
            got, wanted = squares.rights(segments)[e], right(squares.expert(segments, e))
            assert torch.equal(got.data.view(torch.uint8), wanted.data.view(torch.uint8))
            assert torch.equal(got.scale[0], wanted.scale[0])
            assert got.scale[0].stride() == wanted.scale[0].stride()


@pytest.mark.parametrize("row", [PLAIN, Operand(macro=Macro()), Operand(rounding="stochastic")], ids=str)
def test_rows_are_quantised_along_both_axes(row: Operand) -> None:
    segments, x = arranged(), matrix(sum(SIZES), K)
    column = Operand(rounding=row.rounding)
    flag = Flag(x.device, "error")
    rows, columns = quantise_experts(x, segments, row=wanted(row), column=wanted(column), flag=flag)
    produced = filled_up(x, segments)
    check(segments, produced, rows, columns, (row, column))
    assert not rows.data.float()[segments.source < 0].any()
    if row is PLAIN:
        rows, squares = quantise_experts(
            produced, segments, source=ROWS_THERE, row=wanted(row), column=wanted(column), column_form=Form.SQUARE,
            flag=flag,
        )  # fmt: skip
        check(segments, produced, rows, squares, (row, column))


def test_swiglu_is_quantised_as_bfloat16_would_hold_it() -> None:
    segments = arranged()
    h = filled_up(matrix(sum(SIZES), 2 * K, seed=1), segments)
    produced = Swiglu.apply(h)
    eager = F.silu(h[:, :K]) * h[:, K:]
    assert (produced != eager).float().mean() < 1e-3  # where exp() differs in a last bit
    torch.testing.assert_close(produced, eager, rtol=1.6e-2, atol=0)
    rows, columns = quantise_experts(
        h, segments, source=SWIGLU, row=wanted(PLAIN), column=wanted(PLAIN), flag=Flag(h.device, "error")
    )
    check(segments, produced, rows, columns, (PLAIN, PLAIN))


@pytest.mark.parametrize("width", [K, 1300])
def test_swiglu_and_its_gradient_are_those_of_autograd(width: int) -> None:
    h, gradient = matrix(7, 2 * width, seed=1), matrix(7, width, seed=2)
    leaf = h.double().requires_grad_()
    produced = F.silu(leaf[:, :width]) * leaf[:, width:]
    (by_h,) = torch.autograd.grad(produced, leaf, gradient.double())
    torch.testing.assert_close(Swiglu.apply(h).double(), produced.detach(), rtol=1.6e-2, atol=1e-6)
    torch.testing.assert_close(swiglu_backward(gradient, h).double(), by_h, rtol=1e-2, atol=1e-6)


def test_filling_is_left_out_again() -> None:
    segments, x = arranged(), matrix(sum(SIZES), K)
    assert torch.equal(without_filling(filled_up(x, segments), segments), x)


class Case:
    """Weights, rows and a gradient of some experts."""

    def __init__(self, recipe: Recipe, sizes: tuple[int, ...] = SIZES, hidden: int = K, width: int = K) -> None:
        self.recipe, self.sizes = recipe, sizes
        self.w1 = [matrix(2 * width, hidden, seed=e) / hidden**0.5 for e in range(len(sizes))]
        self.w2 = [matrix(hidden, width, seed=e + 9) / width**0.5 for e in range(len(sizes))]
        self.x, self.dy = matrix(sum(sizes), hidden, seed=20), matrix(sum(sizes), hidden, seed=21)
        self.leaves = [t.requires_grad_() for t in (self.x, *self.w1, *self.w2)]

    @cached_property
    def prepared(self) -> tuple[list[HopperWeight], ...]:
        return tuple(
            [prepare_weight(w.detach(), self.recipe, plan(self.recipe, *w.shape)) for w in layer]
            for layer in (self.w1, self.w2)
        )

    def fused(self, **settings: object) -> list[Tensor]:
        segments = Segments.of_sizes(self.sizes, DEVICE)
        y = experts_mlp(self.x, self.w1, self.w2, self.prepared, segments, self.recipe, **settings)
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy, allow_unused=True)]

    def one_by_one(self) -> list[Tensor]:
        """The loop of the reference; it rounds to bfloat16 where the fused ones do, SwiGLU's gradient once."""
        parts = []
        for x, w1, w2 in zip(torch.split(self.x, self.sizes), self.w1, self.w2, strict=True):
            values = [quantise(w, self.recipe.w).dequantise() for w in (w1, w2)]
            h = mx_linear(x.float(), w1.float(), values[0], self.recipe).bfloat16()
            parts.append(mx_linear(Swiglu.apply(h).float(), w2.float(), values[1], self.recipe).bfloat16())
        y = torch.cat(parts)
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)]


def assert_near(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for index, (got, expected) in enumerate(zip(ours, theirs, strict=True)):
        # Both round to bfloat16; a last bit before a quantiser moves a value by a step of its grid now and then.
        assert (got.double() - expected.double()).norm() <= 2e-2 * expected.double().norm() + 1e-12, index


@pytest.mark.parametrize("recipe", [NEAREST, MACRO], ids=lambda recipe: recipe.name)
def test_output_and_all_gradients_are_those_of_experts_one_by_one(recipe: Recipe) -> None:
    case = Case(recipe)
    ours = case.fused()
    assert_near(ours, case.one_by_one())
    empty = SIZES.index(0)
    assert not ours[2 + empty].any()
    assert not ours[2 + len(SIZES) + empty].any()


def test_gradients_of_weights_are_added_to_totals_when_there_are_any() -> None:
    case = Case(NEAREST, (3, 0))
    plain = case.fused()
    totals = tuple([torch.ones(w.shape, device=DEVICE) for w in layer] for layer in (case.w1, case.w2))
    added = case.fused(totals=totals)
    assert torch.equal(added[1], plain[1])
    assert all(gradient is None for gradient in added[2:])
    for total, gradient in zip([*totals[0], *totals[1]], plain[2:], strict=True):
        torch.testing.assert_close(total, 1 + gradient.float())


def test_without_gradients_the_output_is_the_same() -> None:
    case = Case(NEAREST, (3, 0))
    with torch.no_grad():
        y = experts_mlp(case.x, case.w1, case.w2, case.prepared, Segments.of_sizes((3, 0), DEVICE), NEAREST)
    assert torch.equal(y, case.fused()[0])


def test_random_rounding_is_seeded() -> None:
    case = Case(get_recipe("mxfp4_g4"), (3,))
    one, again, other = (case.fused(seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[2], other[2])
    nearest = Case(NEAREST, (3,)).fused()
    assert all((a - b).norm() < 0.5 * b.norm() for a, b in zip(one, nearest, strict=True))  # only quantisation noise
    with pytest.raises(ValueError, match="needs a seed"):
        case.fused()


def test_a_nan_is_named_or_propagates() -> None:
    case = Case(NEAREST, (3,))
    case.x.data[1, 5] = torch.nan
    with pytest.raises(ValueError, match=r"expert input .* at position \(1, 5\)"):
        case.fused()
    if DEVICE.type == "cpu":
        return  # the interpreter's E4M3 has no NaN
    y = case.fused(nonfinite="propagate")[0]
    assert y[1].isnan().all()
    assert y[torch.arange(3, device=DEVICE) != 1].isfinite().all()


@pytest.mark.parametrize(
    ("recipe", "dtype", "why"),
    [
        ("mxfp4", torch.bfloat16, "keeps dY"),
        ("mxfp4_mbs_g4", torch.bfloat16, "macro factors"),
        ("mxfp4_g4", torch.float32, "bfloat16"),
    ],
)
def test_what_the_fused_experts_do_not_do_is_said(recipe: str, dtype: torch.dtype, why: str) -> None:
    chosen = get_recipe(recipe)
    weight = prepare_weight(matrix(128, 128), chosen, plan(chosen, 128, 128))
    assert why in str(fused_experts_lack([weight], chosen, dtype))
    fits = prepare_weight(matrix(128, 128), NEAREST, plan(NEAREST, 128, 128))
    assert fused_experts_lack([fits], NEAREST, torch.bfloat16) is None
    assert "no FP8 operands" in str(fused_experts_lack([fits, torch.ones(2)], NEAREST, torch.bfloat16))
