"""Compares balance over micro-batches and over global batches: the experiments of arXiv 2501.11873 in miniature.

    python benchmarks/balance/global_balance.py [--quick] [--arms sync-4,sync-512] [--seeds 3] [--jobs 2] [--out DIR]

A small model is trained once for each arm (see arms.py) and seed, on the text that comes with Python. Each sequence is
from one of five domains. Runs of one seed start with the same weights and see the same sequences in the same order. If
the command is interrupted, the same command continues; other arms or more seeds are added to the existing runs. It
writes a table (.md), a picture (.png) and all numbers (.json) into DIR.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
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
from equimoe.moe import checkpoint
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
    parser.add_argument("--runs", type=Path, help="folder for unfinished runs (default runs/global_balance)")
    parser.add_out()
    parser.add_argument("--one", metavar="ARM:SEED", help=argparse.SUPPRESS)
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


# ---- one run


def train(name: str, seed: int, size: Size, folder: Path) -> None:
    """Train one run, or the rest of it. ``folder``/result.json exists only if the run is complete."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a killed command may have left this run's process running
        if not (folder / "result.json").exists():
            _train(name, seed, size, folder)


def _train(name: str, seed: int, size: Size, folder: Path) -> None:
    arm, progress = ARMS[name], folder / "progress.json"
    corpus = load_corpus(configure(arm, size, seed).data, load_tokenizer("bytes"))
    trainer, ranks = build(arm, size, seed, corpus)
    record: dict[str, Any] = {"arm": name, "seed": seed, "size": asdict(size), "evaluations": [], "seconds": 0.0}
    record |= {"parameters": trainer.parameters, "active_parameters": trainer.active_parameters}
    if progress.exists() and checkpoint.complete(folder / "checkpoints"):
        path = checkpoint.newest(folder / "checkpoints")
        trainer.resume(path, checkpoint.read_manifest(path))
        record = json.loads(progress.read_text())
        record["evaluations"] = [one for one in record["evaluations"] if one["step"] <= trainer.step]
    every, start = size.steps // EVALUATIONS, time.perf_counter()
    while trainer.step < size.steps:
        if arm.then is not None and trainer.step >= size.steps // 2:
            ranks.together = arm.then
        due = (trainer.step + 1) % every == 0 or trainer.step + 1 == size.steps
        norm = trainer.train_step(observed=due)
        if due:
            trained = trainer.record(norm)
            figures = {"step": trainer.step, "training_loss": trained["loss"], "grad_norm": trained["grad_norm"]}
            record["evaluations"].append(figures | measure(observe(trainer, size)))
            record["seconds"] += time.perf_counter() - start
            start = time.perf_counter()
            write_atomically(progress, json.dumps(record).encode())
            trainer.save(folder / "checkpoints")
    write_atomically(folder / "result.json", json.dumps(record).encode())
    progress.unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


# ---- all runs


def folder_of(runs: Path, size: Size, name: str, seed: int) -> Path:
    return runs / f"{size.steps}-steps" / f"{name}-{seed}"


def run_all(args: argparse.Namespace) -> int:
    """Train the missing runs seed by seed, ``jobs`` at a time; return the number of failed runs."""
    missing = [
        (name, seed)
        for seed in range(args.seeds)
        for name in args.arms
        if not (folder_of(args.runs, args.size, name, seed) / "result.json").exists()
    ]
    print(
        f"{counted(len(args.arms), 'arm')} x {counted(args.seeds, 'seed')}; {counted(len(missing), 'run')} to do",
        flush=True,
    )

    def start(job: tuple[str, int]) -> int:
        name, seed = job
        own = ["--one", f"{name}:{seed}", "--runs", str(args.runs), "--steps", str(args.size.steps)]
        command = [sys.executable, __file__, *own, *(["--quick"] if args.quick else [])]
        began = time.perf_counter()
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            if done.returncode != STOPPED:
                print(f"{name} seed {seed} failed:\n{done.stderr}", file=sys.stderr, flush=True)
            return 1
        result = json.loads((folder_of(args.runs, args.size, name, seed) / "result.json").read_text())
        last = result["evaluations"][-1]
        print(
            f"{name:<14} seed {seed}  held-out loss {last['loss']:.4f}  divergence {last['divergence']:.3f} bits  "
            f"{time.perf_counter() - began:4.0f} s",
            flush=True,
        )
        return 0

    with ThreadPoolExecutor(args.jobs) as pool:
        return sum(pool.map(start, missing))


def results(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in range(args.seeds):
        for name in args.arms:
            path = folder_of(args.runs, args.size, name, seed) / "result.json"
            if path.exists():
                yield json.loads(path.read_text())


@command
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    failed = 0
    try:
        if args.one:
            name, seed = args.one.split(":")
            train(name, int(seed), args.size, folder_of(args.runs, args.size, name, int(seed)))
            return 0
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
