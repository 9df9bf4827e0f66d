"""Times, ceilings and the rows that the benchmark prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

from mxdist.quant.kernels.forms import Form, empty_tiles
from mxdist.quant.kernels.gemm import matmul


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table.

    value, unit   TB/s or TFLOP/s; bytes and operations that the work must move and do, not those a kernel happens to
    roofline      value over the ceiling measured in this run
    against_bf16  time of BF16 over this time, None where there is no BF16 counterpart
    correct       compared with float64 of the reference's values; None where nothing is computed that could be
    """

    table: str
    name: str
    milliseconds: float
    value: float
    unit: str
    roofline: float
    against_bf16: float | None
    correct: bool | None

    def line(self) -> str:
        """The row as text."""
        ratio = "" if self.against_bf16 is None else f"{self.against_bf16:6.2f}x"
        flag = {True: "ok", False: "WRONG", None: ""}[self.correct]
        return (
            f"{self.name:64} {self.milliseconds:9.3f} ms {self.value:8.2f} {self.unit:8} {self.roofline:5.2f} "
            f"{ratio:>7} {flag}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The row for JSON."""
        return asdict(self)


def milliseconds(work: Callable[[], object], budget: int = 60) -> float:
    """Median time of replays of `work` captured in a CUDA graph; `budget` is how long to measure, in milliseconds."""
    work()
    return float(do_bench_cudagraph(work, rep=budget, return_mode="median"))


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this GPU does in this run: copy in TB/s (read plus written), FP8 and BF16 GEMMs in TFLOP/s."""

    copy: float
    fp8: float
    bf16: float


def measure_ceilings() -> Ceilings:
    """Copy 4 GiB; multiply 8192 x 8192 x 8192 with MXFP4-valued FP8 operands and with BF16 Gaussians."""
    copy = max(_copy_speed(1 << 32) for _ in range(2))
    n = 8192
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    operand = empty_tiles(n, n, Form.ROW, a.device)
    operand.data.copy_((a.float().clamp(-6, 6) * 2).round() / 2 * 32)
    operand.scale.fill_(1.0)
    work = 2e-9 * n**3
    return Ceilings(copy, work / milliseconds(lambda: matmul(operand, operand)), work / milliseconds(lambda: a @ a.t()))


def _copy_speed(size: int) -> float:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # Not in a graph: there a copy becomes a node for the slower copy engines.
    return 2 * size / float(do_bench(lambda: target.copy_(source), rep=200, return_mode="median")) / 1e9


def is_rounding_only(out: Tensor, wanted: Tensor) -> bool:
    """True when the error against `wanted` float64 is at most 1.05 times that of rounding `wanted` to out's dtype."""
    rounding = (wanted.to(out.dtype).double() - wanted).norm()
    if out.dtype == torch.float32:  # the accumulator's own bits: a thousandth of bfloat16's rounding
        rounding = (wanted.bfloat16().double() - wanted).norm() / 1000
    return bool((out.double() - wanted).norm() <= 1.05 * rounding)
