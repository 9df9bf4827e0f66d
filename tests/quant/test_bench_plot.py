"""The benchmark's plot: every row is a bar, and wrong rows stand out."""

import json
from pathlib import Path

from tools.bench.plot import GOOD, UNCHECKED, WRONG, figure

RESULTS = Path(__file__).parents[2] / "tools/bench/results"


def test_every_row_of_a_committed_result_is_a_bar_and_wrong_ones_are_red() -> None:
    report = json.loads((RESULTS / "2026-11-23_h200.json").read_text())
    report["rows"][0]["correct"] = False
    bars = figure(report).data
    compared = {row["table"] for row in report["rows"] if row["against_bf16"] is not None}
    assert compared == {"layers"}
    with_ratio = sum(row["table"] in compared for row in report["rows"])
    assert sum(len(each.y) for each in bars) == len(report["rows"]) + with_ratio
    colours = [colour for each in bars for colour in each.marker.color]
    assert colours.count(WRONG) == 1  # a quantiser, which has no ratio
    assert set(colours) == {GOOD, WRONG, UNCHECKED}
