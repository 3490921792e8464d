"""Draws the README's picture from the results of ``global_balance.py``: ``python benchmarks/balance/picture.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.checkout import ROOT
from benchmarks.shared.options import Parser
from equimoe.launch.env import command

RESULTS, PICTURE = ROOT / "benchmarks" / "results" / "global_balance.json", ROOT / "docs" / "specialisation.png"
#: arm -> title
PANELS = {"sync-4": "balanced over a micro-batch", "sync-512": "balanced over the global batch"}
LAYER = 1


def last(runs: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    """Return the last evaluation of every seed."""
    return [run["evaluations"][-1] for run in runs if run["arm"] == arm]


def draw(runs: list[dict[str, Any]], file: Path) -> None:
    """Draw which experts each domain uses under both ways to balance, and the held-out loss of both."""
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), width_ratios=[2, 2, 1], layout="constrained")
    for panel, (arm, title) in zip(axes, PANELS.items(), strict=False):
        routing = last(runs, arm)[0]["routing"]
        shares = [routing[domain][LAYER] for domain in routing]
        image = panel.imshow(shares, aspect="auto", vmin=0, vmax=0.15)
        panel.set_title(title)
        panel.set_yticks(range(len(routing)), list(routing) if panel is axes[0] else [])
        panel.set_xlabel("expert")
    figure.colorbar(image, ax=axes[1], label="share of a domain's choices")
    losses = [[found["loss"] for found in last(runs, arm)] for arm in PANELS]
    names, errors = ["micro-batch", "global"], [stdev(of_arm) for of_arm in losses]
    axes[2].errorbar(names, [mean(of_arm) for of_arm in losses], yerr=errors, fmt="o", capsize=5)
    axes[2].margins(x=0.5)
    axes[2].set_title("held-out loss")
    axes[2].set_ylabel("nats per byte")
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


@command
def main(argv: list[str] | None = None) -> None:
    Parser(__doc__).parse_args(argv)
    draw(json.loads(RESULTS.read_text())["runs"], PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    main()
