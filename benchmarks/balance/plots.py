"""The figures of ``global_balance.py``: Figures 2 and 3 of arXiv 2501.11873 in miniature, and what goes with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.balance.arms import ARMS, BATCH, RANK
from benchmarks.balance.findings import PAPER, PAPER_LONGER, SYNCHRONISED, Runs
from equimoe.launch.figures import COLORS

MICRO, GLOBAL = "sync-4", "sync-512"
#: arms beside the curve of ranks: marker
BESIDE = {
    "shuffled": "s",
    "rolling": "^",
    "carry": "v",
    "exact": "x",
    "with-micro": "D",
    "micro-half": "<",
    "micro-eighth": ">",
}


def draw(runs: Runs, path: Path) -> None:
    """Write the picture; it is empty but for a sentence where the two arms that it compares were not run."""
    panels: tuple[tuple[str, Callable[[Runs, Axes], None]], ...] = (
        ("Held-out loss by balance batch", _losses),
        ("The same beside the paper", _beside_paper),
        ("Balance loss over the steps", _balance),
        ("Straggler by expert-parallel ranks", _stragglers),
        ("Divergence between domains", _divergence),
        ("Score sum of the chosen experts", _score_sums),
        (f"Experts by domain, {MICRO}", lambda r, a: _routing(r, a, MICRO)),
        (f"Experts by domain, {GLOBAL}", lambda r, a: _routing(r, a, GLOBAL)),
    )
    figure = Figure(figsize=(20, 9), layout="constrained", dpi=110)
    for axes, (title, panel) in zip(figure.subplots(2, 4).flat, panels, strict=True):
        axes.set_title(title)
        axes.grid(alpha=0.25)
        if runs.have(MICRO, GLOBAL):
            panel(runs, axes)
        else:
            axes.text(0.5, 0.5, f"needs {MICRO} and {GLOBAL}", ha="center", transform=axes.transAxes)
    figure.savefig(path)


def _bar(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _losses(runs: Runs, axes: Axes) -> None:
    arms = [arm for arm in SYNCHRONISED if arm in runs.by_arm]
    sequences, losses = [ARMS[arm].sequences for arm in arms], [runs.values(arm, "loss") for arm in arms]
    axes.errorbar(sequences, [mean(v) for v in losses], [_bar(v) for v in losses], marker="o", capsize=3, label="ranks")
    for color, (arm, marker) in zip(COLORS[1:], BESIDE.items(), strict=False):
        if arm in runs.by_arm:
            at = ARMS[arm].sequences
            axes.plot(
                at,
                mean(runs.values(arm, "loss")),
                marker,
                color=color,
                label=ARMS[arm].label if arm not in ("rolling", "carry", "exact") else arm,
            )
    _by_sequences(axes, "nats per token")


def _beside_paper(runs: Runs, axes: Axes) -> None:
    arms = [arm for arm in SYNCHRONISED if arm in runs.by_arm and arm != MICRO]
    points = [(RANK, [0.0]), *((ARMS[arm].sequences, runs.differences(arm, MICRO, "loss")) for arm in arms)]
    axes.errorbar(
        [b for b, _ in points],
        [mean(v) for _, v in points],
        [_bar(v) for _, v in points],
        marker="o",
        capsize=3,
        label="here",
    )
    theirs = {ARMS[arm].sequences: math.log(PAPER[arm] / PAPER[MICRO]) for arm in SYNCHRONISED if arm in PAPER}
    axes.plot(list(theirs), list(theirs.values()), "--s", label="paper, 3.4B-A0.6B, 120B tokens")
    longer = {b: math.log(p / PAPER_LONGER[RANK]) for b, p in PAPER_LONGER.items()}
    axes.plot(list(longer), list(longer.values()), ":d", label="paper, 3.4B-A0.6B, 400B tokens")
    _by_sequences(axes, f"nats per token minus those at {RANK}")


def _by_sequences(axes: Axes, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("sequences that are balanced together")
    axes.set_ylabel(label)
    axes.legend(fontsize=8)


def _balance(runs: Runs, axes: Axes) -> None:
    """What each arm's routing costs by the loss of the micro-batch (solid) and of the global batch (dashed)."""
    for color, arm in zip(COLORS, (MICRO, GLOBAL, "to-global", "to-micro"), strict=False):
        if arm not in runs.by_arm:
            continue
        of_seeds = [runs.by_arm[arm][seed]["evaluations"] for seed in runs.have(arm)]
        steps = [one["step"] for one in of_seeds[0]]
        for over, line in ((RANK, "-"), (BATCH, "--")):
            curve = np.mean([[one["balance"][str(over)] for one in of_seed] for of_seed in of_seeds], axis=0)
            axes.plot(steps, curve, line, color=color, label=ARMS[arm].label if line == "-" else None)
    axes.set_xlabel("step")
    axes.set_ylabel(f"balance loss over {RANK} (solid) and {BATCH} (dashed)")
    axes.margins(y=0.3)
    axes.legend(fontsize=8, loc="upper right")


def _stragglers(runs: Runs, axes: Axes) -> None:
    for color, arm in zip(COLORS, (MICRO, "sync-32", "with-micro", GLOBAL), strict=False):
        if arm in runs.by_arm:
            degrees = list(runs.by_arm[arm][runs.have(arm)[0]]["evaluations"][-1]["straggler"])
            found = [runs.values(arm, "straggler", degree) for degree in degrees]
            at = [int(d) for d in degrees]
            axes.errorbar(
                at,
                [mean(v) for v in found],
                [_bar(v) for v in found],
                marker="o",
                capsize=3,
                color=color,
                label=ARMS[arm].label,
            )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("expert-parallel ranks")
    axes.set_ylabel("rows of the busiest over the mean")
    axes.legend(fontsize=8)


def _bars(runs: Runs, axes: Axes, label: str, *keys: str) -> None:
    arms = [arm for arm in runs.by_arm if ARMS[arm].then is None]
    values = [runs.values(arm, *keys) for arm in arms]
    colors = [COLORS[1] if "sync" in arm else COLORS[0] for arm in arms]
    axes.barh(arms, [mean(v) for v in values], xerr=[_bar(v) for v in values], color=colors, capsize=2)
    axes.invert_yaxis()
    axes.set_xlabel(label)


def _divergence(runs: Runs, axes: Axes) -> None:
    _bars(runs, axes, "Jensen-Shannon divergence, bits", "divergence")


def _score_sums(runs: Runs, axes: Axes) -> None:
    _bars(runs, axes, "mean over tokens (bias arms: sigmoid scores normalised to 1)", "score_sum")
    axes.axvline(runs.size["top_k"] / runs.size["experts"], color="black", linewidth=1)


def _routing(runs: Runs, axes: Axes, arm: str) -> None:
    """Share of each domain's choices by expert, in the last layer of the first seed."""
    routing = runs.by_arm[arm][runs.have(arm)[0]]["evaluations"][-1]["routing"]
    table = np.array([of_layer[-1] for of_layer in routing.values()])
    image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=0.15)
    axes.set_yticks(range(len(routing)), list(routing))
    axes.set_xlabel("expert")
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes, fraction=0.04)
