"""Draws the main figures of a run's report. Each function returns the panels, or says why there is nothing to draw.

Shapes: N records, L MoE layers, E experts, D domains.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .panels import (
    COLORS,
    FAINT,
    HEAT,
    ON,
    TEXT,
    Drawn,
    begin_at,
    draw_line,
    edges_of,
    finish,
    log_axis,
    new_panel,
    shade,
    spread,
    thinned,
)
from .records import Array, Run, last_of, layers_in, numbers, of_layer, seen
from .text import counted

MAX_COLUMNS = 200  # columns of a heat map; more records are summed in groups


def smooth(y: Array) -> Array:
    """Moving average over a window of 1/20 of the records, ignoring NaN."""
    half = max(1, len(y) // 40)
    return np.array([np.nanmean(w) if np.isfinite(w := y[max(0, i - half) : i + half + 1]).any() else math.nan
                     for i in range(len(y))])  # fmt: skip


def draw_heldout(axes: Axes, run: Run, color: str, label: str, *path: str) -> Array:
    """Draw held-out losses with error bars of two standard deviations; return the losses."""
    steps, losses = numbers(run.evals, "step"), numbers(run.evals, *path, "loss")
    bars = 2 * numbers(run.evals, *path, "loss_std")
    kept = np.isfinite(losses)
    if kept.any():
        axes.errorbar(
            steps[kept],
            losses[kept],
            yerr=np.where(np.isfinite(bars), bars, 0.0)[kept] if seen(bars) else None,
            fmt="o-" if label else "o",
            color=color,
            linewidth=1.2,
            markersize=4,
            capsize=2.5,
            label=label or None,
        )
    return losses


def draw_loss(run: Run) -> Drawn | str:
    """Draw training loss, held-out loss and the bigram baseline."""
    if not run.train and not run.evals:
        return "There is no loss yet: no training step has been recorded."
    axes = new_panel()
    steps, losses = numbers(run.train, "step"), numbers(run.train, "loss")
    if len(losses) > 60:
        axes.plot(*thinned(steps, losses), color=COLORS[0], alpha=0.3, linewidth=0.9)
        losses = smooth(losses)
    if len(losses):
        draw_line(axes, steps, losses, color=COLORS[0], linewidth=1.8, label="training")
    heldout = draw_heldout(axes, run, COLORS[1], "held-out text")
    if (bigram := run.bigram.get("all")) is not None:
        axes.axhline(bigram, color=FAINT, linestyle="--", linewidth=1.2, label=f"bigram table ({bigram:.2f})")
    parts = [f"training loss from {losses[0]:.2f} to {losses[-1]:.2f}"] if len(losses) else []
    parts += [f"held-out loss {heldout[-1]:.2f} at the end"] if len(heldout) else []
    return Drawn([finish(axes, "", "loss (nats per token)")], "Loss over the steps: " + ", ".join(parts) + ".")


def draw_domains(run: Run) -> Drawn | str:
    """Draw the loss of each domain: lines for training, dots for held-out text."""
    domains = run.domains()
    if len(domains) < 2:
        return "The losses were not recorded for two or more domains."
    axes, steps = new_panel(), numbers(run.train, "step")
    for index, domain in enumerate(domains):
        color, losses = COLORS[index % len(COLORS)], numbers(run.train, "domain_loss", domain)
        dash = ("-", "--", ":")[index // len(COLORS) % 3]
        finite = np.isfinite(losses)
        losses = smooth(losses[finite]) if finite.sum() > 60 else losses[finite]
        draw_line(axes, steps[finite], losses, color=color, linewidth=1.5, linestyle=dash)
        draw_heldout(axes, run, color, "", "domains", domain)
        name = f" {domain[:28]}"  # the leading space: matplotlib hides labels that begin with _
        axes.plot([], [], dash, marker="o", markersize=4, color=color, label=name)
    return Drawn([finish(axes, "", "loss (nats per token)")], f"Loss over the steps by domain: {', '.join(domains)}.")


def _over_steps(title: str, unit: str, steps: Array, values: Array, color: int, digits: str = "") -> Figure:
    """Draw a panel with one line, and an axis that begins at zero."""
    axes = new_panel()
    draw_line(axes, steps, values, color=COLORS[color], linewidth=1.5)
    begin_at(axes)
    if digits:
        axes.yaxis.set_major_formatter(digits)
    return finish(axes, title, unit)


def draw_speed(run: Run) -> Drawn | str:
    """Draw tokens per second, the share of the devices' peak, and memory."""
    steps, rate = numbers(run.train, "step"), numbers(run.train, "tokens_per_s")
    if not seen(rate):
        return "The speed was not recorded."
    devices, per_device = run.run.get("world_size") or 1, numbers(run.train, "tokens_per_s_per_device")
    per_device = np.where(np.isfinite(per_device), per_device, rate / devices)
    unit, text = "tokens per second", f"{last_of(rate, ',.0f')} tokens per second at the end"
    panels = [_over_steps("speed", unit + (" and device" if devices > 1 else ""), steps, per_device, 0, "{x:,.0f}")]
    tflops, mfu = numbers(run.train, "tflops_per_device"), 100 * numbers(run.train, "mfu")
    if seen(mfu):
        panels.append(_over_steps("model FLOP/s utilisation (MFU)", "% of the dense bf16 peak", steps, mfu, 2))
        text += f", {last_of(mfu, '.1f')} % of the device's peak"
    if seen(tflops):
        text += f", {last_of(tflops, '.3g')} TFLOP/s per device"
    memory = numbers(run.train, "memory_bytes") / (1 << 30)
    if seen(memory):
        panels.append(_over_steps("memory of the rank with the most", "GiB", steps, memory, 4))
        text += f", {last_of(memory, '.3g')} GiB of memory"
    return Drawn(panels, text[0].upper() + text[1:] + ".")


def draw_balance(run: Run) -> Drawn | str:
    """Draw the balance loss and the load of the busiest expert."""
    records = [record for record in run.train if record.get("layers")]
    if not records:
        return "The model has no MoE layer, so there is nothing to balance."
    panels, alt = [], []
    names = (("balance", "balance loss", "mean of the layers"), ("max_over_mean", "busiest expert", "worst layer"))
    for name, title, summary in names:
        axes, steps = new_panel(), numbers(records, "step")
        draw_layers(axes, records, name)
        values = numbers(records, name)
        draw_line(axes, steps, values, color=TEXT, linewidth=1.8, label=summary)
        axes.axhline(1.0, color=FAINT, linestyle="--", linewidth=1.2, label="balanced")
        panels.append(finish(axes, title, "1.0 = balanced" if name == "balance" else "load / mean load"))
        alt.append(f"{title} {last_of(values)} at the end")
    return Drawn(panels, "Balance over the steps: " + ", ".join(alt) + "; 1.0 would be balanced.")


def draw_layers(axes: Axes, records: list[dict[str, object]], *path: str) -> Array:
    """Draw a thin line for each of some layers, by name; return the values of all layers [L, N]."""
    steps, layers = numbers(records, "step"), layers_in(records)
    values_LN = np.array([of_layer(records, layer, *path) for layer in range(layers)])
    for layer in spread(layers):
        draw_line(axes, steps, values_LN[layer], color=shade(layer, layers), linewidth=0.9, label=f"MoE layer {layer}")
    return values_LN


def draw_optimizer(run: Run) -> Drawn | str:
    """Draw the gradient norm and the learning rate."""
    if not run.train:
        return "No training step has been recorded."
    steps, norms, rates = (numbers(run.train, name) for name in ("step", "grad_norm", "lr"))
    axes = new_panel()
    draw_line(axes, steps, norms, color=COLORS[2], linewidth=1.2)
    if clip := run.option("optim", "grad_clip"):
        axes.axhline(clip, color=FAINT, linestyle="--", linewidth=1.2, label=f"clipped at {clip:g}")
    if seen(norms) and np.nanmin(norms) > 0 and np.nanmax(norms) > 20 * np.nanmedian(norms):
        log_axis(axes)
    panels = [finish(axes, "gradient norm")]
    axes = new_panel()
    draw_line(axes, steps, rates, color=COLORS[4], linewidth=1.5)
    begin_at(axes)
    axes.yaxis.set_major_formatter("{x:.1e}")
    panels.append(finish(axes, "learning rate"))
    return Drawn(panels, f"Gradient norm {norms[-1]:.3g} and learning rate {rates[-1]:.2g} at the last step.")


# ---- heat maps


def log2_ratio(ratio: Array) -> Array:
    return np.clip(np.log2(np.maximum(ratio, 1e-9)), -2, 2)


def _some(shown: list[int], layers: int) -> str:
    return f"{len(shown)} of the {layers} layers" if len(shown) < layers else counted(layers, "MoE layer")


def draw_load(run: Run) -> Drawn | str:
    """Draw the load of every expert over time, one heat map per layer."""
    steps_N, counts_NLE = run.counts_NLE()
    if not counts_NLE.size:
        return "The model has no MoE layer, so there is no expert load to draw."
    starts = np.unique(np.linspace(0, len(steps_N), MAX_COLUMNS + 1).astype(int)[:-1])
    edges = edges_of(steps_N, starts)
    counts_NLE = np.add.reduceat(counts_NLE, starts, axis=0)
    load_NLE = counts_NLE / np.maximum(counts_NLE.mean(axis=2, keepdims=True), 1e-9)
    _, layers, experts = load_NLE.shape
    panels, shown = [], spread(layers)
    for layer in shown:
        axes, heat_EN = new_panel(min(4.0, 1.3 + 0.16 * experts)), log2_ratio(load_NLE[:, layer].T)
        rows = np.arange(experts + 1) - 0.5
        axes.pcolormesh(edges, rows, heat_EN, cmap=HEAT, vmin=-2, vmax=2, rasterized=True)
        panels.append(_finish_heat(axes, f"MoE layer {layer}", "expert", "step"))
    return Drawn(panels, f"Load of {experts} experts over the steps, {_some(shown, layers)}.", heat=True)


def _finish_heat(axes: Axes, title: str, label: str, xlabel: str) -> Figure:
    figure = finish(axes, title, label, xlabel)
    axes.grid(False)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return figure


def draw_ranks(run: Run) -> Drawn | str:
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
    axes, rows = new_panel(min(6.0, 1.6 + 0.2 * ranks)), np.arange(ranks + 1) - 0.5
    heat_PN = log2_ratio(ratio_PN)
    axes.pcolormesh(edges_of(steps_N, starts), rows, heat_PN, cmap=HEAT, vmin=-2, vmax=2, rasterized=True)
    text = f"Seconds of work of {ranks} ranks over the steps, divided by those of the median rank."
    return Drawn([_finish_heat(axes, "", "rank", "step")], text, heat=True)


def _is_list(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0


def draw_routing(run: Run) -> Drawn | str:
    """Draw how often each domain uses each expert, by layer, in the last evaluation that recorded it."""
    found = [record for record in run.evals if any((record.get("routing") or {}).values())]
    if not found:
        return "There is no routing by domain yet: no evaluation of a model with MoE layers has been recorded."
    domains, frequency_DLE = run.routing_DLE(found[-1])
    _, layers, experts = frequency_DLE.shape
    panels, shown = [], spread(layers)
    for layer in shown:
        axes, ratio_DE = new_panel(1.1 + 0.3 * len(domains)), frequency_DLE[:, layer] * experts
        heat_DE = log2_ratio(ratio_DE)
        axes.imshow(heat_DE, cmap=HEAT, vmin=-2, vmax=2, aspect="auto")
        panels.append(_finish_heat(axes, f"MoE layer {layer}", "", "expert"))
        axes.set_yticks(range(len(domains)), [domain[:20] for domain in domains])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if experts <= 10:
            axes.set_xticks(range(experts))
            for (row, column), value in np.ndenumerate(ratio_DE):
                color = ON if abs(heat_DE[row, column]) > 1.2 else TEXT
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9, color=color)
    text = f"How often {', '.join(domains)} choose each of {experts} experts, {_some(shown, layers)}."
    return Drawn(panels, text, heat=True)
