"""The page that compares several runs: losses, load and speed in the same panels, and the settings that differ."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..moe.config import dotted
from ..moe.observe.printable import printable, short_count
from .figures import draw_heldout, smooth
from .page import figures_of
from .panels import COLORS, FAINT, Drawn, Plot, begin_at, draw_line, finish, new_panel
from .records import Array, Run, flat, last_of, numbers, seen
from .text import option_text

Runs = list[Run]


def read_runs(folders: Sequence[Path]) -> Runs:
    """Read several runs, each with a name of its own. Raises ValueError if one cannot be read."""
    runs = [Run.read(folder) for folder in folders]
    names = [run.name for run in runs]
    return [
        replace(run, name=printable(str(folder))) if names.count(run.name) > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def _lines(
    runs: Runs, title: str, label: str, values_of: Callable[[Run], Array], bottom: float | None = None
) -> tuple[list[Any], list[str]]:
    """Draw one line for each run that has values; return no panel, or one, and the last values in words."""
    axes, said = new_panel(), []
    for run, color in zip(runs, _colors(runs), strict=True):
        values = values_of(run)
        if seen(values):
            draw_line(axes, _tokens(run.train), values, color=color, linewidth=1.6, label=run.name[:40])
            said.append(f"{run.name} {last_of(values, '.4g')}")
    if not said:
        return [], []
    if bottom is not None:
        begin_at(axes, bottom)
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
    return [finish(axes, title, label, "tokens")], [f"{title}: {', '.join(said)}"]


def _colors(runs: Runs) -> Iterator[str]:
    return (COLORS[i % len(COLORS)] for i in range(len(runs)))


def _tokens(records: list[dict[str, Any]]) -> Array:
    return numbers(records, "tokens")


def _joined(parts: list[tuple[list[Any], list[str]]], why_not: str) -> Drawn | str:
    panels, said = [p for panels, _ in parts for p in panels], [s for _, texts in parts for s in texts]
    return Drawn(panels, "; ".join(said) + ".") if panels else why_not


def draw_losses(runs: Runs) -> Drawn | str:
    """Draw training and held-out losses over the tokens seen."""

    def training(run: Run) -> Array:
        losses = numbers(run.train, "loss")
        return smooth(losses) if len(losses) > 60 else losses

    parts = [_lines(runs, "training loss", "nats per token", training)]
    axes, said = new_panel(), []
    for run, color in zip(runs, _colors(runs), strict=True):
        known = {record["step"]: record.get("tokens") for record in run.train}
        evals = [record | {"step": known.get(record["step"])} for record in run.evals]  # over tokens, not over steps
        losses = draw_heldout(axes, Run({}, {}, [], evals), color, run.name[:40])
        if seen(losses):
            said.append(f"{run.name} {last_of(losses, '.4g')}")
    if said:
        axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
        panel = finish(axes, "held-out loss", "nats per token", "tokens")
        parts.append(([panel], [f"held-out loss: {', '.join(said)}"]))
    return _joined(parts, "No run has recorded a loss.")


def draw_load(runs: Runs) -> Drawn | str:
    """Draw the balance loss and the load of the busiest expert."""
    parts = [
        _lines(runs, "balance loss", "1.0 = balanced", lambda run: numbers(run.train, "balance")),
        _lines(runs, "busiest expert", "load / mean load", lambda run: numbers(run.train, "max_over_mean")),
    ]
    for panels, _ in parts:
        for panel in panels:
            panel.axes[0].axhline(1.0, color=FAINT, linestyle="--", linewidth=1.2)
    if all(flat(numbers(run.train, "max_over_mean"), 1.0) for run in runs):
        return "No run has experts whose load could be uneven."
    return _joined(parts, "No run has recorded the load of its experts.")


def draw_speed(runs: Runs) -> Drawn | str:
    """Draw speed and memory."""
    parts = [
        _lines(runs, "tokens per second", "all devices", lambda run: numbers(run.train, "tokens_per_s"), 0),
        _lines(runs, "TFLOP/s", "per device", lambda run: numbers(run.train, "tflops_per_device"), 0),
        _lines(runs, "MFU", "% of the device's peak", lambda run: 100 * numbers(run.train, "mfu"), 0),
        _lines(runs, "memory", "GiB", lambda run: numbers(run.train, "memory_bytes") / (1 << 30), 0),
    ]
    return _joined(parts, "No run has recorded its speed.")


PLOTS = (
    Plot(
        "loss",
        "Loss",
        "Over the tokens that each run has read, so that runs with other batch sizes can be compared. Bars are two "
        "standard deviations of a held-out loss: losses whose bars overlap widely may be equal. Held-out losses of "
        "runs with other text or another tokenizer are of different things.",
        draw_losses,
    ),
    Plot("load", "Load", "At 1.0, every expert has the same load over the whole step.", draw_load),
    Plot(
        "speed",
        "Speed and memory",
        "Compare MFU and TFLOP/s between models of different sizes, and tokens per second between runs of one model.",
        draw_speed,
    ),
)


def comparison_of(runs: Runs) -> list[str]:
    """Return the parts of the page that compares runs."""
    shown, left_out = figures_of(PLOTS, runs)
    return [_results(runs), shown, left_out, _differences(runs)]


def _table(rows: list[list[str]], number: bool) -> str:
    cell = '<td class="n">' if number else "<td>"
    head = "".join(f"<th{' class=n' if number and i else ''}>{html.escape(c)}</th>" for i, c in enumerate(rows[0]))
    body = "".join(
        f"<tr><td>{html.escape(row[0])}</td>" + "".join(f"{cell}{html.escape(c)}</td>" for c in row[1:]) + "</tr>"
        for row in rows[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _results(runs: Runs) -> str:
    rows = [["run", "step", "tokens", "training loss", "held-out loss", "max/mean", "tokens/s", "MFU"]]
    for run in runs:
        train, bar = run.train[-1:], numbers(run.evals[-1:], "loss_std")
        heldout = last_of(numbers(run.evals, "loss"), ".4f")
        rate = numbers(run.train, "tokens_per_s")
        rows.append(
            [
                run.name,
                last_of(numbers(train, "step"), ".0f"),
                short_count(_tokens(train)[-1]) if seen(_tokens(train)) else "-",
                last_of(numbers(run.train, "loss"), ".4f"),
                heldout + (f" \u00b1 {2 * bar[-1]:.4f}" if seen(bar) else ""),
                last_of(numbers(train, "max_over_mean")),
                f"{np.nanmedian(rate):,.0f}" if seen(rate) else "-",
                last_of(100 * numbers(run.train, "mfu"), ".1f") + " %" if seen(numbers(run.train, "mfu")) else "-",
            ]
        )
    return f"<section id='results'><h2>Results</h2>{_table(rows, True)}</section>"


def _differences(runs: Runs) -> str:
    """Return the settings that are not the same in all runs."""
    settings = [dict(dotted(run.run.get("config") or {})) for run in runs]
    names = list(dict.fromkeys(name for each in settings for name in each))
    texts = {name: [option_text(each[name]) if name in each else "-" for each in settings] for name in names}
    rows = [[name, *values] for name, values in texts.items() if len(set(values)) > 1]
    body = _table([["setting", *(run.name for run in runs)], *rows], False) if rows else "<p>All are the same.</p>"
    return f"<section id='settings'><h2>Settings that differ</h2>{body}</section>"
