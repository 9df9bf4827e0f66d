"""Time the ways to cut products of few rows, to choose `decode_halves.shape_of`: python -m tools.bench.decode_shapes

Prints a line per linear of Qwen2.5-3B, batch and cut, then the fastest; microseconds include quantising x. Cuts are
compiled by several processes first; all of it takes about a minute. Needs a Hopper GPU and Triton.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import triton
from torch import Tensor

from mxdist.quant.kernels import quant_terms
from mxdist.quant.kernels.decode_halves import Shape, multiply_halves, shape_of
from mxdist.quant.kernels.groups import tile_height
from mxdist.quant.kernels.packed import Source
from mxdist.quant.kernels.quant_halves import quantise_halves
from mxdist.quant.recipe import Operand, get_recipe
from mxdist.quant.tensor import MXTensor, part_shapes
from tools.bench.shapes import LINEARS
from tools.bench.timing import is_rounding_only

BATCHES = (1, 8, 32)
# Width, depth, warps, shares, stages.
FORMS = {
    8: ((64, 256, 4, 4, 4), (64, 512, 4, 4, 3), (64, 256, 8, 4, 4), (32, 256, 4, 2, 4), (32, 512, 4, 2, 4),
        (32, 256, 2, 2, 6), (128, 256, 8, 8, 3), (16, 512, 4, 1, 4), (16, 512, 2, 1, 6)),
    32: ((64, 128, 4, 4, 4), (128, 128, 8, 8, 3), (64, 256, 8, 4, 3), (32, 128, 4, 2, 4), (64, 256, 4, 4, 3),
         (32, 128, 2, 2, 6)),
}  # fmt: skip
PROGRAMS = (1.0, 2.5)
"""Programs for a multiprocessor that splitting aims at."""
MULTIPROCESSORS = 132
_COPIES_BYTES = 120_000_000
_CALLS = 50

Case = tuple[int, int, int, str, Shape]
"""Outputs, inputs, batch, recipe, cut."""


def shapes(outputs: int, inputs: int, batch: int, recipe: str) -> list[Shape]:
    """Cuts worth trying, without doubles, the present choice first."""
    height = tile_height(batch)
    operand = get_recipe(recipe).w
    residual = operand is not None and operand.fallback is not None
    found = [shape_of(height, outputs, inputs, 1, MULTIPROCESSORS, residual)]
    for width, depth, warps, shares, stages in FORMS[8 if height <= 16 else 32]:
        columns = triton.cdiv(outputs, width)
        for programs in PROGRAMS:
            split = max(1, min(round(programs * MULTIPROCESSORS / columns), inputs // depth))
            found.append(Shape(width, depth, warps, shares, stages, split))
    return list(dict.fromkeys(found))


def compile_case(case: Case) -> str | None:
    """Run a case once on zeros, for what it leaves in Triton's cache; the reason when it cannot run."""
    outputs, inputs, batch, recipe, shape = case
    operand = get_recipe(recipe).w
    assert operand is not None
    parts = {
        key: torch.zeros(size, dtype=torch.uint8, device="cuda")
        for key, size in part_shapes((outputs, inputs), operand).items()
    }
    x = torch.zeros(batch, inputs, dtype=torch.bfloat16, device="cuda")
    try:
        _multiply(x, MXTensor.from_parts(parts, (outputs, inputs), operand), recipe, shape)
        torch.cuda.synchronize()
    except Exception as error:
        return repr(error)  # shared memory that does not suffice, registers, an unsupported launch
    return None


def _multiply(x: Tensor, weight: MXTensor, recipe: str, shape: Shape) -> Tensor:
    operand = get_recipe(recipe).x_fwd
    return multiply_halves(x, Source.of(weight), weight.shape[0], tile_height(len(x)), None, None, operand, shape)


def _multiply_each(x: Tensor, weights: list[MXTensor], recipe: str, shape: Shape) -> None:
    for weight in weights:
        _multiply(x, weight, recipe, shape)


def _quantise(x: Tensor, operand: Operand) -> None:
    for _ in range(_CALLS):
        quantise_halves(x, operand, x.shape[1])


def microseconds(work: Callable[[], object], calls: int) -> float:
    """Median time of one of the `calls` calls that `work` makes, replayed as a CUDA graph."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(9):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / calls)
    return median(times)


def prepared(pool: Executor, cases: list[Case]) -> list[Case]:
    """The cases that run, compiled; says of others why not."""
    # One row and eight run the same code.
    compiled = list({(*case[:2], max(case[2], BATCHES[1]), *case[3:]): None for case in cases})
    reasons = dict(zip(compiled, pool.map(compile_case, compiled, chunksize=2), strict=True))
    for case, reason in reasons.items():
        if reason is not None:
            print("cannot run:", case, reason[:200])
    return [case for case in cases if reasons[(*case[:2], max(case[2], BATCHES[1]), *case[3:])] is None]


def measure(cases: list[Case]) -> dict[Case, float]:
    """Microseconds of every case; prints them."""
    times: dict[Case, float] = {}
    for outputs, inputs, recipe in dict.fromkeys((case[0], case[1], case[3]) for case in cases):
        operands = get_recipe(recipe)
        assert operands.w is not None
        assert operands.x_fwd is not None
        w = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.02
        packed = quant_terms.quantise(w, operands.w, nonfinite="propagate")
        copies = [
            MXTensor.from_parts({key: part.clone() for key, part in packed.parts().items()}, packed.shape, operands.w)
            for _ in range(max(2, _COPIES_BYTES // packed.nbytes))
        ]
        for batch in BATCHES:
            x = torch.randn(batch, inputs, device="cuda", dtype=torch.bfloat16)
            x_q = quant_terms.fake_quantise(x, operands.x_fwd, nonfinite="propagate")
            wanted = x_q.double() @ packed.dequantise().double().t()
            alone = microseconds(partial(_quantise, x, operands.x_fwd), _CALLS)
            print(f"[{outputs}, {inputs}] batch {batch}: quantising x alone {alone:.2f} us")
            for case in [case for case in cases if case[:4] == (outputs, inputs, batch, recipe)]:
                cut = case[4]
                right = is_rounding_only(_multiply(x, packed, recipe, cut), wanted)
                times[case] = microseconds(partial(_multiply_each, x, copies, recipe, cut), len(copies))
                numbers = (
                    f"{cut.width:3} {cut.depth:3} {cut.warps:2} {cut.shares} {cut.stages} {cut.split:2} {cut.ahead}"
                )
                print(
                    f"[{outputs}, {inputs}] {batch:2}: {numbers} {times[case]:6.2f} {'' if right else 'WRONG'}",
                    flush=True,
                )
    return times


def main() -> None:
    """Time every cut, then the best two of each product started ahead; print the fastest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mxfp4")
    recipe = parser.parse_args().recipe
    products = [(*linear[1:], batch, recipe) for linear in LINEARS["Qwen2.5-3B"] for batch in BATCHES]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(14, (os.cpu_count() or 2) - 1)), context) as pool:
        times = measure(prepared(pool, [(*product, cut) for product in products for cut in shapes(*product)]))
        ahead = []
        for product in products:
            best = sorted((case for case in times if case[:4] == product), key=lambda case: times[case])[:2]
            ahead += [(*product, replace(case[4], ahead=how)) for case in best for how in (1, 2)]
        times |= measure(prepared(pool, ahead))
    totals = dict.fromkeys(BATCHES, 0.0)
    for product in products:
        best_case = min((case for case in times if case[:4] == product), key=lambda case: times[case])
        totals[product[2]] += times[best_case]
        print(f"best of {product}: {best_case[4]} {times[best_case]:.2f} us")
    print(f"{recipe}, a layer's best together:", {batch: round(total, 1) for batch, total in totals.items()}, "us")


if __name__ == "__main__":
    main()
