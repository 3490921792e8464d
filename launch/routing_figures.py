"""Draws the report's figures of balance, of waiting ranks, and of how domains differ in their routing.

Shapes: N records, L MoE layers, E experts, D domains.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from ..moe.observe import divergences, mean_divergence
from ..moe.observe.metrics import Record
from .figures import draw_layers
from .panels import (
    AMOUNT,
    COLORS,
    FAINT,
    ON,
    TEXT,
    Drawn,
    begin_at,
    draw_line,
    finish,
    log_axis,
    new_panel,
    shade,
    spread,
)
from .records import Array, Run, as_dict, flat, last_of, layers_in, mean_of, names_in, numbers, of_layer, seen
from .text import counted

MEAN = "mean of the layers"


def _wide_apart(values: list[Array]) -> bool:
    """Return whether some lines would look flat on a linear axis."""
    tops = [float(np.nanmax(v)) for v in values if seen(v)]
    positive = [top for top in tops if top > 0]
    return len(positive) > 1 and len(positive) == len(tops) and max(positive) > 20 * min(positive)


# ---- balance


def draw_evenness(run: Run) -> Drawn | str:
    """Draw each layer's coefficient of variation, entropy and dead experts."""
    records = [record for record in run.train if record.get("layers")]
    if not records:
        return "The model has no MoE layer, so there is no expert load to measure."
    steps, alt, panels = numbers(records, "step"), [], []
    parts = (
        ("cv", "coefficient of variation", "standard deviation / mean", 0.0),
        ("entropy", "entropy", "1.0 = uniform load", 1.0),
        ("dead", "experts without a token", "experts per layer", None),
    )
    for name, title, label, balanced in parts:
        each_LN = np.array([of_layer(records, layer, name) for layer in range(layers_in(records))])
        mean_N = mean_of(each_LN)
        alt.append(f"{title} {last_of(mean_N)}")
        if name == "dead" and flat(each_LN, 0.0):
            continue
        axes = new_panel()
        draw_layers(axes, records, name)
        draw_line(axes, steps, mean_N, color=TEXT, linewidth=1.8, label=MEAN)
        if balanced is not None:
            axes.axhline(balanced, color=FAINT, linestyle="--", linewidth=1.2, label="balanced")
        panels.append(finish(axes, title, label))
    return Drawn(panels, f"Evenness of the load over the steps, mean of the layers at the end: {', '.join(alt)}.")


def draw_losses(run: Run) -> Drawn | str:
    """Draw every balance loss without its coefficient, and what it adds to the training loss."""
    records = [record for record in run.train if as_dict(record.get("losses"))]
    if not records:
        return "The individual balance losses were not recorded."
    names, added = names_in(records, "losses"), names_in(records, "scaled_losses")
    values = {name: numbers(records, "losses", name) for name in names}
    # in a step of one micro-batch on one rank both are the same loss
    same = "micro" not in added and "global" in values and "micro" in values
    if same and np.allclose(values["micro"], values["global"], rtol=1e-4, equal_nan=True):
        del values["micro"]
    shown = [name for name in values if name != "z"]
    steps, alt = numbers(records, "step"), []
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(dict.fromkeys((*shown, *added, *names)))}
    axes = new_panel()
    for name in shown:
        label = name if name in added else f"{name} (not trained on)"
        line = "-" if name in added else "--"
        draw_line(axes, steps, values[name], color=colors[name], linewidth=1.8, ls=line, label=label)
        alt.append(f"{name} {last_of(values[name])}")
    axes.axhline(1.0, color=FAINT, linestyle=":", linewidth=1.2, label="balanced")
    panels = [finish(axes, "balance losses, mean of the layers", "1.0 = balanced")]
    lines = {name: numbers(records, "scaled_losses", name) for name in added}
    if lines:
        axes = new_panel()
        for name, line_N in lines.items():
            draw_line(axes, steps, line_N, color=colors[name], linewidth=1.8, label=name)
        if _wide_apart(list(lines.values())):
            log_axis(axes)
        panels.append(finish(axes, "added to the training loss, all layers", "coefficient * loss"))
    if "z" in names:
        axes = new_panel()
        draw_layers(axes, records, "losses", "z")
        draw_line(axes, steps, values["z"], color=TEXT, linewidth=1.8, label=MEAN)
        panels.append(finish(axes, "z-loss", "logsumexp(logits)\u00b2"))
    text = "Balance losses without coefficient at the end: " + ", ".join(alt) + "; 1.0 would be balanced."
    return Drawn(panels, text)


def draw_estimator(run: Run) -> Drawn | str:
    """Draw the number of sequences over which the load was counted, and how wrong that load and its gradient are."""
    records = [record for record in run.train if record.get("layers")]
    found = {name: numbers(records, name) for name in ("balance_sequences", "estimator_error", "gradient_error")}
    if not any(seen(values) for values in found.values()):
        return "The number of sequences over which the balance loss counted its load was not recorded."
    sequences, error, of_gradient = found.values()
    whole = run.option("data", "global_batch")
    if flat(error, 0.0) and flat(of_gradient, 0.0) and (not seen(sequences) or flat(sequences, sequences[-1])):
        return f"The balance loss always used the exact load of the whole step, {last_of(sequences, 'g')} sequences."
    parts = (
        ("balance_sequences", "balance batch size", "sequences"),
        ("estimator_error", "error of the load that was used", "relative to the step's load"),
        ("gradient_error", "error of the loss's gradient", "relative, approximately"),
    )
    steps, panels = numbers(records, "step"), []
    for name, title, label in parts:
        if not seen(found[name]):
            continue
        axes = new_panel()
        draw_layers(axes, records, name)
        draw_line(axes, steps, found[name], color=TEXT, linewidth=1.8, label=MEAN)
        if name == "balance_sequences" and isinstance(whole, (int, float)):
            axes.axhline(whole, color=FAINT, linestyle="--", linewidth=1.2, label=f"the whole step ({whole:g})")
        if name == "gradient_error":
            axes.axhline(1.0, color=FAINT, linestyle="--", linewidth=1.2, label="mostly noise")
        begin_at(axes)
        panels.append(finish(axes, title, label))
    text = f"Balance batch size at the end: {last_of(sequences, '.3g')}; error of the load that was used: "
    return Drawn(panels, f"{text}{last_of(error)}; of the gradient: {last_of(of_gradient)}.")


# ---- ranks that wait for each other


def draw_straggler(run: Run) -> Drawn | str:
    """Draw the rows of the busiest rank relative to the mean (measured and projected), and the estimated waiting."""
    records = [record for record in run.train if record.get("layers")]
    factor, waiting = numbers(records, "straggler"), 100 * numbers(records, "waiting")
    degrees = names_in(records, "projected_straggler")
    if not seen(factor) and not degrees:
        return "The load of the expert-parallel ranks was not recorded."
    if flat(factor, 1.0) and not degrees:
        return "No rank waits for another: the experts are not distributed over ranks."
    steps, worst = numbers(records, "step"), numbers(records, "straggler_max")
    replicated = numbers(records, "replicated_straggler")
    now = np.where(np.isfinite(replicated), replicated, factor)
    panels = []
    for title, label, field, scale, own in (
        ("rows of the busiest rank", "rows / mean of the ranks", "projected_straggler", 1, now),
        ("estimated waiting", "% of a step's time", "projected_waiting", 100, waiting),
    ):
        axes = new_panel()
        for i, degree in enumerate(degrees):
            values = numbers(records, field, degree) * scale
            named = f"{degree} ranks, projected"
            draw_line(axes, steps, values, color=shade(i, len(degrees)), linestyle="--", linewidth=1.2, label=named)
        if field == "projected_straggler" and seen(worst) and np.nanmax(worst) > 1.0:
            draw_line(
                axes, steps, worst, color=COLORS[5], alpha=0.4, linewidth=0.9, label="this run, worst micro-batch"
            )
        if field == "projected_straggler" and seen(replicated):
            named = "this run, without its replicas"
            draw_line(axes, steps, factor, color=COLORS[5], linestyle=":", linewidth=1.5, label=named)
        draw_line(axes, steps, own, color=COLORS[5], linewidth=1.8, label="this run")
        panels.append(finish(axes, title, label))
    if seen(replicated):
        panels += _replicas(records)
    projected = [f"{last_of(numbers(records, 'projected_straggler', d))} on {d}" for d in degrees]
    text = f"Rows of the busiest rank over the mean {last_of(factor)} at the end" + (
        "; projected " if projected else ""
    )
    text = f"{text}{', '.join(projected)}. Estimated waiting {last_of(waiting, '.1f')} % of a step's time."
    if seen(replicated):
        copied, error = numbers(records, "copied_bytes") / (1 << 20), 100 * numbers(records, "forecast_error")
        text += (
            f" With {last_of(numbers(records, 'replicas'), '.1f')} replicas per layer {last_of(replicated)}; their "
            f"weights and gradients are {last_of(copied, '.1f')} MiB per layer and step, and the load was expected "
            f"with an error of {last_of(error, '.0f')} %."
        )
    return Drawn(panels, text)


def _replicas(records: list[Record]) -> list[Figure]:
    """Draw what replicas of experts cost: their number, the bytes that are sent, and the error of their forecast."""
    steps, panels = numbers(records, "step"), []
    for name, scale, title, label in (
        ("replicas", 1.0, "replicas of experts", "per layer"),
        ("copied_bytes", 1 / (1 << 20), "copied for replicas", "MiB per layer and step"),
        ("forecast_error", 100.0, "error of the expected load", "%"),
    ):
        values = scale * numbers(records, name)
        if seen(values):
            axes = new_panel()
            draw_line(axes, steps, values, color=COLORS[5], linewidth=1.8)
            begin_at(axes)
            panels.append(finish(axes, title, label))
    return panels


# ---- domains


def draw_scores(run: Run) -> Drawn | str:
    """Draw the total probability of the chosen experts, over training and by domain."""
    records = [record for record in run.train if seen(numbers([record], "score_sum"))]
    evals = [record for record in run.evals if any(as_dict(record.get("score_sum")).values())]
    if not records and not evals:
        return "The probability of the chosen experts was not recorded."
    # the section was called "model" in runs of older versions
    k, experts = (run.option("moe", name) or run.option("model", name) for name in ("top_k", "num_experts"))
    uniform = k / experts if isinstance(k, int) and isinstance(experts, int) and experts > 0 else None
    mean, panels, layers = numbers(records, "score_sum"), [], layers_in(records)
    if records:
        axes = new_panel()
        draw_layers(axes, records, "score_sum")
        draw_line(axes, numbers(records, "step"), mean, color=TEXT, linewidth=1.8, label=MEAN)
        if uniform is not None:
            axes.axhline(uniform, color=FAINT, ls="--", linewidth=1.2, label=f"uniform ({k}/{experts})")
        panels.append(finish(axes, "training", "probability of the chosen experts"))
    if evals:
        axes, last = new_panel(), as_dict(evals[-1]["score_sum"])
        for i, (domain, values) in enumerate(sorted(last.items())):
            points = numbers([{"of": value} for value in values], "of") if isinstance(values, list) else np.array([])
            layers = max(layers, len(points))
            color, named = COLORS[i % len(COLORS)], f" {domain[:28]}"
            axes.plot(range(len(points)), points, "o-", color=color, markersize=4, linewidth=1.2, label=named)
        if uniform is not None:
            axes.axhline(uniform, color=FAINT, ls="--", linewidth=1.2, label=f"uniform ({k}/{experts})")
        panels.append(finish(axes, "held-out text at the last evaluation", "probability", "MoE layer"))
    text = f"Probability of the chosen experts, mean of {counted(layers, 'MoE layer')}"
    return Drawn(panels, f"{text}: {last_of(mean)} at the end of training.")


def draw_divergence(run: Run) -> Drawn | str:
    """Draw the Jensen-Shannon divergence between domains, and the share of each domain's favourite expert."""
    found = [
        (r["step"], dict(zip(*run.routing_DLE(r), strict=True)))
        for r in run.evals
        if len(as_dict(r.get("routing"))) > 1
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
    panels = []
    for values_NL, title, label, reference in (
        (bits_NL, "divergence", "bits, mean of the pairs", None),
        (most_NL, "share of a domain's favourite expert", "mean of the domains", 1 / experts),
    ):
        axes = new_panel()
        for layer in spread(layers):
            color, named = shade(layer, layers), f"MoE layer {layer}"
            axes.plot(steps, values_NL[:, layer], "o-", color=color, linewidth=1.5, ms=4, label=named)
        if reference is not None:
            axes.axhline(reference, color=FAINT, linestyle="--", linewidth=1.2, label="uniform use")
        begin_at(axes)
        panels.append(finish(axes, title, label))
    panels.append(_pairs(found[-1][1]))
    text = f"Divergence between the domains' use of experts, mean of {counted(layers, 'MoE layer')}"
    return Drawn(panels, f"{text}: {last_of(mean_of(bits_NL.T), '.3f')} bits at the last evaluation.")


def _pairs(routing: dict[str, Array]) -> Figure:
    """Draw the mean over layers for every pair of domains, with numbers if there is room for them."""
    names = list(routing)
    place = {name: i for i, name in enumerate(names)}
    bits_DD = np.zeros((len(names), len(names)))
    for (a, b), bits_L in divergences(routing).items():
        bits_DD[place[a], place[b]] = bits_DD[place[b], place[a]] = mean_of(bits_L[:, None])[0]
    top = max(float(np.nanmax(bits_DD)) if seen(bits_DD) else 0.0, 1e-3)
    axes = new_panel(3.4)
    axes.imshow(bits_DD, cmap=AMOUNT, vmin=0, vmax=top, aspect="auto")
    figure = finish(axes, "pairs, mean of the layers", "", "")
    axes.grid(False)
    shown = [name if len(name) <= 14 else f"{name[:12]}\u2026" for name in names]
    axes.set_yticks(range(len(names)), shown)
    axes.set_xticks(range(len(names)), shown, rotation=45, ha="right")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(names) <= 6:
        for (row, column), value in np.ndenumerate(bits_DD):
            color = ON if value > 0.6 * top else TEXT
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
    return figure
