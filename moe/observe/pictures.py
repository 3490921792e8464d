"""Labelled heat maps of a run's records, for trackers.  L MoE layers, E experts, N domains, R rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: layers that are drawn, evenly spaced if there are more
MAX_LAYERS = 16
#: colours of 1/4, 1 and 4 times the mean
COLD, MEAN, HOT = "#2166ac", "#f3f2ee", "#c8511b"


def pictures_of(record: dict[str, Any]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield the names and pictures of a ``train`` record (the load of experts) or an ``eval`` record (the routing)."""
    if record["kind"] == "train" and record.get("layers"):
        rows = [np.array(layer["counts"], float) for layer in record["layers"]]
        shown = _spread(len(rows))
        labels = [f"MoE layer {layer}" for layer in shown]
        yield "load", _heat_map([rows[layer] for layer in shown], labels, f"load at step {record['step']}")
    routing = {domain: layers for domain, layers in (record.get("routing") or {}).items() if layers}
    if record["kind"] == "eval" and routing:
        pairs = [(layer, domain) for layer in _spread(len(next(iter(routing.values())))) for domain in routing]
        rows = [np.array(routing[domain][layer], float) for layer, domain in pairs]
        labels = [f"MoE layer {layer}, {domain[:28]}" for layer, domain in pairs]
        yield "routing", _heat_map(rows, labels, f"routing of held-out text at step {record['step']}")


def _spread(layers: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, layers - 1, min(layers, MAX_LAYERS))})


def _heat_map(rows: Sequence[Array], labels: Sequence[str], title: str) -> NDArray[np.uint8]:
    """Draw a row for each array: an expert's value, relative to the mean of its row."""
    import matplotlib  # imported late: it takes a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ratio_RE = np.array([row / max(row.mean(), 1e-9) for row in rows])
    with matplotlib.rc_context({"text.parse_math": False}):  # domain names may contain a dollar sign
        figure = Figure(figsize=(8.0, 1.3 + 0.22 * len(rows)), dpi=100, layout="constrained")
        canvas, axes = FigureCanvasAgg(figure), figure.subplots()
        image = axes.imshow(
            np.clip(np.log2(np.maximum(ratio_RE, 1e-9)), -2, 2),
            cmap=LinearSegmentedColormap.from_list("load", [COLD, MEAN, HOT]),
            vmin=-2,
            vmax=2,
            aspect="auto",
        )
        axes.set(title=title, xlabel="expert")
        axes.set_yticks(range(len(rows)), labels)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
        bar = figure.colorbar(image, ticks=[-2, -1, 0, 1, 2])
        bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
        bar.set_label("times the mean")
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
