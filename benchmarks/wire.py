"""Bytes that a rank sends in one layer's step, counted, beside the closed formulas: ``python benchmarks/wire.py``.

On 4 forked gloo ranks, two nodes of two, with a balanced routing in which each token chooses two experts: on both
nodes, on both ranks of one node, or on one rank. Counts that are exchanged (8 bytes per expert) are left out.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
warnings.filterwarnings("ignore", category=FutureWarning)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkout  # noqa: E402, F401  (first: it says which equimoe is imported)
import torch  # noqa: E402

from equimoe.moe import DispatchConfig  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.wire import SPREADS, D, K, T, cases, measure  # noqa: E402


def label(dispatch: DispatchConfig, padded: bool, etp: int) -> str:
    """A dispatcher as a row of the table."""
    name = "local" if etp == 4 else dispatch.name
    extra = [f"{dispatch.chunks} chunks"] * (dispatch.chunks > 1) + ["padded"] * padded
    degrees = [f"ep {4 // etp}"] * (etp < 4) + [f"etp {etp}"] * (etp > 1)
    return ", ".join([name, *degrees, *extra])


def count(rank: int, world: int, made: list, spread: str) -> list[tuple[int, int]]:
    """Bytes of each dispatcher on this rank."""
    return [measure(rank, world, *case, spread) for case in made]


def main() -> int:
    """Print the table; returns how many rows differ from their formula."""
    torch.set_num_threads(1)
    print(f"{T} tokens of {D} fp32 values on each of 4 ranks, top-{K}; bytes sent by a rank, forward + backward\n")
    print(f"{'dispatcher':<28} {'on the wire':<12} {'a token chooses':<12}  {'counted':>15}  {'formula':>15}")
    wrong = 0
    for wire in ("compute", "bf16", "fp8"):
        for spread in SPREADS:
            rows = cases(wire, spread)
            results = run_ranks(count, 4, [case[:3] for case in rows], spread)
            for i, (dispatch, capacity, etp, want) in enumerate(rows):
                equal = all(result[i] == tuple(want) for result in results)
                wrong += not equal
                counted, formula = (f"{int(a):>6} + {int(b):>6}" for a, b in (results[0][i], want))
                name = label(dispatch, capacity is not None, etp)
                print(
                    f"{name:<28} {wire:<12} {spread:<15}  {counted:>15}  {formula:>15}{'' if equal else '  NOT EQUAL'}"
                )
    print(f"\n{wrong} rows differ from their formula")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
