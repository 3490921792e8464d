"""Runs unusual optimizer steps, and prints whether the balance loss is right or the step is refused.

    python benchmarks/balance/scenarios.py [WORD ...]

The error is that of the router's balance gradient, compared with one process that holds the whole step. Words select
the scenarios whose names contain all of them. The exit status is 1 if a scenario has another outcome than it should.
"""

from __future__ import annotations

import sys
import textwrap
import warnings
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.shared.options import Parser
from equimoe.launch.env import command
from tests.helpers.scenarios import SCENARIOS, outcome


@command
def main(argv: list[str] | None = None) -> int:
    """Print the table; return the number of scenarios with an unexpected outcome."""
    parser = Parser(__doc__)
    chosen = parser.choose(SCENARIOS, argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wrong = 0
    print(f"{'step':<48} {'outcome':<9} {'error':>9}")
    for name in chosen:
        kind, error, message = outcome(name)
        wrong += kind != ("refused" if SCENARIOS[name].refused else "right")
        print(f"{name:<48} {kind:<9} {'' if kind == 'refused' else f'{error:9.1e}'}", flush=True)
        if message:
            print(textwrap.fill(message, 112, initial_indent=" " * 8, subsequent_indent=" " * 8))
    print(f"as they should be: {len(chosen) - wrong} of {len(chosen)}")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
