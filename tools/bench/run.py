"""Measure every kernel and every linear shape on this GPU: python -m tools.bench.run [--out FILE] [--only TABLE ...]

Prints one table per kind and writes JSON with date, versions and the command; `tools.bench.plot` draws it. Needs a
Hopper GPU and Triton.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

from mxdist.quant.kernels.plan import device_lacks
from tools.bench import decoding, gemms, layers, peers, quantisers
from tools.bench.timing import Ceilings, Row, measure_ceilings

TABLES = {
    "quantisers": quantisers.rows, "gemms": gemms.rows, "layers": layers.rows, "peers": peers.rows,
    "decoding": decoding.rows,
}  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latest.json")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    arguments = parser.parse_args()
    lacking = device_lacks(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if lacking is not None:
        sys.exit(f"The benchmark needs a Hopper GPU: {lacking}.")
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: copy "
        f"{ceilings.copy:.2f} TB/s, FP8 {ceilings.fp8:.0f} and BF16 {ceilings.bf16:.0f} TFLOP/s at 8192^3"
    )
    rows: list[Row] = []
    for table in arguments.only:
        print(f"\n{table}")
        for row in TABLES[table](ceilings):
            rows.append(row)
            print(row.line(), flush=True)
        _write(arguments.out, ceilings, rows)  # after every table, should a later one fail
    for peer, reason in peers.absent.items():
        print(f"no row of {peer}: {reason}")


def _write(out: Path, ceilings: Ceilings, rows: list[Row]) -> None:
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m tools.bench.run " + " ".join(sys.argv[1:]),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_tb_per_s": ceilings.copy,
        "fp8_tflops": ceilings.fp8,
        "bf16_tflops": ceilings.bf16,
        "absent": peers.absent,
        "rows": [row.as_dict() for row in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
