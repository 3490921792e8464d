"""Renders a run's metrics as one HTML page: ``python -m equimoe.launch.report RUN_DIR`` writes RUN_DIR/report.html.

The page is self-contained and needs no network. It contains each figure twice, for light and for dark screens.
"""

from __future__ import annotations

import base64
import html
import io
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ..moe.observe.metrics import write_atomically
from ..moe.observe.printable import printable, short_count
from ..moe.observe.progress import duration
from . import env, figures, routing_figures
from .figures import DARK, LIGHT, Drawn, Run, Style, numbers
from .text import counted, option_text

REPORT_FILE = "report.html"

CSS = """
:root {
  color-scheme: light dark;
  --text: #24292f; --quiet: #5b646e; --page: #f6f7f8; --card: #ffffff; --line: #dfe3e7;
}
@media (prefers-color-scheme: dark) {
  :root { --text: #dfe3e8; --quiet: #9aa4af; --page: #101317; --card: #181c22; --line: #2c333b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 8px; }
.quiet, figcaption { color: var(--quiet); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 12px; margin: 20px 0; }
.cards div, section, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.cards div { padding: 12px 16px; }
.cards b { display: block; font-size: 1.5rem; font-weight: 600; }
.cards span { color: var(--quiet); font-size: .88rem; }
section, figure { margin: 0 0 18px; padding: 18px 20px; overflow-x: auto; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: .93rem; margin-top: 10px; max-width: 90ch; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; color: var(--quiet); }
td.n, th.n { text-align: right; }
"""


@dataclass(frozen=True)
class Plot:
    """One figure of the report: its id, its heading, a caption that says what to look for, and its drawing function."""

    id: str
    title: str
    caption: str
    draw: Callable[[Run, Style], Drawn | str]


PLOTS = (
    Plot(
        "loss",
        "Loss",
        "Both curves should fall together. A training loss far below the held-out loss means that the model memorises "
        "its training text. The dashed line is a bigram table counted on the training text: a model below it has "
        "learnt more than which token follows which. In long runs the training curve is smoothed, and the raw values "
        "are drawn faintly behind it.",
        figures.draw_loss,
    ),
    Plot(
        "domain-loss",
        "Loss by domain",
        "Lines are training, dots are held-out text. Some domains are easier to predict than others. Look for one "
        "whose loss stops falling while the others still improve.",
        figures.draw_domains,
    ),
    Plot(
        "balance",
        "Load balance",
        "Left: the balance loss over the whole step. It is 1.0 when every expert gets the same share, and at most the "
        "number of experts divided by top-k. Right: the load of the busiest expert over the whole step, divided by the "
        "mean load. Both should fall early and stay low.",
        figures.draw_balance,
    ),
    Plot(
        "evenness",
        "How even the load is",
        "Three measures of each layer's load over the whole step. The coefficient of variation should fall towards 0, "
        "the entropy should rise to 1, and no expert should be without a token after the first steps. Look for a layer "
        "that differs from the others.",
        routing_figures.draw_evenness,
    ),
    Plot(
        "losses",
        "Balance losses",
        "Left: each loss without its coefficient, computed from the load that it used. Solid lines are trained on, "
        "dashed ones are for comparison only. Under global balance the micro-batch loss stays above the global one; "
        "this gap is the room that experts have to specialise, and balancing every micro-batch closes it. Next: what "
        "each loss adds to the training loss, coefficient included. It should be small compared with the loss itself.",
        routing_figures.draw_losses,
    ),
    Plot(
        "estimator",
        "Balance batch size",
        "Left: the number of sequences over which the main loss counted its load, averaged over the backward passes of "
        "a step. The dashed line is the whole step; the number is higher if the previous step is used as well. In "
        "published experiments, models improve up to about a hundred sequences. Right: the difference between the load "
        "that was used and the load of the whole step; it is 0 for exact counts.",
        routing_figures.draw_estimator,
    ),
    Plot(
        "straggler",
        "Ranks waiting for the busiest one",
        "Left: rows of the busiest expert-parallel rank in one micro-batch, divided by the mean of its group; 1 when "
        "even. Dashed lines project the same routing to other numbers of ranks. They assume that all ranks share one "
        "micro-batch, so they are rather too high. This imbalance is the price of global balance; a small micro-batch "
        "loss (balance.extra.micro, 1 % of the main coefficient) reduces it. Right: the time lost, estimated from "
        "floating-point operations alone. It is valid if experts are compute-bound and ranks do nothing else while "
        "they wait. With replicas of experts, the dotted line on the left is what the ranks would have without them.",
        routing_figures.draw_straggler,
    ),
    Plot(
        "ranks",
        "Slow ranks",
        "How long each rank worked in a step instead of waiting for others, as a multiple of the median rank. All rows "
        "should have the neutral colour of 1. An orange row is a rank for which all others wait: look at its machine, "
        "its data, and the experts that it owns. Work that runs on a GPU by itself is not seen.",
        figures.draw_ranks,
    ),
    Plot(
        "load",
        "Load of every expert over time",
        "One row per expert: orange is more than the mean load, blue is less. The colours should fade to the neutral "
        "colour of 1. A row that stays blue is an expert that gets too few tokens to learn; one orange row among many "
        "blue ones is a collapse of the router.",
        figures.draw_load,
    ),
    Plot(
        "routing",
        "Which experts each domain uses",
        "How often each domain chooses each expert in the last evaluation on held-out text, as a multiple of the "
        "uniform share. Rows that differ from each other mean that experts have specialised. Global balance allows "
        "this; micro-batch balance keeps all rows near 1.0.",
        figures.draw_routing,
    ),
    Plot(
        "divergence",
        "How differently the domains are routed",
        "Left: the Jensen-Shannon divergence between two domains' use of the experts, averaged over all pairs: 0 if "
        "all domains use the same experts, 1 bit if they share none. A rising line means growing specialisation. "
        "Middle: the share of a domain's choices that goes to its most used expert; the dashed line is uniform use. "
        "Right: the divergence of each pair of domains; related domains should stay close.",
        routing_figures.draw_divergence,
    ),
    Plot(
        "scores",
        "Confidence of the router",
        "The total probability of a token's chosen experts, averaged over tokens. At the dashed line, top-k divided by "
        "the number of experts, the router gives all experts the same score. A line that stays there means that the "
        "balance loss is too strong, or counted over too few tokens, to let the router learn. Near 1 the router is "
        "confident.",
        routing_figures.draw_scores,
    ),
    Plot(
        "optimizer",
        "Gradient and learning rate",
        "Clipping limits single peaks of the gradient norm. A norm that keeps growing often precedes a diverging loss.",
        figures.draw_optimizer,
    ),
)


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from ``run_dir/metrics.jsonl`` and return its path.

    A sentence takes the place of each figure for which the run has no records yet. Raises ValueError if there are no
    metrics, and OSError if the page cannot be written; an earlier page is then kept.
    """
    run_dir = Path(run_dir)
    run = Run.read(run_dir)
    path = run_dir / REPORT_FILE
    write_atomically(path, _page(run, printable(run_dir.resolve().name)).encode(errors="backslashreplace"))
    return path


def _page(run: Run, name: str) -> str:
    title = html.escape(name)
    return "\n".join(
        [
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{CSS}</style></head><body><main>",
            f"<h1>{title}</h1>",
            *(_or_why_not(part, run) for part in (_subtitle, _cards, _domain_table)),
            *(_or_why_not(partial(_figure, plot=plot), run) for plot in PLOTS),
            _or_why_not(_settings, run),
            "</main></body></html>\n",
        ]
    )


#: what a record with other types than expected raises, as in a file that somebody else has written
MALFORMED = (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)


def _or_why_not(part: Callable[[Run], str], run: Run) -> str:
    """Return a part of the page, or a sentence that says why it is missing."""
    try:
        return part(run)
    except MALFORMED as error:
        reason = html.escape(printable(f"{type(error).__name__}: {error}"[:200]))
        return f"<section><p>The records for this part have an unexpected form ({reason}).</p></section>"


# ---- numbers


def _last(values: Any) -> float | None:
    finite = [float(value) for value in values if math.isfinite(value)]
    return finite[-1] if finite else None


def _text(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _subtitle(run: Run) -> str:
    done, planned = _last(numbers(run.train, "step")), run.option("steps")
    parts = ["no training step yet" if done is None else f"step {done:.0f}" + (f" of {planned}" if planned else "")]
    if (seen := _last(numbers(run.train, "tokens"))) is not None:
        parts.append(f"{short_count(seen)} tokens")
    if (elapsed := _last(numbers(run.train, "elapsed_s"))) is not None:
        parts.append(duration(elapsed))
    if world := run.run.get("world_size"):
        parts.append(counted(world, "process"))
    broken = sum(bool(record.get("nonfinite")) for record in run.train)
    if broken:
        parts.append(f"{counted(broken, 'record')} with numbers that are not finite")
    return f'<p class="quiet">{html.escape(" | ".join(parts))}</p>'


def _cards(run: Run) -> str:
    train, heldout = numbers(run.train, "loss"), _last(numbers(run.evals, "loss"))
    bigram, last = run.bigram.get("all"), run.train[-1] if run.train else {}
    layers = last.get("layers") or []
    tail = train[-max(1, len(train) // 20) :]  # average the last 5 % of records, because a single one is noisy
    mean = float(np.nanmean(tail)) if np.isfinite(tail).any() else None
    cards = [(_text(mean, ".3f"), "training loss at the end")]
    cards.append((_text(heldout, ".3f"), "held-out loss (nats per token)"))
    if heldout is not None and run.option("data", "tokenizer") == "bytes":
        cards.append((f"{heldout / math.log(2):.2f}", "bits per byte, held-out text"))
    if heldout is not None and bigram is not None:
        cards.append((f"{heldout - bigram:+.2f}", "nats relative to the bigram table (below 0 is better)"))
    rate = numbers(run.train, "tokens_per_s")[1:]
    if np.isfinite(rate).any():
        cards.append((f"{np.nanmedian(rate):,.0f}", "tokens per second (median)"))
    if layers:
        total = sum(len(layer["counts"]) for layer in layers)
        cards.append((_text(last.get("max_over_mean"), ".2f"), "busiest expert / mean, worst layer"))
        cards += _balance_cards(run)
        cards.append((f"{sum(layer.get('dead') or 0 for layer in layers):.0f} of {total}", "dead experts at the end"))
    items = (f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>" for value, label in cards)
    return f'<div class="cards" id="summary">{"".join(items)}</div>'


def _balance_cards(run: Run) -> list[tuple[str, str]]:
    """Return the cards about balance for which the run has records."""
    parts = (
        ("balance_sequences", 1, ".3g", "sequences over which the load is counted"),
        ("straggler", 1, ".2f", "busiest rank / mean, in a micro-batch"),
        ("waiting", 100, ".1f", "% of a step's time spent waiting (estimate)"),
    )
    found = [(_last(numbers(run.train, name) * scale), spec, label) for name, scale, spec, label in parts]
    cards = [(_text(value, spec), label) for value, spec, label in found if value is not None]
    seen = [record["divergence"] for record in run.evals if isinstance(record.get("divergence"), list)]
    bits = numbers([{"of": value} for value in seen[-1]], "of") if seen else np.array([])
    if np.isfinite(bits).any():
        cards.append((f"{np.nanmean(bits):.3f}", "bits of divergence between domains"))
    return cards


def _domain_table(run: Run) -> str:
    head = "<section id='domains'><h2>Held-out loss by domain</h2>"
    if not run.evals:
        return head + "<p>There is no evaluation yet.</p></section>"
    last = run.evals[-1]
    rows = {"all": {"loss": last.get("loss")}, **dict(sorted((last.get("domains") or {}).items()))}
    lines = []
    for domain, entry in rows.items():
        loss, bigram = entry.get("loss"), run.bigram.get(domain)
        gap = None if loss is None or bigram is None else loss - bigram
        cells = (_text(loss, ".3f"), _text(bigram, ".3f"), _text(gap, "+.3f"), short_count(entry.get("tokens")))
        lines.append(
            f"<tr><td>{html.escape(domain)}</td>" + "".join(f'<td class="n">{c}</td>' for c in cells) + "</tr>"
        )
    names = ("held-out loss", "bigram table", "difference", "tokens")
    columns = "".join(f'<th class="n">{name}</th>' for name in names)
    return (
        f"{head}<table><thead><tr><th>domain</th>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        f'<p class="quiet">Nats per token at step {last["step"]}. The bigram table is counted on the training text.</p>'
        "</section>"
    )


def _settings(run: Run) -> str:
    """Format the configuration as a table with one row per section."""
    config = run.run.get("config")
    if not isinstance(config, dict):
        return "<section id='settings'><h2>Settings</h2><p>The run has not recorded its configuration.</p></section>"
    sections = dict(_sections("", config))
    sizes = {"parameters": run.run.get("parameters"), "active per token": run.run.get("active_parameters")}
    sections["size"] = {name: short_count(count) for name, count in sizes.items() if count is not None}
    sections["versions"] = run.run.get("versions") or {}
    rows = []
    for name, values in sections.items():
        items = ", ".join(f"{key} {option_text(value)}" for key, value in values.items())
        if items:
            rows.append(f"<tr><th>{html.escape(name)}</th><td>{html.escape(items)}</td></tr>")
    return f"<section id='settings'><h2>Settings</h2><table>{''.join(rows)}</table></section>"


def _sections(name: str, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each section's own fields, and then the sections inside it."""
    yield name or "run", {key: value for key, value in config.items() if not isinstance(value, dict)}
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _sections(f"{name}.{key}" if name else key, value)


# ---- pictures


def _figure(run: Run, plot: Plot) -> str:
    head = f'<figure id="{plot.id}"><h2>{plot.title}</h2>'
    images = []
    for style in (LIGHT, DARK):
        image = _image(run, plot, style)
        if isinstance(image, str):
            return f"{head}<p>{html.escape(image)}</p></figure>"
        images.append(image)
    (light, alt), (dark, _) = images
    return (
        f'{head}<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(alt)}"></picture><figcaption>{plot.caption}</figcaption></figure>'
    )


def _image(run: Run, plot: Plot, style: Style) -> tuple[str, str] | str:
    """Return the data URI and alt text of a plot, or a sentence that says why there is no figure."""
    with matplotlib.rc_context(style.rc()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # domain names may use any script
        drawn = plot.draw(run, style)
        if isinstance(drawn, str):
            return drawn
        figure, alt = drawn
        png = io.BytesIO()
        figure.savefig(png, format="png")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}", alt


@env.command
def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 64 for wrong usage, 66 for no metrics, 73 if the page cannot be written."""
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["-h"], ["--help"]):
        print("usage: python -m equimoe.launch.report RUN_DIR\nWrites RUN_DIR/report.html from RUN_DIR/metrics.jsonl.")
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        print("report: give one folder of a run: python -m equimoe.launch.report RUN_DIR", file=sys.stderr)
        return env.CONFIG
    try:
        print(f"report: {write_report(Path(argv[0]))}")
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return env.DATA
    except OSError as error:
        print(f"report: {error.filename or argv[0]}: cannot be written ({error.strerror})", file=sys.stderr)
        return env.CANNOT_WRITE
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
