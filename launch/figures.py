"""Reads the records of a run and draws the main figures of its report.

Shapes: N records, L MoE layers, E experts, D domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..moe.observe.metrics import METRICS_FILE, Record, read_records
from ..moe.observe.printable import printable

Array = NDArray[np.float64]

MAX_COLUMNS = 300  # columns of a heat map; more records are summed in groups
MAX_PANELS = 8  # layers that are drawn, evenly spaced if there are more
COLORS = ("#3b7dd8", "#e08a2e", "#2fa36b", "#c0529f", "#8468d6", "#cf4a41", "#1fa0b0", "#98912f")


@dataclass(frozen=True)
class Style:
    """A set of colours: the report has one for light and one for dark screens."""

    text: str
    faint: str
    grid: str
    #: heat-map colours for 1/4, 1 and 4 times the mean
    cold: str
    mean: str
    hot: str
    #: text on a cold or hot background
    on_color: str

    def rc(self) -> dict[Any, Any]:
        quiet = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), self.faint)
        words = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), self.text)
        labels = dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), self.text)
        clear = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none")
        rest = {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": cycler(color=COLORS),
            "grid.color": self.grid,
            "legend.frameon": False,
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "text.parse_math": False,  # domain names may contain a dollar sign
            "savefig.dpi": 150,
        }
        return quiet | words | labels | clear | rest

    def heat(self) -> LinearSegmentedColormap:
        return LinearSegmentedColormap.from_list("load", [self.cold, self.mean, self.hot])


LIGHT = Style(
    text="#24292f", faint="#8a929b", grid="#e3e6ea", cold="#2166ac", mean="#f3f2ee", hot="#c8511b", on_color="#ffffff"
)
DARK = Style(
    text="#dfe3e8", faint="#7d8590", grid="#30363d", cold="#5aa7f0", mean="#262b32", hot="#f0883e", on_color="#0d1117"
)


@dataclass(frozen=True)
class Run:
    """The records of one run, sorted by kind and step."""

    run: Record
    bigram: dict[str, float]
    train: list[Record]
    evals: list[Record]

    @staticmethod
    def read(run_dir: Path) -> Run:
        """Read the records of a run folder. Raises ValueError if there are none, or they cannot be read."""
        path = run_dir / METRICS_FILE
        try:
            records = [_printable(record) for record in read_records(path)]
        except RecursionError:
            raise ValueError(f"{path}: is nested too deeply; give the folder of a run") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror or error}); give the folder of a run") from None
        if not records:
            raise ValueError(f"{path}: has no records yet; wait for the run's first steps")
        kinds: dict[str, dict[int, Record]] = {}
        for number, record in enumerate(records):
            kinds.setdefault(str(record.get("kind")), {})[record.get("step", number)] = record  # the newest of a step
        by_step = {kind: [found[step] for step in sorted(found)] for kind, found in kinds.items()}
        last = {kind: (by_step.get(kind) or [{}])[-1] for kind in ("run", "baseline")}
        return Run(last["run"], last["baseline"].get("bigram") or {}, by_step.get("train", []), by_step.get("eval", []))

    def option(self, *path: str) -> Any:
        """Return a field of the run's configuration, or None if it is missing."""
        value: Any = self.run.get("config")
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def domains(self) -> list[str]:
        found = {d for record in self.train for d in record.get("domain_loss") or {}}
        return sorted(found | {d for record in self.evals for d in record.get("domains") or {}})

    def counts_NLE(self) -> tuple[Array, Array]:
        """Return steps [N] and tokens per expert [N, L, E]; both are empty without MoE layers."""
        rows = [(r["step"], [layer["counts"] for layer in r["layers"]]) for r in self.train if r.get("layers")]
        rows = [(s, c) for s, c in rows if [len(x) for x in c] == [len(x) for x in rows[-1][1]]]
        return np.array([s for s, _ in rows], float), np.array([c for _, c in rows], float)

    def routing_DLE(self, record: Record) -> tuple[list[str], Array]:
        """Return the domains and the frequency [D, L, E] with which each chooses each expert, sum 1 over experts."""
        routing = {d: layers for d, layers in sorted((record.get("routing") or {}).items()) if layers}
        return list(routing), np.array(list(routing.values()), float)


def _printable(value: Any) -> Any:
    """Escape the names in a record, which come from the training text."""
    if isinstance(value, dict):
        return {printable(str(key)): _printable(item) for key, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], (dict, str)):
        return [_printable(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def numbers(records: Iterable[Record], *path: str) -> Array:
    """Return one number per record [N]; NaN where it is missing, not a number or not finite."""

    def value(record: Any) -> float:
        for part in path:
            record = record.get(part) if isinstance(record, dict) else None
        return float(record) if isinstance(record, (int, float)) and math.isfinite(record) else math.nan

    return np.array([value(record) for record in records], float)


# ---- figures: each function returns a figure and its alt text, or a sentence that says why there is no figure

Drawn = tuple[Figure, str]


def new_panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.6, rows * height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).ravel())


def draw_line(axes: Axes, x: Array, y: Array, **options: Any) -> None:
    axes.plot(x, y, marker="o" if len(x) < 3 else None, **options)


def finish(axes: Axes, title: str = "", label: str = "") -> None:
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(title=title, ylabel=label, xlabel="step")
    axes.locator_params(axis="x", nbins=6)


def _smooth(y: Array) -> Array:
    """Moving average over a window of 1/20 of the records, ignoring NaN."""
    half = max(1, len(y) // 40)
    return np.array([np.nanmean(w) if np.isfinite(w := y[max(0, i - half) : i + half + 1]).any() else math.nan
                     for i in range(len(y))])  # fmt: skip


def draw_loss(run: Run, style: Style) -> Drawn | str:
    """Draw training loss, held-out loss and the bigram baseline."""
    if not run.train and not run.evals:
        return "There is no loss yet: no training step has been recorded."
    figure, (axes,) = new_panels(1, 1, 3.9)
    steps, losses = numbers(run.train, "step"), numbers(run.train, "loss")
    if len(losses) > 60:
        axes.plot(steps, losses, color=COLORS[0], alpha=0.3, linewidth=0.9)
        losses = _smooth(losses)
    if len(losses):
        draw_line(axes, steps, losses, color=COLORS[0], linewidth=1.8, label="training")
    heldout = numbers(run.evals, "loss")
    if len(heldout):
        axes.plot(numbers(run.evals, "step"), heldout, "o-", color=COLORS[1], linewidth=1.2, label="held-out text")
    if (bigram := run.bigram.get("all")) is not None:
        axes.axhline(bigram, color=style.faint, linestyle="--", linewidth=1.2, label=f"bigram table ({bigram:.2f})")
    axes.legend(loc="upper right")
    finish(axes, label="loss (nats per token)")
    parts = [f"training loss from {losses[0]:.2f} to {losses[-1]:.2f}"] if len(losses) else []
    parts += [f"held-out loss {heldout[-1]:.2f} at the end"] if len(heldout) else []
    return figure, "Loss over the steps: " + ", ".join(parts) + "."


def draw_domains(run: Run, style: Style) -> Drawn | str:
    """Draw the loss of each domain: lines for training, dots for held-out text."""
    domains = run.domains()
    if not domains:
        return "The losses were not recorded by domain."
    figure, (axes,) = new_panels(1, 1, 3.9)
    steps, evals = numbers(run.train, "step"), numbers(run.evals, "step")
    for index, domain in enumerate(domains):
        color, losses = COLORS[index % len(COLORS)], numbers(run.train, "domain_loss", domain)
        dash = ("-", "--", ":")[index // len(COLORS) % 3]
        seen = np.isfinite(losses)
        losses = _smooth(losses[seen]) if seen.sum() > 60 else losses[seen]
        draw_line(axes, steps[seen], losses, color=color, linewidth=1.5, linestyle=dash)
        axes.plot(evals, numbers(run.evals, "domains", domain, "loss"), "o", color=color, markersize=5)
        axes.plot(
            [], [], dash, marker="o", color=color, label=f" {domain[:28]}"
        )  # the leading space: matplotlib hides labels that begin with _
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + len(domains) // 16)
    finish(axes, label="loss (nats per token)")
    return figure, f"Loss over the steps by domain: {', '.join(domains)}."


def draw_balance(run: Run, style: Style) -> Drawn | str:
    """Draw the balance loss and the load of the busiest expert."""
    records = [record for record in run.train if record.get("layers")]
    if not records:
        return "The model has no MoE layer, so there is nothing to balance."
    figure, panels = new_panels(1, 2, 3.3)
    steps, alt = numbers(records, "step"), []
    names = (("balance", "balance loss", "mean of the layers"), ("max_over_mean", "busiest expert", "worst layer"))
    for axes, (name, title, summary) in zip(panels, names, strict=True):
        for layer in range(len(records[-1]["layers"])):
            each = [r["layers"][layer] if layer < len(r["layers"]) else {} for r in records]
            axes.plot(steps, numbers(each, name), color=style.faint, alpha=0.45, linewidth=0.8)
        values = numbers(records, name)
        draw_line(axes, steps, values, color=COLORS[0], linewidth=1.8, label=summary)
        axes.plot([], [], color=style.faint, alpha=0.6, linewidth=0.8, label="one layer")
        axes.axhline(1.0, color=style.faint, linestyle="--", linewidth=1.2, label="balanced")
        finish(axes, title, "1.0 = balanced" if name == "balance" else "load / mean load")
        alt.append(f"{title} {values[-1]:.2f} at the end")
    panels[1].legend(loc="upper right")
    return figure, "Balance over the steps: " + ", ".join(alt) + "; 1.0 would be balanced."


def draw_optimizer(run: Run, style: Style) -> Drawn | str:
    """Draw the gradient norm and the learning rate."""
    if not run.train:
        return "No training step has been recorded."
    figure, panels = new_panels(1, 2, 3.0)
    steps, norms, rates = (numbers(run.train, name) for name in ("step", "grad_norm", "lr"))
    draw_line(panels[0], steps, norms, color=COLORS[2], linewidth=1.2)
    if clip := run.option("optim", "grad_clip"):
        panels[0].axhline(clip, color=style.faint, linestyle="--", linewidth=1.2, label=f"clipped at {clip:g}")
        panels[0].legend(loc="upper right")
    if np.isfinite(norms).any() and np.nanmin(norms) > 0 and np.nanmax(norms) > 20 * np.nanmedian(norms):
        panels[0].set_yscale("log")
    finish(panels[0], "gradient norm")
    draw_line(panels[1], steps, rates, color=COLORS[4], linewidth=1.5)
    panels[1].set_ylim(bottom=0)
    panels[1].yaxis.set_major_formatter("{x:.1e}")
    finish(panels[1], "learning rate")
    return figure, f"Gradient norm {norms[-1]:.3g} and learning rate {rates[-1]:.2g} at the last step."


def _layer_panels(layers: int, columns: int, height: float, style: Style) -> tuple[Figure, list[Axes], list[int]]:
    """Make a figure with one panel for each of at most MAX_PANELS layers; also return the layers shown."""
    shown = sorted({round(i) for i in np.linspace(0, layers - 1, min(layers, MAX_PANELS))})
    columns = min(columns, len(shown))
    figure, panels = new_panels(math.ceil(len(shown) / columns), columns, height, sharex=True, sharey=True)
    for axes, layer in zip(panels, shown, strict=False):
        axes.set_title(f"MoE layer {layer}")
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    if len(shown) < layers:
        figure.suptitle(f"{len(shown)} of the {layers} layers", fontsize=9, color=style.faint)
    return figure, panels[: len(shown)], shown


def _label_below(panels: Sequence[Axes], columns: int, label: str) -> None:
    """Label the x axis of each column's last visible panel, because ``sharex`` labels only the bottom row."""
    for axes in panels[-columns:]:
        axes.set_xlabel(label)
        axes.tick_params(labelbottom=True)


def _heat_scale(figure: Figure, panels: Sequence[Axes], image: Any) -> None:
    bar = figure.colorbar(image, ax=list(panels), ticks=[-2, -1, 0, 1, 2], fraction=0.03, pad=0.015)
    bar.ax.set_yticklabels(["1/4 or less", "1/2", "1", "2", "4 or more"])
    bar.set_label("times the uniform load")
    bar.outline.set_visible(False)


def _log2_ratio(ratio: Array) -> Array:
    return np.clip(np.log2(np.maximum(ratio, 1e-9)), -2, 2)


def draw_load(run: Run, style: Style) -> Drawn | str:
    """Draw the load of every expert over time, one heat map per layer."""
    steps_N, counts_NLE = run.counts_NLE()
    if not counts_NLE.size:
        return "The model has no MoE layer, so there is no expert load to draw."
    starts = np.unique(np.linspace(0, len(steps_N), MAX_COLUMNS + 1).astype(int)[:-1])
    first = steps_N[0] - (steps_N[1] - steps_N[0] if len(steps_N) > 1 else 1)
    edges = np.array([first, *steps_N])[[*starts, len(steps_N)]]
    counts_NLE = np.add.reduceat(counts_NLE, starts, axis=0)
    load_NLE = counts_NLE / np.maximum(counts_NLE.mean(axis=2, keepdims=True), 1e-9)
    _, layers, experts = load_NLE.shape
    figure, panels, shown = _layer_panels(layers, 2, min(4.0, 1.3 + 0.16 * experts), style)
    for axes, layer in zip(panels, shown, strict=True):
        heat_EN = _log2_ratio(load_NLE[:, layer].T)
        image = axes.pcolormesh(edges, np.arange(experts + 1) - 0.5, heat_EN, cmap=style.heat(), vmin=-2, vmax=2)
        axes.set_ylabel("expert")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.locator_params(axis="x", nbins=6)
    _label_below(panels, 2, "step")
    _heat_scale(figure, panels, image)
    return figure, f"Load of {experts} experts over the steps, by MoE layer ({layers})."


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0


def draw_ranks(run: Run, style: Style) -> Drawn | str:
    """Draw how long each rank worked in a step, as a multiple of the median rank."""
    busy = [numbers([{"s": s} for s in r["busy_s"]], "s") if _is_list(r.get("busy_s")) else None for r in run.train]
    ranks = max((len(row) for row in busy if row is not None), default=0)
    # the number of ranks may change at a resume
    kept = [i for i, row in enumerate(busy) if row is not None and len(row) == ranks and np.isfinite(row).all()]
    if ranks < 2 or not kept:
        return "The times of the ranks have not been measured, which takes at least two of them."
    busy_NP, steps_N = np.array([busy[i] for i in kept]), numbers([run.train[i] for i in kept], "step")
    median_N1 = np.maximum(np.median(busy_NP, axis=1, keepdims=True), 1e-9)
    starts = np.unique(np.linspace(0, len(steps_N), MAX_COLUMNS + 1).astype(int)[:-1])
    ratio_PN = np.maximum.reduceat(busy_NP / median_N1, starts, axis=0).T
    first = steps_N[0] - (steps_N[1] - steps_N[0] if len(steps_N) > 1 else 1)
    edges = np.array([first, *steps_N])[[*starts, len(steps_N)]]
    figure, (axes,) = new_panels(1, 1, min(6.0, 2.4 + 0.2 * ranks))
    image = axes.pcolormesh(
        edges, np.arange(ranks + 1) - 0.5, _log2_ratio(ratio_PN), cmap=style.heat(), vmin=-2, vmax=2
    )
    axes.set_ylabel("rank")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("step")
    _heat_scale(figure, [axes], image)
    return figure, f"Seconds of work of {ranks} ranks over the steps, divided by those of the median rank."


def draw_routing(run: Run, style: Style) -> Drawn | str:
    """Draw how often each domain uses each expert, by layer, in the last evaluation that recorded it."""
    found = [record for record in run.evals if any((record.get("routing") or {}).values())]
    if not found:
        return "There is no routing by domain yet: no evaluation of a model with MoE layers has been recorded."
    domains, frequency_DLE = run.routing_DLE(found[-1])
    _, layers, experts = frequency_DLE.shape
    columns = 2 if experts <= 32 else 1
    figure, panels, shown = _layer_panels(layers, columns, 0.95 + 0.3 * len(domains), style)
    for axes, layer in zip(panels, shown, strict=True):
        ratio_DE = frequency_DLE[:, layer] * experts
        heat_DE = _log2_ratio(ratio_DE)
        image = axes.imshow(heat_DE, cmap=style.heat(), vmin=-2, vmax=2, aspect="auto")
        axes.set_yticks(range(len(domains)), [domain[:20] for domain in domains])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if experts <= 16:
            axes.set_xticks(range(experts))
            for (row, column), value in np.ndenumerate(ratio_DE):
                color = style.on_color if abs(heat_DE[row, column]) > 1.2 else style.text
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=color)
    _label_below(panels, columns, "expert")
    _heat_scale(figure, panels, image)
    return figure, f"How often {', '.join(domains)} choose each of {experts} experts, by MoE layer ({layers})."
