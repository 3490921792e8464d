"""The page of a report: its summary, its figures, and the run's settings, as one HTML file without other files."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..moe.observe.printable import printable, short_count
from ..moe.observe.progress import duration
from . import figures, routing_figures
from .panels import COLD, HOT, MEAN, VARIABLES, Plot, draw, figure_html
from .records import Run, numbers
from .text import counted, option_text

CSS = """
:root { color-scheme: light dark; --quiet: #5b646e; --page: #f6f7f8; --card: #ffffff; --line: #dfe3e7; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --quiet: #9aa4af; --page: #101317; --card: #181c22; --line: #2c333b; DARK }
  figure image, .scale i { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 8px; }
h1 + .quiet { margin-top: -8px; }
.quiet, figcaption, .scale { color: var(--quiet); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 20px 0; }
.cards div, section, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.cards div { padding: 12px 16px; }
.cards b { display: block; font-size: 1.5rem; font-weight: 600; }
.cards span { color: var(--quiet); font-size: .88rem; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; margin-bottom: 18px; }
section, figure { margin: 0; padding: 18px 20px; min-width: 0; }
section { margin-bottom: 18px; overflow-x: auto; }
.wide { grid-column: 1 / -1; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 10px 24px; }
.pairs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.panels svg { display: block; width: 100%; height: auto; max-width: 560px; }
.panels svg text { font-family: system-ui, sans-serif !important; }
.scale { font-size: .88rem; margin: 8px 0 0; }
.scale i { display: inline-block; width: 90px; height: 11px; margin-right: 8px; border-radius: 2px;
  background: linear-gradient(90deg, COLD, MEAN, HOT); }
figcaption { font-size: .93rem; margin-top: 10px; max-width: 90ch; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--quiet); }
td.n, th.n { text-align: right; white-space: nowrap; overflow-wrap: normal; }
@media (max-width: 860px) { .figures { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 600px) {
  main { padding: 20px 10px 40px; }
  section, figure { padding: 14px 12px; }
  th, td { padding-right: 8px; font-size: .9rem; }
  td:first-child { min-width: 6.5em; }
  th.n { white-space: normal; }
}
"""
for _name, _light, _dark in VARIABLES.values():
    CSS = CSS.replace("LIGHT", f"--{_name}: {_light}; LIGHT").replace("DARK", f"--{_name}: {_dark}; DARK")
CSS = CSS.replace("LIGHT ", "").replace("DARK ", "")
for _name, _value in (("COLD", COLD), ("MEAN", MEAN), ("HOT", HOT)):
    CSS = CSS.replace(_name, _value)

#: no script, and nothing from elsewhere; the live page adds its own script
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

PLOTS = (
    Plot(
        "loss",
        "Loss",
        "Both curves should fall together. A training loss far below the held-out loss means that the model memorises "
        "its training text. The dashed line is a bigram table counted on the training text: a model below it has "
        "learnt more than which token follows which. In long runs the training curve is smoothed, and the raw values "
        "are drawn faintly behind it. Bars of the held-out loss are two standard deviations of its estimate: losses "
        "whose bars overlap widely may be equal.",
        figures.draw_loss,
    ),
    Plot(
        "domain-loss",
        "Loss by domain",
        "Lines are training, dots with error bars are held-out text. Some domains are easier to predict than others. "
        "Look for one whose loss stops falling while the others still improve.",
        figures.draw_domains,
    ),
    Plot(
        "speed",
        "Speed and memory",
        "Tokens per second should be even: dips are slow reading of data, other work on the machine, or ranks that "
        "wait. MFU is the share of the device's dense bf16 peak that the model's own operations use; recomputation "
        "does not count. Memory that keeps growing ends in an error. On a GPU it is the peak of torch's allocations, "
        "on a CPU the process's resident memory, of the rank with the most.",
        figures.draw_speed,
    ),
    Plot(
        "balance",
        "Load balance",
        "First: the balance loss over the whole step. It is 1.0 when every expert gets the same share, and at most the "
        "number of experts divided by top-k. Second: the load of the busiest expert over the whole step, divided by "
        "the mean load. Both should fall early and stay low.",
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
        "First: each loss without its coefficient, computed from the load that it used. Solid lines are trained on, "
        "dashed ones are for comparison only. Under global balance the micro-batch loss stays above the global one; "
        "this gap is the room that experts have to specialise, and balancing every micro-batch closes it. Next: what "
        "each loss adds to the training loss, coefficient included. It should be small compared with the loss itself.",
        routing_figures.draw_losses,
    ),
    Plot(
        "estimator",
        "Balance batch size",
        "First: the number of sequences over which the main loss counted its load, averaged over the backward passes "
        "of a step. The dashed line is the whole step; the number is higher if the previous step is used as well. In "
        "published experiments, models improve up to about a hundred sequences. Next: the difference between the load "
        "that was used and the load of the whole step, which is 0 for exact counts, and gradient_error, approximately "
        "the relative error of the loss's gradient. Near or above 1 the estimate is mostly noise: use more ranks, or "
        "the estimator exact, unless the load is even already.",
        routing_figures.draw_estimator,
    ),
    Plot(
        "straggler",
        "Ranks waiting for the busiest one",
        "First: rows of the busiest expert-parallel rank in one micro-batch, divided by the mean of its group; 1 when "
        "even. Dashed lines project the same routing to other numbers of ranks. They assume that all ranks share one "
        "micro-batch, so they are rather too high. This imbalance is the price of global balance; a small micro-batch "
        "loss (balance.extra.micro, 1 % of the main coefficient) reduces it. Second: the time lost, estimated from "
        "floating-point operations alone. It is valid if experts are compute-bound and ranks do nothing else while "
        "they wait. With replicas of experts, the dotted line in the first panel is what the ranks would have without "
        "them.",
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
        "First: the Jensen-Shannon divergence between two domains' use of the experts, averaged over all pairs: 0 if "
        "all domains use the same experts, 1 bit if they share none. A rising line means growing specialisation. "
        "Second: the share of a domain's choices that goes to its most used expert; the dashed line is uniform use. "
        "Third: the divergence of each pair of domains; related domains should stay close.",
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


def page(title: str, body: Sequence[str], more: str = "") -> str:
    """Return a page with these parts; ``more`` is added to its head."""
    title = html.escape(title)
    return "\n".join(
        [
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{CSS}</style>{more}</head><body><main>",
            f"<h1>{title}</h1>",
            *body,
            "</main></body></html>\n",
        ]
    )


def report_of(run: Run) -> list[str]:
    """Return the parts of the page of one run."""
    shown, left_out = figures_of(PLOTS, run)
    summary = [_or_why_not(part, run) for part in (_subtitle, _cards, _domain_table)]
    return [*summary, shown, left_out, _or_why_not(_settings, run)]


def figures_of(plots: Sequence[Plot], run: Any) -> tuple[str, str]:
    """Return the figures that have something to show, and a list that says why the others have not."""
    shown, left_out = [], []
    for plot in plots:
        try:
            drawn = draw(plot, run)
            text = drawn if isinstance(drawn, str) else figure_html(plot, drawn)
        except MALFORMED as error:
            drawn = text = unexpected(error)
        if isinstance(drawn, str):
            left_out.append(f'<li id="{plot.id}">{plot.title}: {html.escape(text)}</li>')
        else:
            shown.append(text)
    rest = "<section id='left-out'><h2>Not shown</h2><ul>" + "".join(left_out) + "</ul></section>" if left_out else ""
    return f'<div class="figures">{"".join(shown)}</div>', rest


#: what a record with other types than expected raises, as in a file that somebody else has written
MALFORMED = (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)


def _or_why_not(part: Callable[[Run], str], run: Run) -> str:
    """Return a part of the page, or a sentence that says why it is missing."""
    try:
        return part(run)
    except MALFORMED as error:
        return f"<section><p>{html.escape(unexpected(error))}</p></section>"


def unexpected(error: BaseException) -> str:
    reason = printable(f"{type(error).__name__}: {error}"[:200])
    return f"The records for this part have an unexpected form ({reason})."


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
    bar = _last(numbers(run.evals[-1:], "loss_std"))
    shown = _text(heldout, ".3f") + ("" if bar is None else f" \u00b1 {2 * bar:.3f}")
    cards.append((shown, "held-out loss (nats per token)"))
    if heldout is not None and run.option("data", "tokenizer") == "bytes":
        cards.append((f"{heldout / math.log(2):.2f}", "bits per byte, held-out text"))
    if heldout is not None and bigram is not None:
        cards.append((f"{heldout - bigram:+.2f}", "nats relative to the bigram table (below 0 is better)"))
    cards += _speed_cards(run)
    if layers:
        total = sum(len(layer["counts"]) for layer in layers)
        cards.append((_text(last.get("max_over_mean"), ".2f"), "busiest expert / mean, worst layer"))
        cards += _balance_cards(run)
        cards.append((f"{sum(layer.get('dead') or 0 for layer in layers):.0f} of {total}", "dead experts at the end"))
    items = (f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>" for value, label in cards)
    return f'<div class="cards" id="summary">{"".join(items)}</div>'


def _speed_cards(run: Run) -> list[tuple[str, str]]:
    """Return the cards about speed and memory for which the run has records."""
    devices = run.run.get("world_size") or 1
    each = " per device" if devices > 1 else ""
    parts = (
        ("tokens_per_s", 1.0, ",.0f", "tokens per second (median)"),
        ("tokens_per_s_per_device", 1.0, ",.0f", "tokens per second and device (median)") if devices > 1 else (),
        ("tflops_per_device", 1.0, ".3g", f"TFLOP/s{each} (median)"),
        ("mfu", 100.0, ".1f", "% of the device's peak (MFU, median)"),
    )
    cards = []
    for name, scale, spec, label in (part for part in parts if part):
        values = scale * numbers(run.train, name)[1:]  # the first record includes compiling
        if np.isfinite(values).any():
            cards.append((format(np.nanmedian(values), spec), label))
    memory = numbers(run.train, "memory_bytes")
    if np.isfinite(memory).any():
        cards.append((f"{np.nanmax(memory) / (1 << 30):.3g}", "GiB of memory, rank with the most"))
    return cards


def _balance_cards(run: Run) -> list[tuple[str, str]]:
    """Return the cards about balance for which the run has records."""
    parts = (  # a number that says that nothing is uneven needs no card
        ("balance_sequences", 1, ".3g", "sequences over which the load is counted"),
        ("gradient_error", 1, ".2f", "error of the balance gradient (relative)"),
        ("straggler", 1, ".2f", "busiest rank / mean, in a micro-batch"),
        ("waiting", 100, ".1f", "% of a step's time spent waiting (estimate)"),
    )
    found = [(_last(numbers(run.train, name) * scale), spec, label) for name, scale, spec, label in parts]
    nothing = {"straggler": 1.0, "waiting": 0.0, "gradient_error": 0.0}
    skip = [value is None or value == nothing.get(name) for (name, *_), (value, *_) in zip(parts, found, strict=True)]
    cards = [(_text(value, spec), label) for (value, spec, label), gone in zip(found, skip, strict=True) if not gone]
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
    rows = {"all": last, **dict(sorted((last.get("domains") or {}).items()))}
    lines = []
    for domain, entry in rows.items():
        loss, bigram = entry.get("loss"), run.bigram.get(domain)
        gap = None if loss is None or bigram is None else loss - bigram
        bar = _last(numbers([entry], "loss_std"))
        measured = _text(loss, ".3f") + ("" if bar is None else f" \u00b1 {2 * bar:.3f}")
        cells = (measured, _text(bigram, ".3f"), _text(gap, "+.3f"), short_count(entry.get("tokens")))
        lines.append(
            f"<tr><td>{html.escape(domain)}</td>" + "".join(f'<td class="n">{c}</td>' for c in cells) + "</tr>"
        )
    names = ("held-out loss", "bigram table", "difference", "tokens")
    columns = "".join(f'<th class="n">{name}</th>' for name in names)
    return (
        f"{head}<table><thead><tr><th>domain</th>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        f'<p class="quiet">Nats per token at step {last["step"]}, \u00b1 two standard deviations. '
        "The bigram table is counted on the training text.</p>"
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
