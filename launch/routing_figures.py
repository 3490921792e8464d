"""Draws the report's figures of balance, of waiting ranks, and of how domains differ in their routing.

Shapes: N records, L MoE layers, E experts, D domains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..moe.observe import divergences, mean_divergence
from ..moe.observe.metrics import Record
from .figures import COLORS, MAX_PANELS, Array, Drawn, Run, Style, draw_line, finish, new_panels, numbers
from .text import counted

#: most entries in one column of a legend
MAX_NAMED = 16


def _layers(records: Sequence[Record]) -> int:
    return max((len(record.get("layers") or []) for record in records), default=0)


def _of_layer(records: Sequence[Record], layer: int, *path: str) -> Array:
    rows = [record.get("layers") or [] for record in records]
    return numbers([row[layer] if layer < len(row) else {} for row in rows], *path)


def _names(records: Sequence[Record], field: str) -> list[str]:
    """Return the keys of a field that maps names to numbers, in order of first occurrence."""
    return list(dict.fromkeys(name for record in records for name in _dict(record.get(field))))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _seen(values: Array) -> bool:
    return bool(np.isfinite(values).any())


def _last(values: Array, spec: str = ".2f") -> str:
    finite = values[np.isfinite(values)]
    return format(finite[-1], spec) if len(finite) else "unknown"


def _mean(values: Array) -> Array:
    """Mean over the first axis, [X, N] to [N], ignoring values that are not finite; NaN where there are none."""
    finite = np.isfinite(values)
    total, count = np.where(finite, values, 0.0).sum(0), finite.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def _shade(place: int, of: int) -> Any:
    return matplotlib.colormaps["viridis"](0.3 + 0.6 * place / max(1, of - 1))


def _each_layer(axes: Axes, records: Sequence[Record], *path: str, color: str) -> Array:
    """Draw a faint line for each layer and return the values [L, N]."""
    steps = numbers(records, "step")
    values_LN = np.array([_of_layer(records, layer, *path) for layer in range(_layers(records))])
    for values_N in values_LN:
        axes.plot(steps, values_N, color=color, alpha=0.4, linewidth=0.8)
    return values_LN


def _legend(axes: Axes, **options: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**options)


def _log_if_wide(axes: Axes, values: Sequence[Array]) -> None:
    """Use a logarithmic axis if some lines would look flat on a linear one."""
    tops = [float(np.nanmax(v)) for v in values if _seen(v)]
    positive = [top for top in tops if top > 0]
    if len(positive) > 1 and len(positive) == len(tops) and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


# ---- balance


def draw_evenness(run: Run, style: Style) -> Drawn | str:
    """Draw each layer's coefficient of variation, entropy and dead experts."""
    records = [record for record in run.train if record.get("layers")]
    if not records:
        return "The model has no MoE layer, so there is no expert load to measure."
    figure, panels = new_panels(1, 3, 3.1)
    steps, alt = numbers(records, "step"), []
    parts = (
        ("cv", "coefficient of variation", "standard deviation / mean", 0.0),
        ("entropy", "entropy", "entropy / entropy of a uniform load", 1.0),
        ("dead", "experts without a token", "experts per layer", None),
    )
    for axes, (name, title, label, balanced) in zip(panels, parts, strict=True):
        values_LN = _each_layer(axes, records, name, color=style.faint)
        mean_N = _mean(values_LN)
        draw_line(axes, steps, mean_N, color=COLORS[0], linewidth=1.8, label="mean of the layers")
        axes.plot([], [], color=style.faint, alpha=0.6, linewidth=0.8, label="one layer")
        if balanced is not None:
            axes.axhline(balanced, color=style.faint, linestyle="--", linewidth=1.2, label="balanced")
        finish(axes, title, label)
        alt.append(f"{title} {_last(mean_N)}")
    _legend(panels[0], loc="upper right")
    return figure, f"Evenness of the load over the steps, mean of the layers at the end: {', '.join(alt)}."


def draw_losses(run: Run, style: Style) -> Drawn | str:
    """Draw every balance loss without its coefficient, and what it adds to the training loss."""
    records = [record for record in run.train if _dict(record.get("losses"))]
    if not records:
        return "The individual balance losses were not recorded."
    names, added = _names(records, "losses"), _names(records, "scaled_losses")
    shown = [name for name in names if name != "z"]
    figure, panels = new_panels(1, 3 if "z" in names else 2, 3.3)
    steps, alt = numbers(records, "step"), []
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(dict.fromkeys((*shown, *added, *names)))}
    for name in shown:
        trained = name in added
        _each_layer(panels[0], records, "losses", name, color=colors[name])
        values = numbers(records, "losses", name)
        label = name if trained else f"{name} (not trained on)"
        draw_line(panels[0], steps, values, color=colors[name], linewidth=1.8, ls="-" if trained else "--", label=label)
        alt.append(f"{name} {_last(values)}")
    panels[0].axhline(1.0, color=style.faint, linestyle=":", linewidth=1.2)
    _legend(panels[0], loc="best")
    finish(panels[0], "balance losses", "mean of the layers, 1.0 = balanced")
    lines = {name: numbers(records, "scaled_losses", name) for name in added}
    for name, values in lines.items():
        draw_line(panels[1], steps, values, color=colors[name], linewidth=1.8, label=name)
    if lines:
        _legend(panels[1], loc="best")
    _log_if_wide(panels[1], list(lines.values()))
    finish(panels[1], "added to the training loss", "coefficient * loss, sum of the layers")
    if "z" in names:
        _each_layer(panels[2], records, "losses", "z", color=colors["z"])
        draw_line(panels[2], steps, numbers(records, "losses", "z"), color=colors["z"], linewidth=1.8)
        finish(panels[2], "z-loss", "logsumexp(logits)\u00b2, mean of the layers")
    return figure, "Balance losses without coefficient at the end: " + ", ".join(alt) + "; 1.0 would be balanced."


def draw_estimator(run: Run, style: Style) -> Drawn | str:
    """Draw the number of sequences over which the load was counted, and the error of that load."""
    records = [record for record in run.train if record.get("layers")]
    sequences, error = numbers(records, "balance_sequences"), numbers(records, "estimator_error")
    if not _seen(sequences) and not _seen(error):
        return "The number of sequences over which the balance loss counted its load was not recorded."
    figure, panels = new_panels(1, 2, 3.0)
    steps = numbers(records, "step")
    for axes, name, values in zip(panels, ("balance_sequences", "estimator_error"), (sequences, error), strict=True):
        _each_layer(axes, records, name, color=style.faint)
        draw_line(axes, steps, values, color=COLORS[0], linewidth=1.8, label="mean of the layers")
        axes.set_ylim(bottom=0)
    whole = run.option("data", "global_batch")
    if isinstance(whole, (int, float)):
        panels[0].axhline(whole, color=style.faint, linestyle="--", linewidth=1.2, label=f"the whole step ({whole:g})")
    _legend(panels[0], loc="lower right")
    finish(panels[0], "balance batch size", "sequences")
    finish(panels[1], "error of the load that was used", "relative to the step's load")
    text = f"Balance batch size at the end: {_last(sequences, '.3g')}; error of the load that was used: {_last(error)}."
    return figure, text


# ---- ranks that wait for each other


def draw_straggler(run: Run, style: Style) -> Drawn | str:
    """Draw the rows of the busiest rank relative to the mean (measured and projected), and the estimated waiting."""
    records = [record for record in run.train if record.get("layers")]
    factor, waiting = numbers(records, "straggler"), numbers(records, "waiting")
    degrees = _names(records, "projected_straggler")
    if not _seen(factor) and not degrees:
        return "The load of the expert-parallel ranks was not recorded."
    figure, panels = new_panels(1, 2, 3.5)
    steps = numbers(records, "step")
    for i, degree in enumerate(degrees):
        color = _shade(i, len(degrees))
        label = f"{degree} ranks, projected"
        for axes, field, scale in ((panels[0], "projected_straggler", 1), (panels[1], "projected_waiting", 100)):
            values = numbers(records, field, degree) * scale
            draw_line(axes, steps, values, color=color, linestyle="--", linewidth=1.2, label=label)
    worst = numbers(records, "straggler_max")
    if _seen(worst) and np.nanmax(worst) > 1.0:
        panels[0].plot(steps, worst, color=COLORS[5], alpha=0.4, linewidth=0.9, label="this run, worst micro-batch")
    replicated = numbers(records, "replicated_straggler")
    if _seen(replicated):
        label = "this run, without its replicas"
        draw_line(panels[0], steps, factor, color=COLORS[5], linestyle=":", linewidth=1.5, label=label)
    now = np.where(np.isfinite(replicated), replicated, factor)
    draw_line(panels[0], steps, now, color=COLORS[5], linewidth=1.8, label="this run")
    draw_line(panels[1], steps, 100 * waiting, color=COLORS[5], linewidth=1.8, label="this run")
    figure.legend(handles=panels[0].get_legend_handles_labels()[0], loc="outside right upper")
    finish(panels[0], "rows of the busiest rank", "rows / mean of the ranks")
    finish(panels[1], "estimated waiting", "% of a step's time")
    projected = [f"{_last(numbers(records, 'projected_straggler', d))} on {d}" for d in degrees]
    text = f"Rows of the busiest rank over the mean {_last(factor)} at the end" + ("; projected " if projected else "")
    text = f"{text}{', '.join(projected)}. Estimated waiting {_last(100 * waiting, '.1f')} % of a step's time."
    if _seen(replicated):
        copied, error = numbers(records, "copied_bytes") / (1 << 20), 100 * numbers(records, "forecast_error")
        text += (
            f" With {_last(numbers(records, 'replicas'), '.1f')} replicas per layer {_last(replicated)}; their weights "
            f"and gradients are {_last(copied, '.1f')} MiB per layer and step, and the load was expected with an error "
            f"of {_last(error, '.0f')} %."
        )
    return figure, text


# ---- domains


def draw_scores(run: Run, style: Style) -> Drawn | str:
    """Draw the total probability of the chosen experts, over training and by domain."""
    records = [record for record in run.train if _seen(numbers([record], "score_sum"))]
    evals = [record for record in run.evals if any(_dict(record.get("score_sum")).values())]
    if not records and not evals:
        return "The probability of the chosen experts was not recorded."
    figure, panels = new_panels(1, 2, 3.3)
    # the section was called "model" in runs of older versions
    k, experts = (run.option("moe", name) or run.option("model", name) for name in ("top_k", "num_experts"))
    if isinstance(k, int) and isinstance(experts, int) and experts > 0:
        for axes in panels:
            axes.axhline(k / experts, color=style.faint, ls="--", linewidth=1.2, label=f"uniform ({k}/{experts})")
    steps, mean = numbers(records, "step"), numbers(records, "score_sum")
    values_LN = _each_layer(panels[0], records, "score_sum", color=style.faint)
    if len(records):
        draw_line(panels[0], steps, mean, color=COLORS[0], linewidth=1.8, label="mean of the layers")
    _legend(panels[0], loc="best")
    finish(panels[0], "training", "probability of the chosen experts")
    last = _dict(evals[-1]["score_sum"]) if evals else {}
    for i, (domain, values) in enumerate(sorted(last.items())):
        points = numbers([{"of": value} for value in values], "of") if isinstance(values, list) else np.array([])
        panels[1].plot(range(len(points)), points, "o-", color=COLORS[i % len(COLORS)], markersize=4, linewidth=1.2,
                       label=f" {domain[:28]}")  # fmt: skip
    _legend(panels[1], loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + len(last) // MAX_NAMED)
    finish(panels[1], "held-out text at the last evaluation")
    panels[1].set_xlabel("MoE layer")
    panels[1].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    layers = max([len(values_LN), *(len(values) for values in last.values() if isinstance(values, list))])
    text = f"Probability of the chosen experts, mean of {counted(layers, 'MoE layer')}"
    return figure, f"{text}: {_last(mean)} at the end of training."


def draw_divergence(run: Run, style: Style) -> Drawn | str:
    """Draw the Jensen-Shannon divergence between domains, and the share of each domain's favourite expert."""
    found = [
        (r["step"], dict(zip(*run.routing_DLE(r), strict=True))) for r in run.evals if len(_dict(r.get("routing"))) > 1
    ]
    found = [(step, routing) for step, routing in found if len(routing) > 1]
    if not found:
        return "Domains cannot be compared: no evaluation has recorded the routing of two or more domains."
    layers, experts = next(iter(found[-1][1].values())).shape
    found = [(step, r) for step, r in found if next(iter(r.values())).shape == (layers, experts)]
    steps = np.array([step for step, _ in found], float)
    bits_NL = np.array([mean_divergence(divergences(routing)) for _, routing in found])
    most_NL = np.array(
        [np.mean([frequency_LE.max(1) for frequency_LE in routing.values()], axis=0) for _, routing in found]
    )
    figure, panels = new_panels(1, 3, 3.3)
    for axes, values_NL, title, label in (
        (panels[0], bits_NL, "divergence", "bits, mean of the pairs"),
        (panels[1], most_NL, "share of a domain's favourite expert", "mean of the domains"),
    ):
        for layer in range(layers):
            name = f"MoE layer {layer}" if layer in (0, layers - 1) or layers <= MAX_PANELS else None
            axes.plot(steps, values_NL[:, layer], "o-", color=_shade(layer, layers), linewidth=1.5, ms=4, label=name)
        finish(axes, title, label)
        axes.set_ylim(bottom=0)
    panels[1].axhline(1 / experts, color=style.faint, linestyle="--", linewidth=1.2)
    figure.legend(handles=panels[0].get_legend_handles_labels()[0], loc="outside lower left", ncols=6)
    _draw_pairs(panels[2], found[-1][1], style)
    text = f"Divergence between the domains' use of experts, mean of {counted(layers, 'MoE layer')}"
    return figure, f"{text}: {_last(_mean(bits_NL.T), '.3f')} bits at the last evaluation."


def _draw_pairs(axes: Axes, routing: dict[str, Array], style: Style) -> None:
    """Draw the mean over layers for every pair of domains, with numbers if there is room for them."""
    names = list(routing)
    place = {name: i for i, name in enumerate(names)}
    bits_DD = np.zeros((len(names), len(names)))
    for (a, b), bits_L in divergences(routing).items():
        bits_DD[place[a], place[b]] = bits_DD[place[b], place[a]] = _mean(bits_L[:, None])[0]
    cmap = matplotlib.colors.LinearSegmentedColormap.from_list("bits", [style.mean, style.hot])
    top = max(float(np.nanmax(bits_DD)) if _seen(bits_DD) else 0.0, 1e-3)
    axes.imshow(bits_DD, cmap=cmap, vmin=0, vmax=top, aspect="auto")
    axes.set_title("pairs, mean of the layers")
    axes.set_yticks(range(len(names)), [name[:12] for name in names])
    axes.set_xticks(range(len(names)), [name[:12] for name in names], rotation=45, ha="right")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(names) <= 6:
        for (row, column), value in np.ndenumerate(bits_DD):
            color = style.on_color if value > 0.6 * top else style.text
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
