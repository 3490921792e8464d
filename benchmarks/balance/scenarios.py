"""Unusual optimizer steps, each right or refused: ``python benchmarks/balance/scenarios.py [WORD ...]``.

The error is that of the router's balance gradient against one process that holds the whole step. Words choose the
scenarios whose names hold all of them.
"""

from __future__ import annotations

import os
import sys
import textwrap
import warnings
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from tests.helpers.scenarios import SCENARIOS, outcome  # noqa: E402


def main(words: list[str]) -> int:
    """Print the table; returns how many scenarios are wrong, or refused where they should be right."""
    torch.set_num_threads(1)
    chosen = [name for name in SCENARIOS if all(word in name for word in words)]
    wrong = 0
    print(f"{'step':<48} {'outcome':<9} {'error':>9}")
    for name in chosen:
        kind, error, message = outcome(name)
        wanted = "refused" if SCENARIOS[name].refused else "right"
        wrong += kind != wanted
        print(f"{name:<48} {kind:<9} {'' if kind == 'refused' else f'{error:9.1e}'}", flush=True)
        if message:
            print(textwrap.fill(message, 112, initial_indent=" " * 8, subsequent_indent=" " * 8))
    print(f"{len(chosen) - wrong} of {len(chosen)} as they should be")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
