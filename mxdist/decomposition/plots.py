"""The plots, in one HTML file that needs nothing else: no network, no server. Its colours suit the colour-blind too."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from mxdist.decomposition.report import Group, Report
from mxdist.decomposition.table import BASELINE, number
from mxdist.quant.moments import DELTA_BINS, DELTA_RANGE

# Okabe and Ito's palette; yellow is left out, being faint on white.
ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
BLACK, GREY = "#000000", "#999999"
CYCLE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK, GREY)
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")

PARTS = (  # name, share of the squared error, colour, dash
    ("scale", "scale", VERMILION, "solid"),
    ("deadzone", "deadzone", BLUE, "solid"),
    ("grid", "grid", GREEN, "solid"),
    ("2 ⟨scale, grid⟩", "cross_scale_grid", PURPLE, "dash"),
    ("2 ⟨scale, deadzone⟩", "cross_scale_deadzone", SKY, "dot"),
)

MOST_TICKS = 12  # of an axis of layers

CONFIG = {"displaylogo": False, "responsive": True}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: 0; } h2 { font-size: 1.15em; margin: 2em 0 .2em; } p { margin: .3em 0; }
code { background: #f3f3f3; padding: .1em .3em; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: .8em 0; } th, td { text-align: right; padding: .15em .8em; }
th { border-bottom: 1px solid #888; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
"""


def html_text(report: Report) -> str:
    """Return the page: a summary and four figures, each with what it shows."""
    sections = (
        (
            "Parts of the error, by layer",
            "Squared norms over that of the weights; with the cross terms they add up to the NMSE (black). No choice "
            "of scales changes deadzone and grid.",
            components_by_layer(report),
        ),
        (
            "Cosine of the scale and the grid part, by layer",
            "Negative: the two parts cancel in part, so that the error is smaller than their squared norms together.",
            cosines_by_layer(report),
        ),
        (
            "Scale bias",
            "How much larger than the ideal the step of a block is: &delta; = log<sub>2</sub> &gamma;. A power-of-two "
            "scale that rounds up gives 0 to 1.",
            scale_bias(report),
        ),
        (
            "Effect of each correction",
            "NMSE by kind of tensor. Diamonds: deadzone and grid alone, which a quantiser with ideal real-valued "
            "scales, one per block, would leave. The fallback adds a second term, and so gets below them.",
            effect_of_corrections(report),
        ),
    )
    body = "".join(
        f"<h2>{title}</h2><p>{text}</p>{figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)}"
        for title, text, figure in sections
    )
    path, command = html.escape(report.path), html.escape(report.command)
    total = report.total
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Quantisation error of {path}</title>'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script>"
        f"<h1>Where the quantisation error of the weights comes from</h1><p><code>{path}</code></p>"
        f"<p>{total.tensors} tensors, {total.elements:,} weights, {len(report.layers)} layers. "
        f"mxdist {html.escape(report.version)}: <code>{command}</code></p>{_summary(report)}{_warning(report)}{body}"
        f"</html>\n"
    )


def components_by_layer(report: Report) -> go.Figure:
    """Lines of the five terms of the NMSE and of the NMSE itself; one panel per recipe."""
    figure = _panels(report.names)
    layers = [int(layer.name) for layer in report.layers]
    for index, recipe in enumerate(report.names):
        panel = (index // 2 + 1, index % 2 + 1)
        figures = [layer.figures(recipe) for layer in report.layers]
        for name, key, colour, dash in PARTS:
            values = [entry[key] * entry["nmse"] for entry in figures]
            if key == "cross_scale_deadzone" and not any(abs(value) > 1e-9 for value in values):
                continue
            _add_line(figure, panel, layers, values, name, colour, dash)
        _add_line(figure, panel, layers, [entry["nmse"] for entry in figures], "NMSE", BLACK, "solid")
    figure.update_yaxes(title_text="share of ‖x‖²", col=1, tickformat=".2g")
    _layer_axis(figure, layers)
    return _finished(figure, len(report.names))


def cosines_by_layer(report: Report) -> go.Figure:
    """A line per recipe."""
    figure = go.Figure()
    layers = [int(layer.name) for layer in report.layers]
    for index, recipe in enumerate(report.names):
        values = [layer.figures(recipe)["cos_scale_grid"] for layer in report.layers]
        style = {"color": CYCLE[index % len(CYCLE)], "dash": DASHES[index % len(DASHES)]}
        symbol = SYMBOLS[index % len(SYMBOLS)]
        figure.add_scatter(
            x=layers, y=values, name=recipe, mode="lines+markers", line=style, marker={"symbol": symbol, "size": 7}
        )
    figure.update_yaxes(title_text="cosine", range=[-1, 0.02])
    _layer_axis(figure, layers)
    return _finished(figure, 1)


def scale_bias(report: Report) -> go.Figure:
    """The histogram of delta over all blocks, as a step line per recipe; and the uniform distribution on [0, 1)."""
    figure = go.Figure()
    low, high = DELTA_RANGE
    edges = [low + index * (high - low) / DELTA_BINS for index in range(DELTA_BINS + 1)]
    lowest = 0.0
    groups = [report.total] if report.total.sums is not None else [g for g in report.kinds if g.sums is not None]
    alike: dict[tuple[int, ...], list[str]] = {}  # recipes by histogram: fallback leaves the scales as they are
    for recipe in report.names:
        sums = [group.sums[recipe].histogram for group in groups if group.sums is not None]
        alike.setdefault(tuple(map(sum, zip(*sums, strict=True))), []).append(recipe)
    for index, (counts, names) in enumerate(alike.items()):
        shares = [count / (sum(counts) or 1) for count in counts]
        lowest = min([lowest, *(edge for edge, share in zip(edges, shares, strict=False) if share > 1e-4)])
        style = {"color": CYCLE[index % len(CYCLE)], "dash": DASHES[index % len(DASHES)], "shape": "hv"}
        fill = "tozeroy" if len(alike) == 1 else None
        heights = [*shares, *shares[-1:]]
        figure.add_scatter(x=edges, y=heights, name=", ".join(names), mode="lines", line=style, fill=fill)
    uniform = (high - low) / DELTA_BINS
    style = {"color": GREY, "dash": "dot", "shape": "hv"}
    figure.add_scatter(x=[0, high], y=[uniform] * 2, name="uniform on 0 to 1", mode="lines", line=style)
    figure.update_xaxes(title_text="δ = log₂ gamma, in octaves", range=[lowest - 0.02, high])
    figure.update_yaxes(title_text="share of blocks", tickformat=".0%", rangemode="tozero")
    return _finished(figure, 1)


def effect_of_corrections(report: Report) -> go.Figure:
    """Bars of NMSE, a group per kind and one for all, a colour per recipe; a diamond where ideal scales would be."""
    figure = go.Figure()
    groups = (*report.kinds, report.total)
    names = [group.name for group in groups]
    baseline = BASELINE if BASELINE in report.names else report.names[0]
    references = [group.figures(baseline)["nmse"] for group in groups]
    for index, recipe in enumerate(report.names):
        values = [group.figures(recipe)["nmse"] for group in groups]
        ratios = [
            f"{recipe}: {number('{:.3e}', value)}, {value / (reference or math.nan):.3f} of {baseline}"
            for value, reference in zip(values, references, strict=True)
        ]
        colour = CYCLE[index % len(CYCLE)]
        figure.add_bar(x=names, y=values, name=recipe, marker_color=colour, hovertext=ratios, hoverinfo="text+x")
    floor = [_ideal(group, baseline) for group in groups]
    marker = {"symbol": "diamond", "size": 9, "color": BLACK, "line": {"color": "white", "width": 1}}
    figure.add_scatter(x=names, y=floor, name="ideal scales", mode="markers", marker=marker)
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_yaxes(title_text="NMSE = ‖Q(x) - x‖² / ‖x‖²", tickformat=".1e", rangemode="tozero")
    figure.update_xaxes(title_text="kind of tensor")
    return _finished(figure, 1)


def _ideal(group: Group, recipe: str) -> float:
    figures = group.figures(recipe)
    return (figures["deadzone"] + figures["grid"]) * figures["nmse"]


def _panels(names: Sequence[str]) -> go.Figure:
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    titles = names if len(names) > 1 else ()
    spacing = {"vertical_spacing": 0.35 / rows, "horizontal_spacing": 0.06}
    return make_subplots(rows, columns, shared_yaxes="all", subplot_titles=titles, **spacing)


def _add_line(
    figure: go.Figure, panel: tuple[int, int], layers: list[int], values: list[float], name: str, colour: str, dash: str
) -> None:
    """A line in the panel (row, column); all panels share one entry of the legend."""
    seen = any(trace.name == name for trace in figure.data)
    line = go.Scatter(
        x=layers, y=values, name=name, legendgroup=name, showlegend=not seen, line={"color": colour, "dash": dash},
        mode="lines+markers", marker={"size": 5},
    )  # fmt: skip
    figure.add_trace(line, row=panel[0], col=panel[1])


def _layer_axis(figure: go.Figure, layers: list[int]) -> None:
    """Ticks on whole layers: left to itself, plotly puts several of the same name between two."""
    figure.update_xaxes(title_text="layer", tick0=0, dtick=max(1, -(-len(layers) // MOST_TICKS)))


def _finished(figure: go.Figure, panels: int) -> go.Figure:
    rows = -(-panels // 2) if panels > 1 else 1
    figure.update_layout(
        template="plotly_white",
        font={"size": 13},
        height=420 if rows == 1 else 60 + 330 * rows,
        margin={"l": 80, "r": 20, "t": 70 if panels > 1 else 50, "b": 60},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.06 if rows == 1 else 1 + 0.14 / rows, "x": 0},
    )
    return figure


def _summary(report: Report) -> str:
    """The totals as a table."""
    columns = (
        ("NMSE", "nmse", "{:.3e}"),
        ("scale", "scale", "{:.3f}"),
        ("deadzone", "deadzone", "{:.3f}"),
        ("grid", "grid", "{:.3f}"),
        ("cos(scale, grid)", "cos_scale_grid", "{:.3f}"),
        ("zeroed", "zeroed", "{:.1%}"),
        ("gain", "gain", "{:.3f}"),
        ("gamma", "gamma", "{:.3f}"),
    )
    head = "".join(f"<th>{heading}</th>" for heading, _, _ in columns)
    rows = []
    for recipe in report.names:
        figures = report.total.figures(recipe)
        cells = "".join(f"<td>{number(form, figures[key])}</td>" for _, key, form in columns)
        rows.append(f"<tr><td>{recipe}</td>{cells}</tr>")
    return f"<table><tr><th>all tensors</th>{head}</tr>{''.join(rows)}</table>"


def _warning(report: Report) -> str:
    if not report.nonfinite:
        return ""
    places = ", ".join(f"{html.escape(entry['name'])} at {entry['position']}" for entry in report.nonfinite[:10])
    count = len(report.nonfinite)
    return f"<p><b>{count} tensor(s) with NaN or Inf; nothing that includes them is drawn:</b> {places}</p>"
