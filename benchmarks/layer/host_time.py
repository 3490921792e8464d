"""Compares the host time of one tiny Mixture-of-Experts layer with that of transformers' Qwen3-MoE block, on the CPU.

    python benchmarks/layer/host_time.py [--rounds N] [--out DIR] [-T 16 -D 16 -F 16 -E 8 -K 2]

The tensors are so small that nearly all of the time is spent in Python and in torch's dispatch: it is what a GPU waits
for. The layers have the same weights, tokens and thread, and take turns; every round starts with another one. The
clock is the thread's processor time, so that other jobs on the machine disturb less. A ratio is the median over rounds
of our time divided by theirs, with its quartiles: above 1, we are slower. Before that, outputs and gradients are
compared with fp64, as in bench_layer.py.
"""

# T tokens, D hidden, F expert width, E experts, K top-k.

from __future__ import annotations

import sys
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.layer.bench_layer import DTYPES, WARMUP, build_ours, build_transformers, make_batch
from benchmarks.layer.layer_suite import check_all, make_step
from benchmarks.layer.peers import build_all
from benchmarks.shared.agreement import WrongResult
from benchmarks.shared.options import Parser, positive
from benchmarks.shared.records import OURS, as_lines, facts, load_averages, spent, table, write
from benchmarks.shared.shapes import Shape
from benchmarks.shared.timing import Timer, interleave
from equimoe.launch.env import command

SIZES = {"T": (16, "tokens"), "D": (16, "hidden size"), "F": (16, "expert width"), "E": (8, "experts")}
SIZES["K"] = (2, "experts per token")
PEERS = {
    f"transformers Qwen3-MoE, {way}": partial(build_transformers, implementation=way) for way in ("eager", "grouped_mm")
}
PARTS = ("forward", "backward", "both")
#: number of batches that the layers alternate between
_BATCHES = 8


class ThreadTimer(Timer):
    """Measures the processor time of the calling thread, which also runs the backward on a CPU."""

    def _mark(self) -> float:
        return time.thread_time()


def measure(size: Shape, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Check and measure all layers in one dtype. Raise WrongResult if ours is wrong."""
    ours = build_ours(size, dtype)
    others, missing = build_all(PEERS, size, ours)
    layers = {OURS: ours, **others}
    batches = [make_batch(size, dtype, ours.leaves[0], seed) for seed in range(_BATCHES)]
    _, wrong = check_all({name: (one, batches[:WARMUP]) for name, one in layers.items()}, size, dtype, "auto")
    steps = {name: make_step(one, batches) for name, one in layers.items() if name not in wrong}
    runs, failed = interleave(ThreadTimer(torch.device("cpu")), steps, rounds, 0.0, must=(OURS,))
    seconds = {name: {part: _of(part, each) for part in PARTS} for name, each in runs.items()}
    microseconds = {
        name: {part: [q * 1e6 for q in quantiles(times, n=4)] for part, times in each.items()}
        for name, each in seconds.items()
    }
    ratios = {
        name: {
            part: quantiles([a / b for a, b in zip(seconds[OURS][part], each[part], strict=True)], n=4)
            for part in PARTS
        }
        for name, each in seconds.items()
        if name != OURS
    }
    return {"microseconds": microseconds, "ratios": ratios, "missing": {**missing, **wrong, **failed}}


def _of(part: str, runs: list[list[float]]) -> list[float]:
    """Return the seconds of one of :data:`PARTS` in every run."""
    return [sum(run) if part == "both" else run[PARTS.index(part)] for run in runs]


def markdown(result: dict[str, Any]) -> str:
    lines = ["# Host time of a tiny layer", "", *as_lines(result)]
    for dtype, found in result["figures"].items():
        rows = [
            [name, *(_spread(parts[part], ".0f") for part in PARTS), *(_ratio(found, name, part) for part in PARTS)]
            for name, parts in found["microseconds"].items()
        ]
        header = ["layer", *(f"{part}, us" for part in PARTS), *(f"ours/theirs, {part}" for part in PARTS)]
        lines += ["", f"{dtype}: median (quartiles)", "", table(header, rows)]
        lines += [f"\nabsent: {name}: {reason}" for name, reason in found["missing"].items()]
    return "\n".join([*lines, ""])


def _ratio(found: dict[str, Any], name: str, part: str) -> str:
    return _spread(found["ratios"][name][part], ".2f") if name in found["ratios"] else ""


def _spread(quarters: list[float], form: str) -> str:
    low, middle, high = (format(value, form) for value in quarters)
    return f"{middle} ({low} to {high})"


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=1000, help="timed rounds per dtype (default %(default)s)")
    parser.add_out()
    for name, (default, meaning) in SIZES.items():
        parser.add_argument(f"-{name}", type=positive, default=default, help=f"{meaning} (default %(default)s)")
    args = parser.parse_args(argv)
    if args.K > args.E:
        parser.error(f"-K={args.K}: give at most the number of experts, -E={args.E}")
    rounds = max(args.rounds, 2)  # quartiles need two
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    begin, before = time.perf_counter(), load_averages()
    sizes = {name: getattr(args, name) for name in SIZES}
    try:
        figures = {name: measure(Shape("tiny", **sizes), dtype, rounds) for name, dtype in DTYPES.items()}
    except WrongResult as error:
        print(f"WRONG: {error}; no measurements are shown", file=sys.stderr)
        return 1
    result: dict[str, Any] = {
        "facts": facts("transformers"),
        "command": " ".join(["python benchmarks/layer/host_time.py", *(sys.argv[1:] if argv is None else argv)]),
        "settings": sizes | {"rounds": rounds},
        "figures": figures,
        **spent(begin, before),
    }
    text = markdown(result)
    print(text, "written: ", *write(result, text, args.out, "host_time"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
