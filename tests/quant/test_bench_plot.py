"""The benchmark's plot: every row is a bar, and wrong rows stand out."""

import json
from pathlib import Path

from tools.bench.plot import FIGURES, GOOD, UNCHECKED, WRONG, figure

RESULTS = Path(__file__).parents[2] / "tools/bench/results"


def test_every_row_of_a_committed_result_is_a_bar_and_wrong_ones_are_red() -> None:
    report = json.loads((RESULTS / "2026-11-22_h200_evening.json").read_text())
    report["rows"][0]["correct"] = False
    bars = figure(report).data
    assert sum(len(each.y) for each in bars) == len(FIGURES) * len(report["rows"])
    colours = [colour for each in bars for colour in each.marker.color]
    assert colours.count(WRONG) == len(FIGURES)
    assert set(colours) == {GOOD, WRONG, UNCHECKED}
