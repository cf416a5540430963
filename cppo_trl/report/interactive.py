"""The report's pictures as plotly figures."""

from typing import Any

import plotly.graph_objects as go

from cppo_trl.report.panels import FATE_COLOURS, FATE_WORDS, HeatMap, Line, Panel, TokenPlot

_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "height": 320,
    "margin": {"l": 60, "r": 15, "t": 10, "b": 45},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    "hovermode": "x unified",
    "font": {"family": "system-ui, sans-serif", "size": 12},
}


def panel_figure(panel: Panel) -> go.Figure:
    """Lines with their bands, or areas on top of each other."""
    figure = go.Figure(layout=_LAYOUT)
    for line in panel.lines:
        figure.add_traces(_band(line))
        figure.add_scatter(
            x=line.x,
            y=line.y,
            name=line.label,
            legendgroup=line.label,
            mode="lines",
            line={"color": line.colour, "width": 1.8, "dash": "dash" if line.dashed else "solid"},
            stackgroup="all" if panel.stacked else None,
        )
    figure.update_xaxes(title=panel.x_label)
    figure.update_yaxes(
        title=_beside(panel.y_label), rangemode="tozero", automargin=True, tickformat=".3~%" if panel.share else ".3~g"
    )
    return figure.update_layout(showlegend=len(panel.lines) > 1)


def _beside(label: str) -> dict[str, Any]:
    return {"text": label, "standoff": 12}  # clear of the ticks


def _band(line: Line) -> list[go.Scatter]:
    if line.low is None or line.high is None:
        return []
    shared = {"x": line.x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    shared["legendgroup"] = line.label
    fill = {"fill": "tonexty", "fillcolor": f"rgba{(*bytes.fromhex(line.colour[1:]), 0.15)}"}
    return [go.Scatter(y=line.high, **shared), go.Scatter(y=line.low, **shared, **fill)]


def heat_map_figure(heat_map: HeatMap) -> go.Figure:
    """A heat map of training step x relative position."""
    number = ".2%" if heat_map.share else ".3g"
    figure = go.Figure(layout={**_LAYOUT, "hovermode": "closest"})
    figure.add_heatmap(
        x=heat_map.x,
        y=heat_map.y,
        z=heat_map.z,
        zmin=0,
        zmax=heat_map.top,
        colorscale="Viridis",
        colorbar={"title": heat_map.label, "tickformat": ".2~%" if heat_map.share else ".3~g"},
        hovertemplate=f"update %{{x}}<br>position %{{y:.3f}}<br>{heat_map.label} %{{z:{number}}}<extra></extra>",
    )
    figure.update_xaxes(title="update")
    figure.update_yaxes(title=_beside("relative position in the response"), automargin=True)
    return figure


def token_figure(plot: TokenPlot) -> go.Figure:
    """What each token spends, coloured by its fate, against what it may."""
    figure = go.Figure(layout={**_LAYOUT, "hovermode": "closest", "bargap": 0.1, "height": 360})
    ends = [0.5, plot.positions + 0.5]
    if plot.delta is not None:
        dashed = {"color": "#444", "dash": "dash", "width": 1.2}
        figure.add_scatter(x=ends, y=[plot.delta] * 2, mode="lines", name=plot.delta_label, line=dashed)
    if plot.threshold is not None:
        edges = [at + 0.5 for at in range(plot.positions + 1)]
        figure.add_scatter(
            x=edges,
            y=[*plot.threshold, plot.threshold[-1]],
            mode="lines",
            name="effective threshold c_t; between it and δ, closed by the budget",
            line={"color": FATE_COLOURS["budget"], "shape": "hv", "width": 1.5},
            fill="tonexty",
            fillcolor="rgba(142, 68, 173, 0.12)",
        )
    for fate, (positions, values) in plot.bars.items():
        figure.add_bar(
            x=positions,
            y=values,
            width=1 if plot.positions > 200 else 0.85,
            name=FATE_WORDS[fate],
            marker={"color": FATE_COLOURS[fate], "line": {"width": 0.5, "color": "#8a9199"}},
            hovertemplate=f"token %{{x}}<br>{plot.value_label} %{{y:.4g}}<extra>{FATE_WORDS[fate]}</extra>",
        )
    figure.update_xaxes(title="token of the response", range=ends)
    figure.update_yaxes(title=_beside(plot.value_label), automargin=True, tickformat=".3~g", range=plot.y_range)
    return figure.update_layout(barmode="overlay")
