"""Draw a benchmark's JSON as one page: python -m tools.bench.plot tools/bench/results/latest.json

Shares of the roofline and ratios to BF16, one bar per row; rows that were wrong are red. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

GOOD, WRONG, UNCHECKED = "#3b6ea5", "#c0392b", "#9aa5b1"
FIGURES = (("roofline", "share of the roofline"), ("against_bf16", "times as fast as BF16"))


def figure(report: dict[str, Any]) -> go.Figure:
    """One column of bars for each of FIGURES, one row of plots for each table."""
    tables = list(dict.fromkeys(row["table"] for row in report["rows"]))
    by_table = {table: [row for row in report["rows"] if row["table"] == table][::-1] for table in tables}
    sizes = [len(rows) for rows in by_table.values()]
    there = [any(row[key] is not None for row in rows) for rows in by_table.values() for key, _ in FIGURES]
    titles = [f"{table}: {text}" for table in tables for _, text in FIGURES]
    titles = [title if has else "" for title, has in zip(titles, there, strict=True)]
    plots = make_subplots(
        len(tables), len(FIGURES), row_heights=sizes, shared_yaxes=True, subplot_titles=titles,
        vertical_spacing=40 / (22 * sum(sizes)), horizontal_spacing=0.02,
    )  # fmt: skip
    for at, rows in enumerate(by_table.values(), start=1):
        colours = [{True: GOOD, False: WRONG}.get(row["correct"], UNCHECKED) for row in rows]
        for column, (key, _) in enumerate(FIGURES, start=1):
            if all(row[key] is None for row in rows):  # nothing to compare with
                plots.update_xaxes(visible=False, row=at, col=column)
                plots.update_yaxes(visible=False, row=at, col=column)
                continue
            bars = go.Bar(x=[row[key] for row in rows], y=[row["name"] for row in rows], orientation="h")
            plots.add_trace(bars.update(marker={"color": colours}), row=at, col=column)
            plots.add_vline(1.0, line={"dash": "dot", "width": 1}, row=at, col=column)
    heading = f"{report['gpu']}, {report['date']}, torch {report['torch']}, triton {report['triton']}"
    return plots.update_layout(title=heading, height=22 * sum(sizes) + 200, showlegend=False)


def main() -> None:
    """Write the page beside the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    source = parser.parse_args().report
    target = source.with_suffix(".html")
    figure(json.loads(source.read_text())).write_html(target, include_plotlyjs=True)
    print(target)


if __name__ == "__main__":
    main()
