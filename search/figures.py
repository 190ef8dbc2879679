"""The plots of a report, made of plain records: what a run's files hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from search.words import CONTROLS
from supernet.config import si

Record = Mapping[str, Any]

# Okabe and Ito's colours, which colour-blind readers tell apart.
FOUND, UNIFORM, PROGRAM, RANDOM, QUIET = "#0b84d8", "#8a929c", "#e69f00", "#009e73", "#56b4e9"
BITS = [[0.0, "#7a1f5c"], [0.35, "#c2477f"], [0.65, "#5a9bd4"], [1.0, "#1f4e79"]]
MARKS = {
    "uniform": (UNIFORM, "square-open"),
    "integer_program": (PROGRAM, "diamond-open"),
    "random_search": (RANDOM, "triangle-up-open"),
}


def front(found: Sequence[Record], kind: str, unit: str, points: Sequence[Record] = ()) -> go.Figure:
    """Measured accuracy over cost: winners, what they have to beat, and behind them what the search went over.

    Args:
        found: records of front.json's `subnets` that have a limit of `kind`.
        kind, unit: the cost on the x axis.
        points: records of front.json's `front` whose predicted score is an accuracy.
    """
    figure = go.Figure()
    spots = [(p["costs"][kind], 100 * p["predicted"]) for p in points if kind in p["costs"]]
    faint = {"color": QUIET, "size": 4, "opacity": 0.45}
    if spots:
        figure.add_scatter(**_xy(spots), name="predicted, not measured", mode="markers", marker=faint)
    _measured(figure, found, kind, "searched", {"color": FOUND, "size": 11}, "lines+markers")
    for name, (color, symbol) in MARKS.items():
        beaten = [{**f, **f["controls"][name]} for f in found if name in f["controls"]]
        marker = {"color": color, "symbol": symbol, "size": 15, "line": {"width": 2}}
        _measured(figure, beaten, kind, CONTROLS[name][0], marker, "markers")
    costs = [cost for trace in figure.data for cost in trace.x]
    marks = _marks(min(costs), max(costs)) if costs else []
    names = [si(mark).replace(" ", "") for mark in marks]
    figure.update_xaxes(title=f"{kind} ({unit})", type="log", tickvals=marks, ticktext=names)
    figure.update_yaxes(title="accuracy on select (%)")
    return _plain(figure)


def _marks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from just below `low` to just above `high`."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low / 2 <= m * 10.0**p <= high * 2]


def _measured(figure: go.Figure, records: Sequence[Record], kind: str, name: str, marker: Record, mode: str) -> None:
    """A trace of the records that were measured, with everything that is known of each where one points at it."""
    ordered = sorted((r for r in records if r["measured"] is not None), key=lambda r: r["costs"][kind])
    if ordered:
        spots = [(r["costs"][kind], 100 * r["measured"]) for r in ordered]
        figure.add_scatter(
            **_xy(spots),
            name=name,
            mode=mode,
            marker=marker,
            line={"width": 1.5},
            text=[_said(r) for r in ordered],
            hoverinfo="text+name",
        )


def _said(record: Record) -> str:
    predicted = record["predicted"]
    lines = [f"<b>{record['label']}</b> {record['id']}", f"measured {record['measured']:.2%}"]
    if predicted["std"]:
        lines.append(f"predicted {predicted['mean']:.2%} ± {predicted['std']:.2%}")
    return "<br>".join([*lines, *(f"{name} {si(value)}" for name, value in record["costs"].items())])


def layer_bits(subnets: Sequence[Record], names: Sequence[str]) -> go.Figure:
    """Bits of weights and inputs of every layer, a row for each subnet; empty where the layer does not run.

    Args:
        subnets: records of subnets/<id>.json, with `label` and `layers`.
        names: of the layers, in order of execution.
    """
    titles = ("weights", "inputs")
    figure = make_subplots(rows=2, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.12)
    for row, what in enumerate(("weight_bits", "input_bits"), 1):
        tables = [{layer["name"]: layer[what] for layer in s["layers"]} for s in subnets]
        figure.add_heatmap(
            z=[[table.get(name) for name in names] for table in tables],
            x=names,
            y=[s["label"] for s in subnets],
            row=row,
            col=1,
            zmin=2,
            zmax=8,
            colorscale=BITS,
            xgap=2,
            ygap=2,
            texttemplate="%{z}",
            textfont={"color": "white", "size": 11},
            hovertemplate="%{y} %{x}: %{z} bits<extra></extra>",
            showscale=False,
        )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(tickangle=-60, type="category")
    return _plain(figure, height=180 + 2 * 34 * len(subnets) + 9 * max(map(len, names), default=0))


def predicted(points: Sequence[Record]) -> go.Figure:
    """Predicted over measured score of held-out pairs, each with its standard deviation."""
    figure = go.Figure()
    ends = [100 * v for p in points for v in (p["measured"], p["predicted"])]
    line = [min(ends, default=0), max(ends, default=100)]
    figure.add_scatter(
        x=line, y=line, mode="lines", name="equal", line={"color": UNIFORM, "dash": "dot"}, hoverinfo="skip"
    )
    figure.add_scatter(
        x=[100 * p["measured"] for p in points],
        y=[100 * p["predicted"] for p in points],
        error_y={"array": [100 * p["std"] for p in points], "thickness": 1, "width": 0, "color": QUIET},
        mode="markers",
        name="held-out subnet",
        marker={"color": FOUND, "size": 7},
        hovertemplate="measured %{x:.2f} %<br>predicted %{y:.2f} %<extra></extra>",
    )
    figure.update_xaxes(title="measured accuracy (%)")
    figure.update_yaxes(title="predicted accuracy (%)")
    return _plain(figure)


def curves(rows: Sequence[Record], prefix: str, title: str, factor: float = 1.0) -> go.Figure:
    """One line for each column of metrics.csv that starts with `prefix`, over the training step."""
    figure = go.Figure()
    for name in sorted({key for row in rows for key in row if key.startswith(prefix)}):
        spots = [(float(row["step"]), factor * float(row[name])) for row in rows if row.get(name)]
        figure.add_scatter(
            **_xy(spots), mode="lines+markers", name=_curve(name.removeprefix(prefix)), marker={"size": 4}
        )
    figure.update_xaxes(title="step")
    figure.update_yaxes(title=title)
    return _plain(figure, height=320)


def _curve(rest: str) -> str:
    """Name of a curve: `loss_0` is of the subnet that a step runs first; what has no rest is the mean."""
    return {"": "mean"}.get(rest, f"subnet {int(rest[1:]) + 1} of the step" if rest[:1] == "_" else rest)


def _xy(spots: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
    return {"x": [x for x, _ in spots], "y": [y for _, y in spots]}


def _plain(figure: go.Figure, height: int = 420) -> go.Figure:
    """No background of its own (the page has light and dark), a legend below, little margin: for phones too."""
    return (
        figure.update_layout(
            template="none",
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            height=height,
            margin={"l": 64, "r": 12, "t": 28, "b": 90},
            legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
            font={"family": "system-ui, sans-serif", "size": 13},
            hovermode="closest",
        )
        .update_xaxes(gridcolor="#e2e6eb", zeroline=False, automargin=True)
        .update_yaxes(gridcolor="#e2e6eb", zeroline=False, automargin=True)
    )


def html(figure: go.Figure, name: str) -> str:
    """The figure as a part of a page that has plotly already; `name` becomes the id of its element."""
    options = {"responsive": True, "displayModeBar": False}
    part = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=options, default_width="100%")
    return f'<div class="plot">{part}</div>'
