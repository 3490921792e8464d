"""The table, the orderings and the figures of ``global_balance.py``, from the records of its runs."""

# A record: {"arm", "seed", "size", "parameters", "evaluations": [what arms.measure returns, with "step"]}.

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks.balance.arms import ARMS, BATCH, RANK

Record = dict[str, Any]
#: the loss-free bias aside, arms by the number of sequences over which ranks add up their counts
SYNCHRONISED = ("sync-4", "sync-16", "sync-32", "sync-128", "sync-512")
#: perplexities in arXiv 2501.11873 of the 3.4B-A0.6B model after 120B tokens: Table 1, 2 and 4
PAPER = {
    "sync-4": 8.167,
    "sync-32": 8.062,
    "sync-512": 8.038,
    "bias-micro": 8.521,
    "bias-global": 8.080,
    "shuffled": 8.041,
    "micro-half": 8.154,
    "micro-eighth": 8.159,
}
#: the same after 400B tokens, by sequences balanced over (Tables 1 and 3)
PAPER_LONGER = {2: 7.383, 4: 7.347, 128: 7.214, 512: 7.198}


class Ordering(NamedTuple):
    """Something that the paper found, and in how many seeds it is found here."""

    claim: str
    #: what was measured, mean over seeds
    measured: str
    #: for each seed
    holds: list[bool]

    @property
    def verdict(self) -> str:
        word = "yes" if all(self.holds) else "not always" if any(self.holds) else "NO"
        return f"{word}, {sum(self.holds)} of {len(self.holds)} seeds"


class Runs:
    """All complete runs, by arm and seed."""

    def __init__(self, found: Sequence[Record]) -> None:
        self.by_arm: dict[str, dict[int, Record]] = {}
        for record in found:
            self.by_arm.setdefault(record["arm"], {})[record["seed"]] = record
        self.by_arm = {name: self.by_arm[name] for name in ARMS if name in self.by_arm}
        self.size = found[0]["size"]

    def have(self, *arms: str) -> list[int]:
        """The seeds in which all of these arms were run."""
        seeds = [set(self.by_arm.get(arm, {})) for arm in arms]
        return sorted(set.intersection(*seeds))

    def last(self, arm: str, seed: int, *keys: str) -> float:
        value = self.by_arm[arm][seed]["evaluations"][-1]
        for key in keys:
            value = value[key]
        return float(value)

    def values(self, arm: str, *keys: str) -> list[float]:
        return [self.last(arm, seed, *keys) for seed in self.have(arm)]

    def differences(self, arm: str, other: str, *keys: str) -> list[float]:
        """arm - other, seed by seed: their runs saw the same sequences and began with the same weights."""
        return [self.last(arm, seed, *keys) - self.last(other, seed, *keys) for seed in self.have(arm, other)]


def with_spread(values: Sequence[float], spec: str) -> str:
    """``mean +- standard deviation``."""
    if not values:
        return "-"
    text = format(mean(values), spec)
    return f"{text} \u00b1 {stdev(values):{spec.strip('+')}}" if len(values) > 1 else text


def paper_difference(arm: str) -> float | None:
    """What the paper's perplexity says in nats, beside its micro-batch balancing."""
    return math.log(PAPER[arm] / PAPER["sync-4"]) if arm in PAPER else None


# ---- the orderings


def _falling(
    runs: Runs, claim: str, arms: Sequence[str], keys: tuple[str, ...], spec: str, rising: bool = False
) -> list[Ordering]:
    """That the figure falls, or rises, from one arm to the next; nothing where an arm was not run."""
    seeds = runs.have(*arms) if len(arms) > 1 else []
    if not seeds:
        return []
    rows = [[runs.last(arm, seed, *keys) for arm in arms] for seed in seeds]
    sign = -1 if rising else 1
    holds = [all(sign * a > sign * b for a, b in zip(row, row[1:], strict=False)) for row in rows]
    measured = ", ".join(f"{arm} {mean(row[i] for row in rows):{spec}}" for i, arm in enumerate(arms))
    return [Ordering(claim, measured, holds)]


def orderings(runs: Runs) -> list[Ordering]:
    """Which of the paper's orderings are found."""
    found = _falling(runs, "Held-out loss: global below micro-batch", ("sync-4", "sync-512"), ("loss",), ".4f")
    found += _falling(
        runs,
        "Held-out loss falls with every larger balance batch",
        [a for a in SYNCHRONISED if a in runs.by_arm],
        ("loss",),
        ".4f",
    )
    found += _knee(runs)
    found += _closer(runs, "Shuffled control: nearer to global than to micro-batch", "shuffled")
    for arm in ("rolling", "carry"):
        found += _closer(runs, f"Estimator {arm}: nearer to global than to micro-batch", arm)
    for arm in ("micro-half", "micro-eighth"):
        claim = f"A smaller coefficient does not close the gap ({ARMS[arm].label})"
        found += _falling(runs, claim, (arm, "sync-512"), ("loss",), ".4f")
    found += _falling(
        runs, "Global + 1 % micro-batch: still below micro-batch", ("sync-4", "with-micro"), ("loss",), ".4f"
    )
    found += _falling(
        runs, "Loss-free bias: global counts below micro-batch counts", ("bias-micro", "bias-global"), ("loss",), ".4f"
    )
    found += _falling(
        runs, "Loss-free bias with global counts: above the global loss", ("bias-global", "sync-512"), ("loss",), ".4f"
    )
    for title, key in (
        ("divergence between domains (bits)", "divergence"),
        ("largest share of a domain's choices", "max_frequency"),
        ("score sum of the chosen experts", "score_sum"),
    ):
        arms = ("sync-4", "bias-global", "sync-512")
        found += _falling(
            runs, f"Specialization, {title}: micro < loss-free global < global", arms, (key,), ".3f", True
        )
    arms = ("sync-4", "with-micro", "sync-512")
    claim = "Local imbalance over 8 expert-parallel ranks: micro < global + 1 % micro < global"
    return found + _falling(runs, claim, arms, ("straggler", "8"), ".3f", True)


def _closer(runs: Runs, claim: str, arm: str) -> list[Ordering]:
    seeds = runs.have(arm, "sync-4", "sync-512")
    if not seeds:
        return []
    to_global = [runs.last(arm, s, "loss") - runs.last("sync-512", s, "loss") for s in seeds]
    to_micro = [runs.last(arm, s, "loss") - runs.last("sync-4", s, "loss") for s in seeds]
    measured = f"{with_spread(to_global, '+.4f')} from global, {with_spread(to_micro, '+.4f')} from micro-batch"
    return [Ordering(claim, measured, [abs(g) < abs(m) for g, m in zip(to_global, to_micro, strict=True)])]


def _knee(runs: Runs) -> list[Ordering]:
    """Half of the sequences' doublings bring more than half of the gain."""
    arms = [arm for arm in SYNCHRONISED if arm in runs.by_arm]
    seeds = runs.have("sync-4", "sync-32", "sync-512")
    if not seeds:
        return []
    shares = {
        arm: [
            (runs.last("sync-4", s, "loss") - runs.last(arm, s, "loss"))
            / (runs.last("sync-4", s, "loss") - runs.last("sync-512", s, "loss"))
            for s in runs.have(arm, "sync-4", "sync-512")
        ]
        for arm in arms[1:-1]
    }
    text = "share of the gain reached: " + ", ".join(
        f"{ARMS[arm].sequences}: {with_spread(found, '.0%')}" for arm, found in shares.items()
    )
    return [
        Ordering(
            f"A knee: {32 // RANK} of {BATCH // RANK} ranks bring more than half of the gain",
            text,
            [s > 0.5 for s in shares["sync-32"]],
        )
    ]


# ---- the text


COLUMNS: tuple[tuple[str, Callable[[Runs, str], str]], ...] = (
    ("balanced over", lambda runs, arm: str(ARMS[arm].sequences or "-")),
    ("held-out loss", lambda runs, arm: with_spread(runs.values(arm, "loss"), ".4f")),
    (
        "minus micro-batch",
        lambda runs, arm: with_spread(runs.differences(arm, "sync-4", "loss"), "+.4f") if arm != "sync-4" else "0",
    ),
    ("paper, minus micro-batch", lambda runs, arm: "-" if (d := paper_difference(arm)) is None else f"{d:+.4f}"),
    ("divergence, bits", lambda runs, arm: with_spread(runs.values(arm, "divergence"), ".3f")),
    ("largest share", lambda runs, arm: with_spread(runs.values(arm, "max_frequency"), ".3f")),
    ("score sum", lambda runs, arm: with_spread(runs.values(arm, "score_sum"), ".3f")),
    (f"loss over {RANK}", lambda runs, arm: with_spread(runs.values(arm, "balance", str(RANK)), ".3f")),
    (f"loss over {BATCH}", lambda runs, arm: with_spread(runs.values(arm, "balance", str(BATCH)), ".3f")),
    ("straggler, 8 ranks", lambda runs, arm: with_spread(runs.values(arm, "straggler", "8"), ".2f")),
    ("max/mean", lambda runs, arm: with_spread(runs.values(arm, "max_over_mean"), ".2f")),
)


def text(runs: Runs, facts: dict[str, Any]) -> str:
    """The result as Markdown."""
    size, some = runs.size, next(iter(next(iter(runs.by_arm.values())).values()))
    seeds = max(len(of_arm) for of_arm in runs.by_arm.values())
    domains = ", ".join(some["evaluations"][0]["domain_loss"])
    lines = [
        "# Balance over the micro-batch and over the global batch",
        "",
        f"{some['parameters']:,} parameters, {some['active_parameters']:,} for each token; {size['layers']} MoE layers "
        f"of {size['experts']} experts, top-{size['top_k']}. {size['steps']} steps of {BATCH} sequences of "
        f"{size['seq_len']} bytes ({size['steps'] * BATCH * size['seq_len'] / 1e6:.1f}M tokens), {seeds} seeds. "
        f"{facts['cpu']}, torch {facts['versions']['torch']}, Python {facts['python']}.",
        "",
        f"Loss in nats per token on text that was not trained on, mean of the domains ({domains}), \u00b1 standard "
        "deviation over seeds. Differences are taken seed by seed. The paper's are differences of its perplexities' "
        "logarithms (3.4B-A0.6B, 120B tokens). Loss over n: the balance loss with the load of n held-out sequences. "
        f"Straggler: rows of the busiest of 8 expert-parallel ranks with {RANK} sequences each over the mean.",
        "",
        "| arm | " + " | ".join(name for name, _ in COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for arm in runs.by_arm:
        lines.append(f"| {arm}: {ARMS[arm].label} | " + " | ".join(column(runs, arm) for _, column in COLUMNS) + " |")
    lines += _noise(runs)
    lines += ["", "## Which orderings are found", "", "| the paper's | here | holds |", "|---|---|---|"]
    lines += [f"| {o.claim} | {o.measured} | {o.verdict} |" for o in orderings(runs)]
    incomplete = [arm for arm, of_arm in runs.by_arm.items() if len(of_arm) < seeds]
    if incomplete:
        lines += ["", f"Fewer seeds than {seeds}: {', '.join(f'{a} ({len(runs.by_arm[a])})' for a in incomplete)}."]
    return "\n".join(lines) + "\n"


def _noise(runs: Runs) -> list[str]:
    differences = runs.differences("exact", "sync-512", "loss")
    if not differences:
        return []
    rms = math.sqrt(mean(d * d for d in differences))
    return [
        "",
        "`exact` and `sync-512` are the same gradient, computed in another order: their first steps agree to rounding. "
        f"That they end {rms:.4f} apart (root of the mean square over seeds) is what the last bits of a run decide, "
        "and how far any two arms may be apart by chance.",
    ]


def write(found: Sequence[Record], facts: dict[str, Any], stem: Path) -> str:
    """Write ``stem``.json, .md and .png; returns the text."""
    from benchmarks.balance.plots import draw

    runs = Runs(found)
    as_text = text(runs, facts)
    orders = [o._asdict() | {"verdict": o.verdict} for o in orderings(runs)]
    result = {"facts": facts, "orderings": orders, "runs": [_without_routing(record) for record in found]}
    stem.with_suffix(".json").write_text(json.dumps(_rounded(result), separators=(",", ":")) + "\n")
    stem.with_suffix(".md").write_text(as_text)
    draw(runs, stem.with_suffix(".png"))
    return as_text


def _without_routing(record: Record) -> Record:
    """The record with the table of domains and experts of its last evaluation alone."""
    *before, last = record["evaluations"]
    return record | {"evaluations": [{k: v for k, v in one.items() if k != "routing"} for one in before] + [last]}


def _rounded(value: Any) -> Any:
    """The same with five significant digits, as more would only fill the file."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
