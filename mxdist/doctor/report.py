"""What doctor shows: a line for each finding, the memory table and its verdict; or the same as JSON."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mxdist.config.schema import Config
from mxdist.doctor.findings import Finding, Status
from mxdist.doctor.fit import GIB, Fit
from mxdist.doctor.memory import ProcessMemory, kv_bytes_per_token, sync_bytes

MARKS: dict[Status, str] = {"ok": "ok", "warning": "warning", "would fail": "FAIL"}
INDENT = 9
NARROWEST, WIDEST = 60, 120


@dataclass(frozen=True)
class Estimate:
    """The memory of a configuration's processes, and whether they fit."""

    processes: Sequence[ProcessMemory]
    kv_tokens: int  # for which an engine's cache has room
    sync_bytes: int
    fit: Fit

    @classmethod
    def of(cls, config: Config, processes: Sequence[ProcessMemory], fit: Fit) -> "Estimate":
        kv_tokens = config.rollout.kv_cache_mib * 2**20 // kv_bytes_per_token(config)
        return cls(processes, kv_tokens, sync_bytes(config), fit)

    def to_dict(self) -> dict[str, object]:
        """All sizes in bytes."""
        return {
            "processes": [
                {"name": process.name, "count": process.count, "total": process.total, "items": process.items}
                for process in self.processes
            ],
            "kv_cache_tokens": self.kv_tokens,
            "weight_sync": self.sync_bytes,
            "device": {"name": self.fit.device.name, "bytes": self.fit.device.bytes, "usable": self.fit.device.usable},
            "fullest_device": {"holds": self.fit.load.in_words, "bytes": self.fit.load.total},
            "fits": self.fit.fits,
            "lever": self.fit.lever,
        }


def show(findings: Sequence[Finding], estimate: Estimate | None, stream: TextIO, width: int, here: bool = True) -> None:
    """Plain text of at most ``width`` columns, kept between 60 and 120.

    Args:
        here: this machine was looked at, and not only whether the run fits on a named GPU.
    """
    width = min(max(width, NARROWEST), WIDEST)
    for finding in findings:
        for line in lines_of(finding, width):
            print(line, file=stream)
    if estimate is not None:
        print(file=stream)
        table = StringIO()
        Console(file=table, width=width, highlight=False, color_system=None).print(_table(estimate))
        print("\n".join(line.rstrip() for line in table.getvalue().splitlines()).strip("\n"), file=stream)
        print(file=stream)
        for text in _below(estimate):
            print(textwrap.fill(text, width), file=stream)
    print(file=stream)
    failing = sum(finding.status == "would fail" for finding in findings)
    would_not, would = ("would not start here", "ready") if here else ("would not start", "it fits")
    verdict = f"{would_not}: {failing} to mend" if failing else would
    print(verdict, file=stream, flush=True)


def lines_of(finding: Finding, width: int) -> list[str]:
    """The finding, wrapped; its fix on a line of its own."""
    gap = " " * INDENT
    text = f"{MARKS[finding.status]:<{INDENT}}{finding.subject}: {finding.text}"
    lines = textwrap.wrap(text, width, subsequent_indent=gap, break_long_words=False, break_on_hyphens=False)
    if finding.fix:
        lines += textwrap.wrap(
            f"-> {finding.fix}",
            width,
            initial_indent=gap,
            subsequent_indent=gap + "   ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _table(estimate: Estimate) -> Table:
    """One column for each kind of process; of several pipeline stages the fullest."""
    stages = [process for process in estimate.processes if process.name != "rollout engine"]
    shown = [max(stages, key=lambda stage: stage.total)]
    shown += [process for process in estimate.processes if process.name == "rollout engine"]
    table = Table("GiB at the worst moment", box=SIMPLE_HEAD, pad_edge=False)
    for process in shown:
        table.add_column(f"{process.name} (x{process.count})", justify="right")
    for item in dict.fromkeys(item for process in shown for item in process.items):
        if any(process.items.get(item) for process in shown):
            table.add_row(item, *(_gib(process.items.get(item)) for process in shown))
    table.add_row("together", *(_gib(process.total) for process in shown))
    return table


def _below(estimate: Estimate) -> list[str]:
    return [
        f"An engine's KV cache has room for {estimate.kv_tokens:,} tokens. A weight sync takes "
        f"{estimate.sync_bytes / GIB:.2f} GiB of host memory.",
    ]


def _gib(size: int | None) -> str:
    if not size:
        return "-"
    return f"{size / GIB:.3f}" if size < GIB else f"{size / GIB:.1f}"


def as_json(findings: Sequence[Finding], estimate: Estimate | None) -> str:
    """An object of ``ready``, ``findings`` and ``memory`` (bytes; null without a configuration)."""
    found = {
        "ready": all(finding.status != "would fail" for finding in findings),
        "findings": [finding.to_dict() for finding in findings],
        "memory": estimate.to_dict() if estimate else None,
    }
    return json.dumps(found, indent=2)
