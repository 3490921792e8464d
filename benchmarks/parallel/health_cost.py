"""Measures what the checks of a run's health cost, as a share of the time of a step.

    python benchmarks/parallel/health_cost.py [--ranks 2] [--rounds 20]

The quickstart model trains on forked gloo ranks. Its steps with and without checks take turns, and each round starts
with another kind; "without again" repeats the baseline, to show the noise. With checks: heartbeats to
the store and the thread that looks for hangs, the sum of signals and of the ranks' times after each step, and the
common decision whether the step's numbers are sound. The comparison of replicas runs every
``health.replicas_every`` steps; it is timed alone, and its share is its time divided by that number of steps.
"""

from __future__ import annotations

import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch
import torch.distributed as dist

from benchmarks.shared.options import Parser, positive
from benchmarks.shared.records import load_averages
from benchmarks.shared.timing import Step, Timer, interleave
from equimoe.launch.env import command
from equimoe.launch.recipes.quickstart import quickstart
from equimoe.moe.collectives import sum_over, world_axis
from equimoe.moe.engines import Computed
from equimoe.moe.health import Heartbeat, Pulse
from equimoe.moe.parallel import build_mesh
from equimoe.moe.train.config import OptimConfig, TrainConfig
from equimoe.moe.train.data import Corpus, load_corpus, load_tokenizer
from equimoe.moe.train.judge import Judge
from equimoe.moe.train.trainer import Trainer
from tests.helpers.fork import run_ranks

WITH, WITHOUT, AGAIN = KINDS = ("with checks", "without", "without again")
TIMEOUT_S = 3600.0


class Unjudged(Judge):
    """Lets each rank decide alone, without communication."""

    def __call__(self, computed: Computed) -> bool:
        return bool(computed.norm.isfinite())


def time_steps(rank: int, world: int, config: TrainConfig, corpus: Corpus, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each kind of step on this rank, and of the comparison of replicas."""
    mesh = build_mesh(config.parallel)
    trainer = Trainer(config, corpus, mesh, torch.device("cpu"))  # one for all: a second one differs by some percent
    judges = {True: trainer.judge, False: Unjudged(config.health, trainer.axis, trainer.counts)}
    place = [None]
    if rank == 0:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = [server.port]
    dist.broadcast_object_list(place)
    store = dist.TCPStore("127.0.0.1", place[0], is_master=False)

    def step(name: str) -> Step:
        checked = name == WITH

        def run(mark: Any) -> None:
            trainer.judge = judges[checked]
            heartbeat = Heartbeat(rank, world, store, TIMEOUT_S, lambda *_: None) if checked else None
            pulse = Pulse(trainer.axis, heartbeat)
            with nullcontext() if heartbeat is None else heartbeat:
                sum_over(torch.zeros(1), world_axis()).get()  # begin together
                mark()
                if checked:
                    pulse.begin(trainer.step + 1)
                trainer.train_step(observed=False)
                if checked:
                    pulse.end(0, logged=True)
                mark()

        return run

    parts, _ = interleave(Timer(torch.device("cpu")), {name: step(name) for name in KINDS}, rounds, 0.0, KINDS)
    seconds = {name: [sum(run) for run in runs] for name, runs in parts.items()}
    seconds["replicas"] = []
    for _ in range(6):
        sum_over(torch.zeros(1), world_axis()).get()
        begin = time.perf_counter()
        trainer.check_replicas()
        seconds["replicas"].append(time.perf_counter() - begin)
    return seconds


@command
def main(argv: list[str] | None = None) -> int:
    """Print the shares; return 1 if all checks together cost 2 % or more."""
    parser = Parser(__doc__)
    parser.add_argument("--ranks", type=positive, default=2, help="(default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=20, help="steps of each kind (default %(default)s)")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    config = quickstart()
    config = replace(
        config,
        steps=10**6,
        data=replace(config.data, builtin_bytes_per_domain=200_000),
        optim=OptimConfig(lr=1e-12, warmup_steps=0),
        parallel=replace(config.parallel, timeout_s=TIMEOUT_S),
    )
    corpus, loads = load_corpus(config.data, load_tokenizer(config.data.tokenizer)), load_averages()
    found = run_ranks(time_steps, args.ranks, config, corpus, args.rounds, timeout=TIMEOUT_S)
    slowest = {name: [max(runs) for runs in zip(*(one[name] for one in found), strict=True)] for name in found[0]}
    base = slowest[WITHOUT]
    print(f"quickstart, {args.ranks} ranks, {args.rounds} rounds, load average before {loads}, after {load_averages()}")
    for name in (WITHOUT, AGAIN, WITH):
        ratio = median(run / other for run, other in zip(slowest[name], base, strict=True))
        print(f"{name:<14} median {1e3 * median(slowest[name]):8.1f} ms per step, {ratio:.3f} of {WITHOUT}")
    every = config.health.replicas_every
    share = median(slowest["replicas"][1:]) / every / median(base)
    took = 1e3 * median(slowest["replicas"][1:])
    print(f"replicas       median {took:8.1f} ms every {every} steps: {share:.2%} of a step")
    total = median(run / other for run, other in zip(slowest[WITH], base, strict=True)) - 1 + share
    print(f"all checks: {total:.2%} of a step")
    return int(total >= 0.02)


if __name__ == "__main__":
    sys.exit(main())
