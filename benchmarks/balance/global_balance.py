"""Compares balance over micro-batches and over global batches: the experiments of arXiv 2501.11873 in miniature.

    python benchmarks/balance/global_balance.py [--quick] [--arms sync-4,sync-512] [--seeds 3] [--jobs 2] [--out DIR]

A small model is trained once for each arm (see arms.py) and seed, on the text that comes with Python. Each sequence is
from one of five domains. Runs of one seed start with the same weights and see the same sequences in the same order. If
the command is interrupted, the same command does the missing runs; other arms or more seeds are added to the existing
runs. It writes a table (.md) and all numbers (.json) into DIR.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.balance.arms import ARMS, BATCH, RANK, Size, build, configure, measure, observe
from benchmarks.checkout import ROOT
from benchmarks.shared.options import CORES, Parser, positive
from benchmarks.shared.records import facts, rounded
from equimoe.launch.env import command
from equimoe.launch.text import counted
from equimoe.moe.observe.metrics import write_atomically
from equimoe.moe.train.data import load_corpus, load_tokenizer

FULL, QUICK = Size(steps=160), Size(steps=80, heldout=256)
QUICK_ARMS = ("sync-4", "sync-32", "sync-512", "shuffled", "rolling", "bias-global", "with-micro", "micro-eighth")
#: exit status after Ctrl-C
STOPPED = 130
#: number of evaluations in a run
EVALUATIONS = 10

Record = dict[str, Any]
MICRO, GLOBAL = "sync-4", "sync-512"
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


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a few arms, one seed, fewer steps: five minutes on two cores"
    )
    parser.add_argument("--arms", metavar="NAME,...", help=f"of {', '.join(ARMS)} (default: all)")
    parser.add_argument("--seeds", type=positive, help="(default 3; quick 1)")
    parser.add_argument("--steps", type=int, help=f"(default {FULL.steps}; quick {QUICK.steps})")
    parser.add_argument("--jobs", type=positive, default=CORES, help="runs at the same time (default %(default)s)")
    parser.add_argument("--runs", type=Path, help="folder for the runs (default runs/global_balance)")
    parser.add_out()
    args = parser.parse_args(argv)
    args.size = QUICK if args.quick else FULL
    if args.steps is not None:
        if args.steps < EVALUATIONS:
            parser.error(f"--steps={args.steps}: give at least {EVALUATIONS}")
        args.size = Size(**{**asdict(args.size), "steps": args.steps})
    args.seeds = args.seeds or (1 if args.quick else 3)
    chosen = args.arms.split(",") if args.arms else QUICK_ARMS if args.quick else tuple(ARMS)
    if unknown := set(chosen) - set(ARMS):
        parser.error(f"--arms={','.join(sorted(unknown))}: choose from {', '.join(ARMS)}")
    args.arms = [name for name in ARMS if name in chosen]
    args.runs = args.runs or ROOT / "runs" / ("global_balance_quick" if args.quick else "global_balance")
    return args


def train(name: str, seed: int, size: Size, folder: Path) -> dict[str, Any]:
    """Train one run and return its record, which is also written to ``folder``/result.json."""
    torch.set_num_threads(1)
    start, arm = time.perf_counter(), ARMS[name]
    corpus = load_corpus(configure(arm, size, seed).data, load_tokenizer("bytes"))
    trainer, ranks = build(arm, size, seed, corpus)
    record: dict[str, Any] = {"arm": name, "seed": seed, "size": asdict(size), "evaluations": []}
    record |= {"parameters": trainer.parameters, "active_parameters": trainer.active_parameters}
    every = size.steps // EVALUATIONS
    while trainer.step < size.steps:
        if arm.then is not None and trainer.step >= size.steps // 2:
            ranks.together = arm.then
        due = (trainer.step + 1) % every == 0 or trainer.step + 1 == size.steps
        norm = trainer.train_step(observed=due)
        if due:
            trained = trainer.record(norm)
            figures = {"step": trainer.step, "training_loss": trained["loss"], "grad_norm": trained["grad_norm"]}
            record["evaluations"].append(figures | measure(observe(trainer, size)))
    record["seconds"] = time.perf_counter() - start
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "result.json", json.dumps(record).encode())
    return record


def folder_of(args: argparse.Namespace, name: str, seed: int) -> Path:
    return args.runs / f"{args.size.steps}-steps" / f"{name}-{seed}"


def run_all(args: argparse.Namespace) -> int:
    """Train the missing runs seed by seed, ``jobs`` at a time; return the number of failed runs."""
    wanted = [(name, seed) for seed in range(args.seeds) for name in args.arms]
    missing = [run for run in wanted if not (folder_of(args, *run) / "result.json").exists()]
    arms, seeds = counted(len(args.arms), "arm"), counted(args.seeds, "seed")
    print(f"{arms} x {seeds}; {counted(len(missing), 'run')} to do", flush=True)
    failed = 0
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(train, *run, args.size, folder_of(args, *run)): run for run in missing}
        try:
            for job in as_completed(jobs):
                text = "{:<14} seed {}".format(*jobs[job])
                if error := job.exception():
                    failed += 1
                    print(f"{text}  failed:", *traceback.format_exception(error), sep="\n", file=sys.stderr, flush=True)
                else:
                    record = job.result()
                    last = record["evaluations"][-1]
                    text += f"  held-out loss {last['loss']:.4f}  divergence {last['divergence']:.3f} bits"
                    print(f"{text}  {record['seconds']:4.0f} s", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def results(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in range(args.seeds):
        for name in args.arms:
            path = folder_of(args, name, seed) / "result.json"
            if path.exists():
                yield json.loads(path.read_text())


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


# ---- the table

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


@command
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        failed = run_all(args)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return STOPPED
    found = list(results(args))
    if not found:
        print(f"--runs={args.runs}: no run is complete", file=sys.stderr)
        return 1
    stem = args.out / ("global_balance_quick" if args.quick else "global_balance")
    print(write(found, facts("numpy"), stem))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
