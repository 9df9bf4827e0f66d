"""Products of few rows, as decoding has them: packed weights against BF16, for batches of 1 to 32.

Each time goes round copies of a weight that together exceed the L2 cache several times over: a model's other layers
would have pushed it out. Figures count the bytes of the weight that the recipe needs, or of BF16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxdist.quant.kernels import decode, quant_terms
from mxdist.quant.kernels.packed import expand
from mxdist.quant.recipe import Recipe, get_recipe
from mxdist.quant.tensor import MXTensor
from tools.bench.shapes import LINEARS
from tools.bench.timing import Ceilings, Row, is_rounding_only, milliseconds

BATCHES = (1, 2, 4, 8, 16, 32)
RECIPES = ("mxfp4", "mxfp4_mbs", "mxfp4_mbs_of")
EXPERTS, TOP_K = 128, 8
EXPERT_LINEARS = (("gate_up", 1536, 2048), ("down", 2048, 768))
_COPIES_BYTES = 300_000_000


def rows(ceilings: Ceilings) -> Iterator[Row]:
    """Every linear with every recipe and batch, then all linears of a layer together, then experts."""
    totals: dict[tuple[int, str], list[float]] = {}
    for name, outputs, inputs in LINEARS["Qwen2.5-3B"]:
        w = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.02
        for batch in BATCHES:
            x = torch.randn(batch, inputs, device="cuda", dtype=torch.bfloat16)
            label = f"Qwen2.5-3B {name} [{outputs}, {inputs}], batch {batch}"
            for row in _linear(ceilings, label, x, w):
                totals.setdefault((batch, row.name.rsplit(", ", 1)[1]), []).append(row.milliseconds)
                yield row
    for (batch, kind), times in totals.items():
        bf16 = sum(totals[batch, "bf16"])
        elapsed = sum(times)
        yield Row("decoding", f"Qwen2.5-3B layer, batch {batch}, {kind}", elapsed, 0.0, "", 0.0, bf16 / elapsed, None)
    for name, outputs, inputs in EXPERT_LINEARS:
        for batch in BATCHES:
            yield from _experts(ceilings, f"Qwen3-30B-A3B experts {name}, batch {batch}", batch, outputs, inputs)


def _linear(ceilings: Ceilings, label: str, x: Tensor, w: Tensor) -> Iterator[Row]:
    plain = [w.clone() for _ in range(_copies(w.nbytes))]
    bf16 = _each(lambda weight: x @ weight.t(), plain)
    yield _row(ceilings, f"{label}, bf16", bf16, w.nbytes, bf16, None)
    for name in RECIPES:
        recipe = get_recipe(name)
        packed, copies = _operands(recipe, w)
        elapsed = _each(partial(_multiply, recipe, x), copies)
        wanted = _quantised(recipe, x).double() @ packed.dequantise().double().t()
        correct = is_rounding_only(_multiply(recipe, x, packed), wanted)
        yield _row(ceilings, f"{label}, {name} with quantising x", elapsed, packed.nbytes, bf16, correct)


def _experts(ceilings: Ceilings, label: str, batch: int, outputs: int, inputs: int) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(batch)
    chosen = torch.rand(batch, EXPERTS, generator=generator).topk(TOP_K).indices.flatten()
    sizes = torch.bincount(chosen, minlength=EXPERTS)
    offsets = sizes.cumsum(0).to(device="cuda", dtype=torch.int32)
    used = int((sizes > 0).sum()) / EXPERTS  # share of the weights that must be read
    x = torch.randn(batch * TOP_K, inputs, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(EXPERTS * outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.02
    plain = [w.clone().view(EXPERTS, outputs, inputs).transpose(1, 2) for _ in range(_copies(w.nbytes * used))]
    bf16 = _each(lambda weight: torch._grouped_mm(x, weight, offs=offsets), plain)
    del plain
    yield _row(ceilings, f"{label}, bf16 grouped", bf16, w.nbytes * used, bf16, None)
    groups = decode.Groups.from_counts(sizes.to(x.device), len(x))
    for name in RECIPES:
        recipe = get_recipe(name)
        packed, copies = _operands(recipe, w, used)
        elapsed = _each(partial(_multiply_experts, recipe, x, groups), copies)
        values = packed.dequantise().view(EXPERTS, outputs, inputs)
        parts = _quantised(recipe, x).split(sizes.tolist())
        wanted = torch.cat([part.double() @ values[e].double().t() for e, part in enumerate(parts) if len(part)])
        correct = is_rounding_only(_multiply_experts(recipe, x, groups, packed), wanted)
        yield _row(ceilings, f"{label}, {name} with quantising x", elapsed, packed.nbytes * used, bf16, correct)


def _operands(recipe: Recipe, w: Tensor, used: float = 1.0) -> tuple[MXTensor, list[MXTensor]]:
    """W packed, and copies of it, of which a share is read at a time."""
    assert recipe.w is not None
    packed = quant_terms.quantise(w, recipe.w, nonfinite="propagate")
    if not torch.equal(expand(packed, w.dtype), packed.dequantise(w.dtype)):
        raise RuntimeError(f"packed weights of {recipe.name} are read wrongly on this GPU")
    parts = packed.parts()
    copies = [
        MXTensor.from_parts({key: part.clone() for key, part in parts.items()}, packed.shape, packed.operand)
        for _ in range(_copies(packed.nbytes * used))
    ]
    return packed, copies


def _quantised(recipe: Recipe, x: Tensor) -> Tensor:
    assert recipe.x_fwd is not None
    return quant_terms.fake_quantise(x, recipe.x_fwd, nonfinite="propagate")


def _multiply(recipe: Recipe, x: Tensor, weight: MXTensor) -> Tensor:
    return decode.multiply(x, weight, operand=recipe.x_fwd)


def _multiply_experts(recipe: Recipe, x: Tensor, groups: decode.Groups, weight: MXTensor) -> Tensor:
    return decode.multiply_experts(x, weight, groups, recipe.x_fwd)


def _copies(size: float) -> int:
    return max(1, int(_COPIES_BYTES // size))


def _each(work: Callable[[Any], Tensor], weights: Sequence[Any]) -> float:
    """Milliseconds of `work` on one of `weights`."""
    return milliseconds(lambda: [work(weight) for weight in weights]) / len(weights)


def _row(ceilings: Ceilings, label: str, elapsed: float, size: float, bf16: float, correct: bool | None) -> Row:
    speed = size / elapsed / 1e9
    return Row("decoding", label, elapsed, speed, "TB/s", speed / ceilings.copy, bf16 / elapsed, correct)
