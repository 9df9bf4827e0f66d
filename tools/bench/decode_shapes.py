"""Time the ways to cut products with packed weights, for `decode_halves.shape_of` and `decode_tiles.tile_shape_of`.

    python -m tools.bench.decode_shapes [--recipe mxfp4] [--batches 1 8 16 32 64 128 256]

Prints a line per linear of Qwen2.5-3B, batch and cut, then the fastest beside BF16. Every product comes behind a norm
of x, as in a model, and the norm's time alone is taken off; microseconds include quantising x, and go round copies of W
that the L2 cache does not hold. Cuts are compiled by several processes first; all of it takes some minutes. Needs a
Hopper GPU and Triton.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from mxdist.quant.format import TILE
from mxdist.quant.kernels import quant_terms
from mxdist.quant.kernels.decode_halves import Shape, multiply_halves, shape_of
from mxdist.quant.kernels.decode_tiles import TileShape, multiply_tiles, tile_shape_of
from mxdist.quant.kernels.groups import tile_height
from mxdist.quant.kernels.options import DECODE_ROWS, runs_in_tiles
from mxdist.quant.kernels.packed import Source
from mxdist.quant.recipe import get_recipe
from mxdist.quant.tensor import MXTensor, part_shapes
from tools.bench.shapes import LINEARS
from tools.bench.timing import is_rounding_only

BATCHES = (1, 8, 16, 32, 64, 128, 256)
# Width, depth, warps, shares, stages of 16-bit products, by the rows of a program.
FORMS = {
    8: ((64, 256, 4, 4, 4), (64, 512, 4, 4, 3), (64, 256, 8, 4, 4), (32, 256, 4, 2, 4), (32, 512, 4, 2, 4),
        (32, 256, 2, 2, 6), (128, 256, 8, 8, 3), (16, 512, 4, 1, 4), (16, 512, 2, 1, 6)),
    32: ((64, 128, 4, 4, 4), (128, 128, 8, 8, 3), (64, 256, 8, 4, 3), (32, 128, 4, 2, 4), (64, 256, 4, 4, 3),
         (32, 128, 2, 2, 6)),
}  # fmt: skip
# Width, warps, stages, tiles of a step of products in FP8, by the rows of a program.
TILE_FORMS = {
    16: ((64, 4, 3, 2), (64, 4, 4, 2), (64, 4, 2, 4), (64, 4, 3, 4), (128, 4, 3, 2)),
    32: ((64, 4, 3, 2), (64, 4, 4, 2), (64, 4, 2, 4), (64, 4, 3, 4), (128, 4, 3, 2)),
    64: ((64, 4, 3, 2), (64, 4, 2, 2), (64, 4, 3, 1), (64, 4, 5, 2)),
    128: ((128, 8, 3, 2), (64, 4, 2, 2), (64, 4, 3, 1)),
}
PROGRAMS = (1.0, 2.5)
"""Programs for a multiprocessor that splitting aims at."""
MULTIPROCESSORS = 132
_COPIES_BYTES = 120_000_000

Case = tuple[int, int, int, str, Shape | TileShape]
"""Outputs, inputs, batch, recipe, cut."""


def shapes(outputs: int, inputs: int, batch: int, recipe: str) -> list[Shape | TileShape]:
    """Cuts worth trying, without doubles, the present choice of each kernel first."""
    operands, found = get_recipe(recipe), list[Shape | TileShape]()
    assert operands.w is not None
    if batch <= DECODE_ROWS:
        found += _half_shapes(outputs, inputs, batch, operands.w.fallback is not None)
    if runs_in_tiles(operands.w, inputs, operands.x_fwd):
        found += _tile_shapes(outputs, inputs, batch)
    return list(dict.fromkeys(found))


def _half_shapes(outputs: int, inputs: int, batch: int, residual: bool) -> Iterator[Shape]:
    height = tile_height(batch)
    yield shape_of(height, outputs, inputs, 1, MULTIPROCESSORS, residual)
    for width, depth, warps, shares, stages in FORMS[8 if height <= 16 else 32]:
        for split in _splits(triton.cdiv(outputs, width), inputs // depth):
            for ahead in (False, True):
                yield Shape(width, depth, warps, shares, stages, split, ahead)


def _tile_shapes(outputs: int, inputs: int, batch: int) -> Iterator[TileShape]:
    present = tile_shape_of(batch, outputs, inputs // TILE, MULTIPROCESSORS)
    yield present
    for height in {present.height, 128} if batch > 64 else {present.height}:
        for width, warps, stages, group in TILE_FORMS[height]:
            for split in _splits(triton.cdiv(outputs, width) * triton.cdiv(batch, height), inputs // TILE // 2):
                yield TileShape(height, width, warps, stages, group, split)


def _splits(programs: int, most: int) -> list[int]:
    return [max(1, min(round(each * MULTIPROCESSORS / programs), most)) for each in PROGRAMS]


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


def _multiply(x: Tensor, weight: MXTensor, recipe: str, shape: Shape | TileShape) -> Tensor:
    operand = get_recipe(recipe).x_fwd
    if isinstance(shape, TileShape):
        assert operand is not None
        return multiply_tiles(x, weight, None, operand, shape)
    return multiply_halves(x, Source.of(weight), weight.shape[0], tile_height(len(x)), None, None, operand, shape)


def behind_norm(x: Tensor, weights: Sequence[Any], multiply: Callable[[Tensor, Any], object]) -> float:
    """Microseconds that products of x with each of the weights add to norms of x."""

    def work(multiply: Callable[[Tensor, Any], object] | None) -> None:
        for weight in weights:
            normed = rms_norm(x, x.shape[1:])
            if multiply is not None:
                multiply(normed, weight)

    return microseconds(partial(work, multiply), len(weights)) - microseconds(partial(work, None), len(weights))


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
    compiled = {case: (*case[:2], max(case[2], 8), *case[3:]) for case in cases}
    distinct = list(dict.fromkeys(compiled.values()))
    reasons = dict(zip(distinct, pool.map(compile_case, distinct, chunksize=2), strict=True))
    for case, reason in reasons.items():
        if reason is not None:
            print("cannot run:", case, reason[:200])
    return [case for case in cases if reasons[compiled[case]] is None]


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
            for _ in range(max(4, _COPIES_BYTES // packed.nbytes))
        ]
        for batch in dict.fromkeys(case[2] for case in cases):
            x = torch.randn(batch, inputs, device="cuda", dtype=torch.bfloat16)
            x_q = quant_terms.fake_quantise(x, operands.x_fwd, nonfinite="propagate")
            wanted = x_q.double() @ packed.dequantise().double().t()
            for case in [case for case in cases if case[:4] == (outputs, inputs, batch, recipe)]:
                right = is_rounding_only(_multiply(x, packed, recipe, case[4]), wanted)
                times[case] = behind_norm(x, copies, partial(_multiply, recipe=recipe, shape=case[4]))
                flag = "" if right else "WRONG"
                print(f"[{outputs}, {inputs}] {batch:3}: {times[case]:6.2f} {case[4]} {flag}", flush=True)
    return times


def _bf16(outputs: int, inputs: int, batch: int) -> float:
    """Microseconds of the BF16 product."""
    w = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    copies = [w.clone() for _ in range(max(4, _COPIES_BYTES // w.nbytes))]
    x = torch.randn(batch, inputs, device="cuda", dtype=torch.bfloat16)
    return behind_norm(x, copies, linear)


def main() -> None:
    """Time every cut; print the fastest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mxfp4")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    arguments = parser.parse_args()
    recipe, batches = arguments.recipe, arguments.batches
    products = [(*linear[1:], batch, recipe) for linear in LINEARS["Qwen2.5-3B"] for batch in batches]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(14, (os.cpu_count() or 2) - 1)), context) as pool:
        times = measure(prepared(pool, [(*product, cut) for product in products for cut in shapes(*product)]))
    totals, plain = dict.fromkeys(batches, 0.0), dict.fromkeys(batches, 0.0)
    for product in products:
        outputs, inputs, batch, _ = product
        best_case = min((case for case in times if case[:4] == product), key=lambda case: times[case])
        bf16 = _bf16(outputs, inputs, batch)
        totals[batch] += times[best_case]
        plain[batch] += bf16
        print(f"best of {product}: {times[best_case]:.2f} us, BF16 {bf16:.2f} us: {best_case[4]}")
    for name, total in ((f"{recipe}, a layer's best together", totals), ("BF16", plain)):
        print(f"{name}:", {batch: round(each, 1) for batch, each in total.items()}, "us")


if __name__ == "__main__":
    main()
