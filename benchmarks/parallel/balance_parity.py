"""Compares the balance gradient under every product of parallel degrees with one process, and prints a table.

    python benchmarks/parallel/balance_parity.py [--ranks 8]

Data, context, tensor (with sequence parallelism) and pipeline parallelism of degrees 1, 2 and 4 are combined, up to the
given number of forked gloo ranks. Each mapping runs with 1, 2 and 4 micro-batches, with and without recomputation, with
six balance scopes at once, and with different numbers of tokens per rank. The exit status is 1 if one is wrong.
"""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.shared.options import Parser, positive
from benchmarks.shared.records import facts_line
from equimoe.launch.env import command
from equimoe.moe.parallel import ParallelConfig
from tests.parallel.test_balance_matrix import worst_error

LIMIT = 1e-6


@command
def main(argv: list[str] | None = None) -> int:
    """Print the table; return the number of mappings that exceed the limit."""
    parser = Parser(__doc__)
    parser.add_argument("--ranks", type=positive, default=8, help="most ranks of a mapping (default %(default)s)")
    ranks = parser.parse_args(argv).ranks
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    print(f"{facts_line()}, gloo\n")
    print("largest relative error of a gradient compared with one process, all parameters, fp64\n")
    print("dp cp tp pp schedule   error        s")
    good = bad = 0
    for degrees in itertools.product((1, 2, 4), repeat=4):
        dp, cp, tp, pp = degrees
        world = dp * cp * tp * pp
        if not 1 < world <= ranks:
            continue
        for schedule in ("1f1b",) if pp == 1 else ("1f1b", "gpipe"):
            start = time.perf_counter()
            parallel = ParallelConfig(cp=cp, tp=tp, pp=pp, schedule=schedule)  # type: ignore[arg-type]
            error = worst_error(world, parallel)
            row = " ".join(f"{degree:2}" for degree in degrees)
            wrong = not error < LIMIT
            good, bad = good + (not wrong), bad + wrong
            name, seconds = schedule if pp > 1 else "-", time.perf_counter() - start
            print(f"{row} {name:<8} {error:7.0e} {seconds:8.1f}{'  NOT EQUAL' * wrong}", flush=True)
    print(f"\n{good} of {good + bad} mappings equal one process")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(), 1))
