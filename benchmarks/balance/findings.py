"""Turns the records of ``global_balance.py`` into a table and a list of the paper's findings.

"The paper" is arXiv 2501.11873.
"""

# A record: {"arm", "seed", "size", "parameters", "evaluations": [what arms.measure returns, with "step"]}.

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks.balance.arms import ARMS, BATCH, RANK
from benchmarks.shared.records import rounded
from equimoe.launch.text import counted

Record = dict[str, Any]
MICRO, GLOBAL = "sync-4", "sync-512"
#: arms by the number of sequences whose counts are added up
SYNCHRONISED = (MICRO, "sync-16", "sync-32", "sync-128", GLOBAL)
#: the paper's perplexities of the 3.4B-A0.6B model after 120B tokens: Tables 1, 2 and 4
PAPER = {
    MICRO: 8.167,
    "sync-32": 8.062,
    GLOBAL: 8.038,
    "bias-micro": 8.521,
    "bias-global": 8.080,
    "shuffled": 8.041,
    "micro-half": 8.154,
    "micro-eighth": 8.159,
}


class Finding(NamedTuple):
    """One of the paper's findings, and whether each seed reproduces it."""

    claim: str
    #: the measured values, mean over seeds
    measured: str
    #: for each seed
    holds: list[bool]

    @property
    def verdict(self) -> str:
        word = "yes" if all(self.holds) else "not always" if any(self.holds) else "NO"
        return f"{word}, {sum(self.holds)} of {counted(len(self.holds), 'seed')}"


class Runs:
    """All complete runs by arm and seed."""

    def __init__(self, found: Sequence[Record]) -> None:
        self.by_arm: dict[str, dict[int, Record]] = {}
        for record in found:
            self.by_arm.setdefault(record["arm"], {})[record["seed"]] = record
        self.by_arm = {name: self.by_arm[name] for name in ARMS if name in self.by_arm}
        self.size = found[0]["size"]

    def have(self, *arms: str) -> list[int]:
        """Return the seeds for which all of these arms are complete."""
        seeds = [set(self.by_arm.get(arm, {})) for arm in arms]
        return sorted(set.intersection(*seeds))

    def synchronised(self) -> list[str]:
        return [arm for arm in SYNCHRONISED if arm in self.by_arm]

    def last(self, arm: str, seed: int, *keys: str) -> float:
        """Return a value of the run's last evaluation."""
        value = self.by_arm[arm][seed]["evaluations"][-1]
        for key in keys:
            value = value[key]
        return float(value)

    def values(self, arm: str, *keys: str) -> list[float]:
        return [self.last(arm, seed, *keys) for seed in self.have(arm)]

    def differences(self, arm: str, other: str, *keys: str) -> list[float]:
        """Return arm - other for each seed. Runs of one seed start with the same weights and see the same data."""
        return [self.last(arm, seed, *keys) - self.last(other, seed, *keys) for seed in self.have(arm, other)]


def with_spread(values: Sequence[float], spec: str) -> str:
    """Return mean +- standard deviation."""
    if not values:
        return "-"
    text = format(mean(values), spec)
    return f"{text} \u00b1 {stdev(values):{spec.strip('+')}}" if len(values) > 1 else text


def paper_difference(arm: str) -> float | None:
    """Return the paper's loss in nats minus that of its micro-batch balancing."""
    return math.log(PAPER[arm] / PAPER[MICRO]) if arm in PAPER else None


# ---- the paper's findings

#: claim, and arms from the highest to the lowest held-out loss
LOSS_FALLS = (
    ("a smaller coefficient does not close the gap (half)", ("micro-half", GLOBAL)),
    ("a smaller coefficient does not close the gap (an eighth)", ("micro-eighth", GLOBAL)),
    ("global + 1 % micro-batch is still below micro-batch", (MICRO, "with-micro")),
    ("loss-free bias with global counts is below micro-batch counts", ("bias-micro", "bias-global")),
    ("loss-free bias with global counts is above the global loss", ("bias-global", GLOBAL)),
)
#: claim, the arm between MICRO and GLOBAL, keys of a value that should rise from MICRO to GLOBAL
RISES = (
    ("divergence between domains in bits: micro < loss-free global < global", "bias-global", ("divergence",)),
    ("largest share of a domain's choices: micro < loss-free global < global", "bias-global", ("max_frequency",)),
    ("score sum of the chosen experts: micro < loss-free global < global", "bias-global", ("score_sum",)),
    ("straggler of 8 expert-parallel ranks: micro < global + 1 % micro < global", "with-micro", ("straggler", "8")),
)


def findings(runs: Runs) -> list[Finding]:
    """Check the paper's findings; those whose arms are missing are left out."""
    found = [_ordered(runs, "held-out loss: global is below micro-batch", (MICRO, GLOBAL), "loss")]
    found.append(_ordered(runs, "held-out loss falls with every larger balance batch", runs.synchronised(), "loss"))
    found.append(_saturates(runs))
    closer = {"shuffled": "shuffled control", "rolling": "estimator rolling", "carry": "estimator carry"}
    found += [_closer(runs, f"{name} is closer to global than to micro-batch", arm) for arm, name in closer.items()]
    found += [_ordered(runs, f"held-out loss: {claim}", arms, "loss") for claim, arms in LOSS_FALLS]
    found += [_ordered(runs, claim, (GLOBAL, middle, MICRO), *keys) for claim, middle, keys in RISES]
    return [one for one in found if one is not None]


def _ordered(runs: Runs, claim: str, arms: Sequence[str], *keys: str) -> Finding | None:
    """Check whether a value falls from each arm to the next."""
    seeds = runs.have(*arms) if len(arms) > 1 else []
    if not seeds:
        return None
    rows = [[runs.last(arm, seed, *keys) for arm in arms] for seed in seeds]
    spec = ".4f" if keys == ("loss",) else ".3f"
    measured = ", ".join(f"{arm} {mean(row[i] for row in rows):{spec}}" for i, arm in enumerate(arms))
    return Finding(claim, measured, [all(a > b for a, b in zip(row, row[1:], strict=False)) for row in rows])


def _closer(runs: Runs, claim: str, arm: str) -> Finding | None:
    seeds = runs.have(arm, MICRO, GLOBAL)
    if not seeds:
        return None
    to_global = [runs.last(arm, seed, "loss") - runs.last(GLOBAL, seed, "loss") for seed in seeds]
    to_micro = [runs.last(arm, seed, "loss") - runs.last(MICRO, seed, "loss") for seed in seeds]
    measured = f"{with_spread(to_global, '+.4f')} from global, {with_spread(to_micro, '+.4f')} from micro-batch"
    return Finding(claim, measured, [abs(g) < abs(m) for g, m in zip(to_global, to_micro, strict=True)])


def _saturates(runs: Runs) -> Finding | None:
    """Check whether a few ranks achieve more than half of the gain."""
    if not runs.have(MICRO, "sync-32", GLOBAL):
        return None

    def shares(arm: str) -> list[float]:
        seeds = runs.have(MICRO, arm, GLOBAL)
        micro, here, whole = ([runs.last(name, seed, "loss") for seed in seeds] for name in (MICRO, arm, GLOBAL))
        return [(m - h) / (m - w) for m, h, w in zip(micro, here, whole, strict=True)]

    arms = runs.synchronised()[1:-1]
    text = ", ".join(f"{ARMS[arm].sequences}: {with_spread(shares(arm), '.0%')}" for arm in arms)
    claim = f"the gain saturates: {32 // RANK} of {BATCH // RANK} ranks achieve more than half of it"
    return Finding(claim, f"share of the gain by sequences: {text}", [s > 0.5 for s in shares("sync-32")])


# ---- text

#: column -> its cell, from (runs, arm)
COLUMNS: dict[str, Callable[[Runs, str], str]] = {
    "balanced over": lambda runs, arm: str(ARMS[arm].sequences or "-"),
    "held-out loss": lambda runs, arm: with_spread(runs.values(arm, "loss"), ".4f"),
    "minus micro-batch": lambda r, arm: with_spread(r.differences(arm, MICRO, "loss"), "+.4f") if arm != MICRO else "0",
    "paper, minus micro-batch": lambda runs, arm: "-" if (d := paper_difference(arm)) is None else f"{d:+.4f}",
    "divergence, bits": lambda runs, arm: with_spread(runs.values(arm, "divergence"), ".3f"),
    "largest share": lambda runs, arm: with_spread(runs.values(arm, "max_frequency"), ".3f"),
    "score sum": lambda runs, arm: with_spread(runs.values(arm, "score_sum"), ".3f"),
    f"loss over {RANK}": lambda runs, arm: with_spread(runs.values(arm, "balance", str(RANK)), ".3f"),
    f"loss over {BATCH}": lambda runs, arm: with_spread(runs.values(arm, "balance", str(BATCH)), ".3f"),
    "straggler, 8 ranks": lambda runs, arm: with_spread(runs.values(arm, "straggler", "8"), ".2f"),
    "max/mean": lambda runs, arm: with_spread(runs.values(arm, "max_over_mean"), ".2f"),
}


def markdown(runs: Runs, facts: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    size, some = runs.size, next(iter(next(iter(runs.by_arm.values())).values()))
    seeds = max(len(of_arm) for of_arm in runs.by_arm.values())
    domains = ", ".join(some["evaluations"][0]["domain_loss"])
    tokens = size["steps"] * BATCH * size["seq_len"] / 1e6
    lines = [
        "# Balance over the micro-batch and over the global batch",
        "",
        f"{some['parameters']:,} parameters, of which {some['active_parameters']:,} are active per token; "
        f"{size['layers']} MoE layers of {size['experts']} experts, top-{size['top_k']}. {size['steps']} steps of "
        f"{BATCH} sequences of {size['seq_len']} bytes ({tokens:.1f}M tokens), {counted(seeds, 'seed')}. "
        f"{facts['cpu']}, torch {facts['versions']['torch']}, Python {facts['python']}, commit {facts['commit']}.",
        "",
        f"Loss in nats per byte of held-out text, mean over domains ({domains}), \u00b1 standard deviation over seeds. "
        "Differences are computed per seed. The paper's column has differences of the logarithms of its perplexities "
        "(3.4B-A0.6B, 120B tokens). Loss over n: the balance loss, with the load of n held-out sequences. Straggler: "
        f"rows of the busiest of 8 expert-parallel ranks with {RANK} sequences each, divided by the mean.",
        "",
        "| arm | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for arm in runs.by_arm:
        cells = " | ".join(cell(runs, arm) for cell in COLUMNS.values())
        lines.append(f"| {arm}: {ARMS[arm].label} | {cells} |")
    if differences := runs.differences("exact", GLOBAL, "loss"):
        rms = math.sqrt(mean(d * d for d in differences))
        lines += [
            "",
            f"Noise level: `exact` and `{GLOBAL}` have the same gradient, computed in a different order, but they end "
            f"{rms:.4f} apart (root mean square over seeds). Smaller differences between arms are not significant.",
        ]
    lines += ["", "## Which of the paper's findings are reproduced", "", "| finding | here | holds |", "|---|---|---|"]
    lines += [f"| {one.claim} | {one.measured} | {one.verdict} |" for one in findings(runs)]
    incomplete = [f"{arm} ({len(of_arm)})" for arm, of_arm in runs.by_arm.items() if len(of_arm) < seeds]
    if incomplete:
        lines += ["", f"Arms with fewer than {seeds} seeds: {', '.join(incomplete)}."]
    return "\n".join(lines) + "\n"


def write(found: Sequence[Record], facts: dict[str, Any], stem: Path) -> str:
    """Write ``stem``.json and .md; return the text."""
    runs = Runs(found)
    text = markdown(runs, facts)
    result = {"facts": facts, "runs": [_without_routing(record) for record in found]}
    stem.with_suffix(".json").write_text(json.dumps(rounded(result), separators=(",", ":")) + "\n")
    stem.with_suffix(".md").write_text(text)
    return text


def _without_routing(record: Record) -> Record:
    """Remove the table of domains and experts from all evaluations but the last."""
    *before, last = record["evaluations"]
    return record | {"evaluations": [{k: v for k, v in one.items() if k != "routing"} for one in before] + [last]}
