"""Measures how much longer quickstart steps take while a checkpoint is saved in the background.

    python benchmarks/checkpoint/save_stall.py [--rounds 20] [--steps 3] [--ranks 2]

The ranks train the quickstart model on forked gloo processes. Blocks of a few steps take turns: without a save, with a
save that begins before the first step, and with one that blocks. The next block begins when the save has ended. The
time of a block is that of its slowest rank. The stall is what a save adds to a block, as a share of one step. The CPU
time that it adds, over all ranks and threads, hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.shared.options import positive
from equimoe.launch.env import command
from equimoe.launch.recipes.quickstart import quickstart
from equimoe.moe.collectives import sum_over, world_axis
from equimoe.moe.parallel import build_mesh
from equimoe.moe.train.config import TrainConfig
from equimoe.moe.train.data import Corpus, load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers.fork import run_ranks

OFF, ON, BLOCKING = "no save", "in the background", "blocking"


def measure(
    rank: int, world: int, config: TrainConfig, corpus: Corpus, folder: str, rounds: int, steps: int
) -> dict[str, list[tuple[float, float, float]]]:
    """Return, for every block, its seconds, those within the call that saves, and its CPU seconds."""
    mesh = build_mesh(config.parallel) if world > 1 else None
    trainer = Trainer(config, corpus, mesh, torch.device("cpu"))
    kinds = [OFF, ON, BLOCKING]
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind in kinds[number % 3 :] + kinds[: number % 3]:
            sum_over(torch.zeros(1), world_axis()).get()  # begin together
            begin, cpu = time.perf_counter(), time.process_time()
            if kind == ON:
                trainer.start_saving(Path(folder))
            elif kind == BLOCKING:
                trainer.save(Path(folder))
            called = time.perf_counter()
            for _ in range(steps):
                trainer.saver.check()
                trainer.train_step(observed=False)
            seconds = time.perf_counter() - begin
            trainer.saver.wait()
            found[kind].append((seconds, called - begin, time.process_time() - cpu))
    return {kind: blocks[1:] for kind, blocks in found.items()}  # the first round warms up


@command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=positive, default=20, help="at least two, for quartiles; default 20")
    parser.add_argument("--steps", type=int, default=3, help="steps per block")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    config = quickstart()
    config = replace(config, data=replace(config.data, builtin_bytes_per_domain=200_000))
    config = replace(config, parallel=replace(config.degrees(args.ranks), timeout_s=600))
    corpus = load_corpus(config.data, load_tokenizer("bytes"))
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        ranks = run_ranks(measure, args.ranks, config, corpus, folder, max(args.rounds, 2), args.steps, timeout=3600)
        size = sum(file.stat().st_size for file in Path(folder).glob("step-*/*")) // len(list(Path(folder).glob("*")))
    blocks = {kind: list(zip(*(of_rank[kind] for of_rank in ranks), strict=True)) for kind in ranks[0]}
    slowest = {kind: [max(seconds for seconds, *_ in block) for block in of] for kind, of in blocks.items()}
    calls = {kind: median(max(call for _, call, _ in block) for block in of) for kind, of in blocks.items()}
    cpu = {kind: [sum(used for *_, used in block) for block in of] for kind, of in blocks.items()}
    step, busy = median(slowest[OFF]) / args.steps, median(cpu[OFF]) / args.steps
    print(f"{args.ranks} ranks, checkpoint of {size / 1e6:.0f} MB, load average {os.getloadavg()[0]:.1f}")
    print(f"{'a step':<18} {1000 * step:.0f} ms, {1000 * busy:.0f} ms of CPU time")
    for kind in (ON, BLOCKING):
        time_, cpu_ = (_added(times[kind], times[OFF]) for times in (slowest, cpu))
        print(f"{kind:<18} adds to a step {time_}, {cpu_} of CPU time; the call takes {1000 * calls[kind]:.1f} ms")


def _added(with_save: list[float], without: list[float]) -> str:
    added = [1000 * (one - other) for one, other in zip(with_save, without, strict=True)]
    low, middle, high = quantiles(added, n=4, method="inclusive")
    return f"{middle:.0f} ms (quartiles {low:.0f} to {high:.0f})"


if __name__ == "__main__":
    main()
