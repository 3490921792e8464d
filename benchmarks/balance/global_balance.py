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
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.balance import findings
from benchmarks.balance.arms import ARMS, Size, build, configure, measure, observe
from benchmarks.checkout import ROOT
from benchmarks.shared.options import CORES, Parser, positive
from benchmarks.shared.records import facts
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
    print(findings.write(found, facts("numpy"), stem))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
