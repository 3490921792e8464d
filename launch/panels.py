"""Panels of a report: small figures in SVG, which a page shows in one or more columns.

Their colours are variables of the page, so that one drawing serves light and dark screens.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .records import Array

WIDTH, HEIGHT = 4.2, 2.8  # of a panel in inches, without its legend
LEGEND_ROW, LEGEND_LETTERS = 0.2, 56  # height of a legend's row in inches, and letters that fit into it
MAX_POINTS = 200  # of a line; more are averaged in groups
MAX_LAYERS = 8  # that are drawn, evenly spaced if there are more
COLORS = ("#3b7dd8", "#e08a2e", "#2fa36b", "#c0529f", "#8468d6", "#cf4a41", "#1fa0b0", "#98912f")

#: colours that differ between light and dark screens: in the drawing -> (name of the variable, light, dark)
TEXT, FAINT, GRID, ON = "#24292f", "#8a929b", "#e3e6ea", "#fffffe"
VARIABLES = {
    TEXT: ("text", "#24292f", "#dfe3e8"),
    FAINT: ("faint", "#7b838c", "#8b949e"),
    GRID: ("grid", "#e3e6ea", "#30363d"),
    ON: ("on", "#ffffff", "#0d1117"),  # text on a strong colour of a heat map
}
#: heat-map colours for 1/4, 1 and 4 times the mean; dark screens invert them, see the page
COLD, MEAN, HOT = "#2166ac", "#f3f2ee", "#c8511b"
HEAT = LinearSegmentedColormap.from_list("load", [COLD, MEAN, HOT])
#: of things in an order: colours that can be seen on light and on dark screens
ORDER = LinearSegmentedColormap.from_list("order", ["#4a6fd8", "#2a9d9a", "#6fa82f", "#d99a20", "#d0503f"])
AMOUNT = LinearSegmentedColormap.from_list("amount", [MEAN, HOT])

RC: dict[Any, Any] = {
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), FAINT),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), TEXT),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLORS),
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "text.parse_math": False,  # domain names may contain a dollar sign
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "svg.hashsalt": "equimoe",
    "savefig.dpi": 96,  # of heat maps
}


@dataclass(frozen=True)
class Drawn:
    """The panels of a figure, and what they show in words."""

    panels: list[Figure]
    text: str
    #: whether the page explains the colours of heat maps
    heat: bool = False


#: draws a figure of one run, or returns a sentence that says why there is nothing to draw
Draw = Callable[[Any], Drawn | str]


@dataclass(frozen=True)
class Plot:
    """One figure of a page: its id, its heading, a caption that says what to look for, and its drawing function."""

    id: str
    title: str
    caption: str
    draw: Draw


def new_panel(height: float = HEIGHT) -> Axes:
    """Return the axes of a new panel."""
    return Figure(figsize=(WIDTH, height), layout="constrained").subplots()


def figure_of(axes: Axes) -> Figure:
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def draw_line(axes: Axes, x: Array, y: Array, **options: Any) -> None:
    """Draw a line, with dots if there are few points."""
    x, y = thinned(x, y)
    axes.plot(x, y, marker="o" if len(x) < 3 else None, markersize=4, **options)


def thinned(x: Array, y: Array) -> tuple[Array, Array]:
    """Return at most MAX_POINTS points: means of equally many neighbours, ignoring NaN."""
    group = math.ceil(len(x) / MAX_POINTS)
    if group < 2:
        return x, y
    starts = np.arange(0, len(x), group)
    finite = np.isfinite(y)
    count = np.add.reduceat(finite.astype(float), starts)
    total = np.add.reduceat(np.where(finite, y, 0.0), starts)
    ends = np.append(starts[1:], len(x)) - 1
    return x[ends], np.where(count > 0, total / np.maximum(count, 1), math.nan)


def shade(place: int, of: int) -> Any:
    """Return the colour of one of several ordered things, such as layers."""
    return ORDER(place / max(1, of - 1))


def spread(layers: int, most: int = MAX_LAYERS) -> list[int]:
    """Return at most ``most`` layers, evenly spaced."""
    return sorted({round(i) for i in np.linspace(0, layers - 1, min(layers, most))})


def begin_at(axes: Axes, bottom: float = 0.0) -> None:
    """Begin the y axis at ``bottom``, with room for a dot at the highest value."""
    top = axes.get_ylim()[1]
    axes.set_ylim(bottom, top + 0.05 * max(top - bottom, 0.0))


def finish(axes: Axes, title: str = "", label: str = "", xlabel: str = "step") -> Figure:
    """Label a panel, put its legend below, where it covers nothing, and return the panel."""
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(title=title, ylabel=label, xlabel=xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=xlabel != "tokens"))
    figure, (handles, labels) = figure_of(axes), axes.get_legend_handles_labels()
    if handles:
        columns = max(1, min(len(labels), LEGEND_LETTERS // (max(map(len, labels)) + 6)))
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, columnspacing=1.2, handlelength=1.6)
    return figure


def log_axis(axes: Axes) -> None:
    """Use a logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def edges_of(steps_N: Array, starts: Sequence[int] | Array) -> Array:
    """Return the borders of the columns of a heat map whose groups of records begin at ``starts``."""
    first = steps_N[0] - (steps_N[1] - steps_N[0] if len(steps_N) > 1 else 1)
    return np.array([first, *steps_N])[[*starts, len(steps_N)]]


# ---- to HTML


def draw(plot: Plot, run: Any) -> Drawn | str:
    """Draw a figure in the style of the page."""
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # domain names may use any script
        return plot.draw(run)


def figure_html(plot: Plot, drawn: Drawn) -> str:
    """Return a figure with its panels."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        panels = "".join(f"<div>{_svg(panel)}</div>" for panel in drawn.panels)
    words = "from 1/4 of the mean, or less, to 4 times the mean, or more"
    scale = f'<p class="scale"><i></i>{words}</p>' if drawn.heat else ""
    wide = ' class="wide"' if len(drawn.panels) > 1 else ""
    pairs = " pairs" if len(drawn.panels) in (2, 4) else ""
    return (
        f'<figure id="{plot.id}"{wide}><h2>{plot.title}</h2>'
        f'<div class="panels{pairs}" role="img" aria-label="{html.escape(drawn.text)}">{panels}</div>'
        f"{scale}<figcaption>{plot.caption}</figcaption></figure>"
    )


#: parts of matplotlib's SVG that change nothing on the page
NEEDLESS = [
    re.compile(part)
    for part in (
        r"font-family: [^;\"]*; ",
        r' id="[a-zA-Z.]+2?d?_[\d.]+"',
        r' transform="rotate\(-0 [^"]*"',
        r"(?<=>)\s+(?=<)",
    )
]


def _svg(panel: Figure) -> str:
    out = io.StringIO()
    with matplotlib.rc_context(RC):
        panel.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
    text = re.sub(r' d="([^"]*)"', lambda path: f' d="{_short(path[1])}"', text)
    for needless in NEEDLESS:
        text = needless.sub("", text)
    for colour, (name, _, _) in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def _short(path: str) -> str:
    """Round the coordinates of a path to a twentieth of a pixel, and write it in one line."""
    return re.sub(r"\s+", " ", re.sub(r"(\d+\.\d)\d+", r"\1", path)).strip()
