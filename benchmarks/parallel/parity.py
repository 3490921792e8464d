"""Compares compositions of parallelisms with one process, and prints a table.

    python benchmarks/parallel/parity.py [WORD ...]

Every composition trains three steps on forked gloo ranks on the CPU. Words select the compositions whose names contain
all of them. The exit status is 1 if a composition exceeds its limit.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.shared.options import Parser
from benchmarks.shared.records import facts_line
from equimoe.launch.env import command
from tests.helpers.compositions import COMPOSITIONS
from tests.helpers.parity import compare

COLUMNS = (("loss", 8), ("gradients", 9), ("norm", 8), ("parameters", 10))
HEADER = f"{'composition':<44} ranks {' '.join(f'{name:>{width}}' for name, width in COLUMNS)}   limit     s"


@command
def main(argv: list[str] | None = None) -> int:
    """Print the table; return the number of compositions that exceed their limit."""
    parser = Parser(__doc__)
    chosen = parser.choose(COMPOSITIONS, argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    print(f"{facts_line()}, gloo\n")
    print("largest relative error compared with one process: loss and gradient norm of three steps, every parameter's")
    print("gradient in the first step, every parameter after the last step\n")
    print(HEADER)
    bad = 0
    for name, of in chosen.items():
        start = time.perf_counter()
        found = compare(of)
        row = " ".join(f"{found[kind]:{width}.1e}" for kind, width in COLUMNS)
        wrong = not max(found.values()) < of.limit
        bad += wrong
        seconds = time.perf_counter() - start
        print(f"{name:<44} {of.world:>5} {row} {of.limit:>7.0e} {seconds:>5.1f}{'  NOT EQUAL' * wrong}", flush=True)
    print(f"\n{len(chosen) - bad} of {len(chosen)} compositions equal one process")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(), 1))
