"""Every product of degrees against one process, balance alone: ``python benchmarks/balance_parity.py [RANKS]``.

All of data, context, tensor (with sequence parallelism) and pipeline parallelism of 1, 2 and 4, up to RANKS (default 8)
forked gloo ranks; of each 1, 2 and 4 micro-batches, with and without recomputation, six scopes at once, unequal tokens.
"""

from __future__ import annotations

import itertools
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

from equimoe.moe.parallel import ParallelConfig  # noqa: E402
from tests.parallel.test_balance_matrix import worst_error  # noqa: E402

LIMIT = 1e-6


def main(ranks: int) -> int:
    """Print the table; returns how many mappings are not within the limit."""
    torch.set_num_threads(1)
    print("largest relative error of a gradient against one process, all parameters, fp64\n")
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
            off = error >= LIMIT
            good, bad = good + (not off), bad + off
            name = schedule if pp > 1 else "-"
            print(f"{row} {name:<8} {error:7.0e} {time.perf_counter() - start:8.1f}{'  NOT EQUAL' * off}", flush=True)
    print(f"\n{good} of {good + bad} mappings equal one process")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(int(sys.argv[1]) if len(sys.argv) > 1 else 8), 1))
