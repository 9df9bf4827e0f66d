"""The experts of a MoE layer, sorted rows in and rows out, as the learner computes them, against its BF16 ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from triton.testing import do_bench

from mxdist.model.grouped_experts import grouped_linear
from mxdist.quant.backend import prepare_weight
from mxdist.quant.kernels.experts import experts_mlp
from mxdist.quant.kernels.prepared import HopperWeight
from mxdist.quant.kernels.segments import Segments
from mxdist.quant.kernels.swiglu import Swiglu
from mxdist.quant.recipe import Recipe
from tools.bench.shapes import EXPERT_COUNT, EXPERT_ROWS, EXPERTS
from tools.bench.timing import milliseconds

MANY = 64
"""Experts of a rank when 128 are divided over two: with as many rows each as in a micro-batch of 16,384 tokens."""


class _Case:
    """The experts of one rank. Weights are quantised in every step, as with one micro-batch."""

    def __init__(self, outputs: int, hidden: int, width: int, experts: int, rows: int) -> None:
        shares = torch.rand(experts).add(1.0)
        sizes = (shares / shares.sum() * rows).long()
        sizes[0] += rows - int(sizes.sum())
        self.segments = Segments.of_sizes(sizes.tolist(), torch.device("cuda"))
        self.ends = sizes.cumsum(0).to(device="cuda", dtype=torch.int32)
        self.x, self.dy = (torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.w1, self.w2 = (
            [(torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5).requires_grad_() for _ in range(experts)]
            for n, k in ((outputs, hidden), (hidden, width))
        )
        self.leaves = (self.x.requires_grad_(), *self.w1, *self.w2)
        self.work = 6e-9 * rows * hidden * (outputs + width)

    def bf16(self) -> tuple[Tensor, ...]:
        h = Swiglu.apply(grouped_linear(self.x, self.w1, self.ends))
        return self._both(grouped_linear(h, self.w2, self.ends))

    def quantised(self, recipe: Recipe) -> tuple[Tensor, ...]:
        prepared = self._prepared(self.w1, recipe), self._prepared(self.w2, recipe)
        return self._both(
            experts_mlp(self.x, self.w1, self.w2, prepared, self.segments, recipe, seed=1, nonfinite="propagate")
        )

    def _prepared(self, weights: Sequence[Tensor], recipe: Recipe) -> list[HopperWeight]:
        prepared = [prepare_weight(weight, recipe, nonfinite="propagate") for weight in weights]
        assert all(isinstance(weight, HopperWeight) for weight in prepared)
        return prepared  # type: ignore[return-value]

    def _both(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)


def cases(recipes: tuple[Recipe, ...]) -> Iterator[tuple[str, str, float, float, bool]]:
    """Model, recipe or "bf16", milliseconds, operations in units of 1e9, and whether output and gradients fit."""
    for model, linears in EXPERTS.items():
        (_, outputs, hidden), (_, _, width) = linears
        for experts, rows in ((EXPERT_COUNT, EXPERT_ROWS), (MANY, EXPERT_ROWS // 2)):
            case = _Case(outputs, hidden, width, experts, rows)
            wanted = case.bf16()
            near = {recipe.name: _are_near(case.quantised(recipe), wanted) for recipe in recipes}
            for how, measure in (("", milliseconds), (", launched by the host", _launched)):
                label = f"{model}, {experts} of {rows} rows{how}"
                yield label, "bf16", measure(case.bf16), case.work, True
                for recipe in recipes:
                    yield label, recipe.name, measure(partial(case.quantised, recipe)), case.work, near[recipe.name]


def _are_near(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    """Exactness is tested; here only that nothing but quantisation noise lies between the two."""
    pairs = zip(ours, theirs, strict=True)
    return all(bool((one.float() - other.float()).norm() < 0.6 * other.float().norm()) for one, other in pairs)


def _launched(work: Callable[[], object]) -> float:
    """Median time as the learner runs it, kernels launched one by one and not from a graph, in milliseconds."""
    return float(do_bench(work, warmup=40, rep=200, return_mode="median"))
