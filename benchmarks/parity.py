"""Hold compositions of parallelisms to one process and print a table: ``python benchmarks/parity.py [WORD ...]``.

Runs on forked gloo ranks on the CPU. Words choose the compositions whose names hold all of them.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
warnings.filterwarnings("ignore", category=FutureWarning)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkout  # noqa: E402, F401  (first: it says which equimoe is imported)
import torch  # noqa: E402

from tests.helpers.compositions import COMPOSITIONS  # noqa: E402
from tests.helpers.parity import compare  # noqa: E402

COLUMNS = (("loss", 8), ("gradients", 9), ("norm", 8), ("parameters", 10))
HEADER = f"{'composition':<44} ranks {' '.join(f'{name:>{width}}' for name, width in COLUMNS)}   limit     s"


def main(words: list[str]) -> int:
    """Print the table; returns how many compositions are not within their limit."""
    torch.set_num_threads(1)
    chosen = {name: of for name, of in COMPOSITIONS.items() if all(word in name for word in words)}
    print("largest relative error against one process: loss and gradient norm of three steps, every parameter's")
    print("gradient in the first, every parameter after the last\n")
    print(HEADER)
    bad = 0
    for name, of in chosen.items():
        start = time.perf_counter()
        found = compare(of)
        row = " ".join(f"{found[kind]:{width}.1e}" for kind, width in COLUMNS)
        off = max(found.values()) >= of.limit
        bad += off
        seconds = time.perf_counter() - start
        print(f"{name:<44} {of.world:>5} {row} {of.limit:>7.0e} {seconds:>5.1f}{'  NOT EQUAL' * off}", flush=True)
    print(f"\n{len(chosen) - bad} of {len(chosen)} compositions equal one process")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
