"""Compares the speed of two checkouts: ``run.py --against PATH`` runs the run.py of each in turns, in new processes.

The checkouts alternate in going first, so that other load on the machine affects both. Each ratio is this checkout's
time divided by the other's in the same round; the table shows the median, least and greatest ratio over all rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkout import ROOT
from benchmarks.shared.records import LAYER, OURS, commit_of, table


def times(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the names and median microseconds of all our contestants and ops in a result of run.py."""
    for shape, figures in result["shapes"].items():
        for op, row in figures.get("kernels", {}).get("ops", {}).items():
            yield f"{shape} {op}", row["median_us"]
        for routing in ("uniform", "zipf"):
            for name in (OURS, LAYER):
                for part in ("forward", "backward"):
                    if row := figures.get("layer", {}).get(routing, {}).get(name):
                        yield f"{shape} {name} {routing} {part}", row[part]["median_us"]


def one_run(root: Path, arguments: Sequence[str]) -> dict[str, float]:
    """Run one checkout's run.py and return its times. Exit with its last line of output if it fails."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(root / "benchmarks" / "run.py"), *arguments, "--out", out]
        # an older script measures the installed package unless its checkout comes first
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            sys.exit(f"{root}: {last}")
        (path,) = Path(out).glob("*.json")
        return dict(times(json.loads(path.read_text())))


def compare(other: Path, rounds: int, arguments: Sequence[str]) -> str:
    """Run each checkout ``rounds`` times and return the table of ratios."""
    here, there = [], []
    for index in range(rounds):
        for root, found in ((ROOT, here), (other, there))[:: -1 if index % 2 else 1]:
            found.append(one_run(root, arguments))
        print(f"round {index + 1} of {rounds}", flush=True)
    common = [name for name in here[0] if all(name in run for run in (*here, *there))]
    rows, slower = [], 0
    for name in common:
        ratios = [one[name] / two[name] for one, two in zip(here, there, strict=True)]
        is_slower = min(ratios) > 1
        slower += is_slower
        us = (f"{median(run[name] for run in runs):.1f}" for runs in (here, there))
        rows.append([name, *us, *(f"{f(ratios):.2f}" for f in (median, min, max)), "slower" * is_slower])
    head = ["op", "this us", "other us", "this/other", "least", "most", "in every round"]
    commits = f"this: {commit_of(ROOT)}, other: {commit_of(other)}"
    return f"{commits}\n\n{table(head, rows)}\n\n{slower} of {len(rows)} slower in every round"
