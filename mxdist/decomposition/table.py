"""The tables of the terminal. They fit its width: what does not is left out, the less important first, and named."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from mxdist.decomposition.report import Report

BASELINE = "mxfp4"
"""The recipe that others are compared with, when it is among them."""

WIDE, NARROW = (0, 1, 0, 0), (0, 0, 0, 0)
"""Padding of cells; the table adds a space itself."""

_TENSORS_NAMED = 3


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, the figure it shows, how, and what is left out first (the highest)."""

    heading: str
    figure: str
    form: str
    leave_out: int


COLUMNS = (
    Column("scale", "scale", "{:.3f}", 0),
    Column("deadzone", "deadzone", "{:.3f}", 0),
    Column("grid", "grid", "{:.3f}", 0),
    Column("cos", "cos_scale_grid", "{:.3f}", 0),
    Column("cross", "cross_scale_deadzone", "{:.3f}", 1),
    Column("zeroed", "zeroed", "{:.1%}", 2),
    Column("gain", "gain", "{:.3f}", 4),
    Column("NMSE", "nmse", "{:.3e}", 0),
    Column("gamma", "gamma", "{:.3f}", 3),
)

LEGEND = (
    "scale, deadzone, grid: squared norms of the error's parts / that of the error",
    "cos: cosine of the scale and grid parts; their cross term completes the sum to 1",
    "cross: 2 <scale, deadzone> / squared norm of the error, the other cross term",
    "zeroed: weights that become 0; gain: <x, Q(x)> / <x, x>; gamma: scale / ideal",
    "NMSE: squared norm of the error / that of the weights",
)


def show(report: Report, console: Console) -> None:
    """Print all tables of a report, and what was left out of them."""
    total = report.total
    layers = f"{len(report.layers)} layer{'s' if len(report.layers) > 1 else ''}"
    tensors = f"{total.tensors} of {total.tensors + len(report.left)} tensors"
    _print(console, f"{report.path}: {tensors}, {_count(total.elements)} weights in {layers}")
    crosses = False
    for recipe in report.names:
        _print(console, "")
        _print(console, recipe, style="bold")
        columns = _columns(report, recipe)
        crosses = crosses or any(column.heading == "cross" for column in columns)
        _show_fitting(report, recipe, columns, console)
    _print(console, "")
    for line in LEGEND:
        if crosses or not line.startswith("cross"):
            _print(console, line, style="dim")
    if len(report.names) > 1:
        _show_comparison(report, console)
    _show_notes(report, console)


def _columns(report: Report, recipe: str) -> list[Column]:
    """All columns, but the cross term only where it is not zero."""
    values = (group.figures(recipe)["cross_scale_deadzone"] for group in (*report.kinds, report.total))
    crosses = any(abs(value) >= 5e-4 for value in values if math.isfinite(value))
    return [column for column in COLUMNS if crosses or column.heading != "cross"]


def _show_fitting(report: Report, recipe: str, columns: list[Column], console: Console) -> None:
    rows = (*report.kinds, report.total)
    dropped: list[str] = []
    while True:
        table = _table([column.heading for column in columns])
        for group in rows:
            figures = group.figures(recipe)
            cells = (number(column.form, figures[column.figure]) for column in columns)
            table.add_row(group.name, *cells, style="bold" if group is report.total else "")
        candidates = [column for column in columns if column.leave_out]
        if not candidates or _fits(table, console, WIDE) or _fits(table, console, NARROW):
            break
        last = max(candidates, key=lambda column: column.leave_out)
        columns = [column for column in columns if column is not last]
        dropped.append(last.heading)
    console.print(table)
    if dropped:
        _print(console, f"(not shown at this width: {', '.join(dropped)})", style="dim")


def _show_comparison(report: Report, console: Console) -> None:
    """NMSE of every recipe side by side, with its ratio to the baseline's; in several tables if they are too many."""
    compares = BASELINE in report.names
    _print(console, "")
    _print(console, f"NMSE{' and its ratio to that of ' + BASELINE if compares else ''}", style="bold")
    waiting = list(report.names)
    while waiting:
        choices = [(count, short) for count in range(len(waiting), 0, -1) for short in (False, True)]
        for count, short in choices:
            table = _comparison(report, waiting[:count], compares, short)
            if _fits(table, console, WIDE) or _fits(table, console, NARROW):
                break
        console.print(table)
        waiting = waiting[count:]


def _comparison(report: Report, recipes: Sequence[str], compares: bool, short: bool) -> Table:
    table = _table(recipes)
    for group in (*report.kinds, report.total):
        cells = []
        for recipe in recipes:
            nmse = group.figures(recipe)["nmse"]
            cell = number("{:.3e}", nmse)
            if compares:
                ratio = number("{:.3f}", nmse / (group.figures(BASELINE)["nmse"] or math.nan))
                cell = ratio if short and recipe != BASELINE else f"{cell} {ratio}" if not short else cell
            cells.append(cell)
        table.add_row(group.name, *cells, style="bold" if group is report.total else "")
    return table


def _show_notes(report: Report, console: Console) -> None:
    _print(console, "")
    reasons = Counter(entry["reason"] for entry in report.left)
    if reasons:
        listed = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        _print(console, f"Left in high precision: {listed}.")
    for reason in ("integer", "complex", "8-bit float"):
        names = [entry["name"] for entry in report.left if entry["reason"] == reason]
        if names:
            shown = ", ".join(names[:_TENSORS_NAMED]) + (", ..." if len(names) > _TENSORS_NAMED else "")
            _print(console, f"Skipped, for {reason} tensors cannot be quantised: {shown}.")
    for entry in report.nonfinite:
        _print(console, f"Not finite: {entry['name']} holds {entry['value']} at {entry['position']}.", style="bold")


def _table(headings: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=WIDE, pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _fits(table: Table, console: Console, gap: tuple[int, int, int, int]) -> bool:
    """Whether the table fits with this padding of its cells; sets it."""
    table.padding = gap
    wide = console.options.update(max_width=10_000, width=10_000)
    return table.__rich_measure__(console, wide).maximum <= console.width


def _print(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False)


def number(form: str, value: float) -> str:
    """Format a figure as short as it can be: 1.335e-2, not 1.335e-02; "nan" where there is none."""
    text = form.format(value)
    mantissa, mark, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if mark and math.isfinite(value) else text.replace("nan%", "nan")


def _count(elements: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if elements >= unit:
            return f"{elements / unit:.3g} {name}"
    return str(elements)
