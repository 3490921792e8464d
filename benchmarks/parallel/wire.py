"""Counts the exchanges and bytes of a rank in one layer's step, and compares them with closed formulas.

    python benchmarks/parallel/wire.py

Runs on 4 forked gloo ranks, which form two nodes of two. The routing is balanced, and each token chooses two experts:
on both nodes, on both ranks of one node, or on one rank. The exchange of counts (8 bytes per expert) is not included.
The exit status is 1 if a row differs from its formula.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.shared.options import Parser
from equimoe.launch.env import command
from equimoe.moe import DispatchConfig
from tests.helpers.fork import run_ranks
from tests.helpers.wire import SPREADS, D, K, Passed, T, cases, measure


def label(dispatch: DispatchConfig, padded: bool, etp: int) -> str:
    """Return the name of a dispatcher for the table."""
    name = "local" if etp == 4 else dispatch.name
    extra = [f"{dispatch.chunks} chunks"] * (dispatch.chunks > 1) + ["padded"] * padded
    degrees = [f"ep {4 // etp}"] * (etp < 4) + [f"etp {etp}"] * (etp > 1)
    return ", ".join([name, *degrees, *extra])


def count(rank: int, world: int, made: list, spread: str) -> list[list[Passed]]:
    """Return what this rank sends with each dispatcher, forward and backward."""
    return [measure(rank, world, *case, spread) for case in made]


@command
def main(argv: list[str] | None = None) -> int:
    """Print the table; return the number of rows that differ from their formula."""
    Parser(__doc__).parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    print(f"{T} tokens of {D} fp32 values on each of 4 ranks, top-{K}; bytes sent by a rank, forward + backward\n")
    title = f"{'dispatcher':<28} {'on the wire':<12} {'a token chooses':<15}"
    print(f"{title}  exchanges  {'counted':>15}  {'formula':>15}")
    wrong = 0
    for wire in ("compute", "bf16", "fp8"):
        for spread in SPREADS:
            rows = cases(wire, spread)
            results = run_ranks(count, 4, [case[:3] for case in rows], spread)
            for i, (dispatch, capacity, etp, exchanges, want) in enumerate(rows):
                equal = all(result[i] == [Passed(exchanges, sent) for sent in want] for result in results)
                wrong += not equal
                passed = " + ".join(str(one.exchanges) for one in results[0][i])
                sent = [one.sent for one in results[0][i]]
                counted, formula = (f"{int(a):>6} + {int(b):>6}" for a, b in (sent, want))
                row = f"{label(dispatch, capacity is not None, etp):<28} {wire:<12} {spread:<15}  {passed:>9}"
                print(f"{row}  {counted:>15}  {formula:>15}{'' if equal else '  NOT EQUAL'}")
    print(f"\nrows that differ from their formula: {wrong}")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
