"""Compares training on a long text with training on a short one: speed, memory, and time spent on reading.

    python benchmarks/data.py [--mb 4000] [--rounds 20] [--out benchmarks/results/data_cpu.txt]

It makes .jsonl files of random words, and trains a tiny model on them. For the speed, two trainers in one process take
turns, in blocks of steps, one on each text. For the memory, a process of its own starts as a run does: it tokenises the
text, and trains. It is started twice, the second time with the tokens there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent)
    import checkout  # noqa: F401

import numpy as np
import torch

from benchmarks.shared.options import positive
from benchmarks.shared.records import facts_line
from equimoe.launch.env import command
from equimoe.moe import MoEConfig
from equimoe.moe.train.config import DataConfig, ModelConfig, TrainConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer

#: size of the short text, in MB
SHORT = 4
DOMAINS = ("code", "web")


def config_of(path: Path, workers: int = 1) -> TrainConfig:
    """Return a run of a tiny model, so that reading is a large part of a step."""
    return TrainConfig(
        model=ModelConfig(num_layers=1, num_heads=2, intermediate_size=32),
        moe=MoEConfig(hidden_size=32, intermediate_size=32, num_experts=4, top_k=2),
        data=DataConfig(path=str(path), seq_len=512, global_batch=16, micro_batch=8, workers=workers),
    )


def make(folder: Path, megabytes: int) -> None:
    """Write documents of random words, half of them in each domain."""
    draw = np.random.default_rng(megabytes)
    letters = draw.integers(97, 123, (4096, 10), dtype=np.uint8)
    words = np.array([bytes(row[: 2 + i % 8]).decode() + " " for i, row in enumerate(letters)])
    for domain in DOMAINS:
        place = folder / domain / "text.jsonl"
        place.parent.mkdir(parents=True)
        left = megabytes * 1_000_000 // len(DOMAINS)
        with place.open("w") as file:
            while left > 0:
                texts = ["".join(words[draw.integers(0, len(words), 500)]) for _ in range(200)]
                left -= file.write("".join(f'{{"text": "{text}"}}\n' for text in texts))


def resident() -> dict[str, float]:
    """Return the resident memory of this process, now and at most, in MB."""
    status = Path("/proc/self/status").read_text()
    found = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Vm")}
    return {"now": int(found["VmRSS"]) / 1000, "most": int(found["VmHWM"]) / 1000}


def start(path: Path, cache: Path, steps: int) -> dict[str, float]:
    """Start a run and train a few steps; return seconds and memory."""
    config = config_of(path)
    load_corpus(replace(config.data, path=None, builtin_bytes_per_domain=20_000), load_tokenizer("bytes"))
    before, begun = resident()["now"], time.perf_counter()
    corpus = load_corpus(config.data, load_tokenizer("bytes"), cache)
    loaded = time.perf_counter() - begun
    trainer = Trainer(config, corpus, None, torch.device("cpu"))
    for _ in range(steps):
        trainer.train_step(observed=False)
    pids = [worker.process.pid for worker in trainer.ahead._workers]
    readers = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6 for pid in pids)
    memory = resident()
    return {"load_s": loaded, "before": before, "now": memory["now"], "most": memory["most"], "readers": readers}


def started(path: Path, cache: Path, steps: int) -> dict[str, float]:
    """Call :func:`start` in a process of its own."""
    argv = [sys.executable, __file__, "--start", str(path), "--cache", str(cache), "--steps", str(steps)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def speeds(paths: list[Path], cache: Path, rounds: int, steps: int, workers: int) -> list[list[tuple[float, float]]]:
    """Train on each path in turns; return the seconds of each block, and those of them spent on reading."""
    trainers, waits = [], [0.0] * len(paths)
    for i, path in enumerate(paths):
        config = config_of(path, workers)
        corpus = load_corpus(config.data, load_tokenizer("bytes"), cache)
        trainer = Trainer(config, corpus, None, torch.device("cpu"))
        trainer.batches.read = timed(trainer.batches.read, waits, i)  # type: ignore[method-assign]
        trainers.append(trainer)
    found: list[list[tuple[float, float]]] = [[] for _ in paths]
    for number in range(rounds + 1):
        for i in sorted(range(len(paths)), key=lambda i: (i + number) % len(paths)):
            waits[i], begun = 0.0, time.perf_counter()
            for _ in range(steps):
                trainers[i].train_step(observed=False)
            found[i].append((time.perf_counter() - begun, waits[i]))
    for trainer in trainers:
        trainer.ahead.close()
    return [blocks[1:] for blocks in found]  # the first round warms up


def timed(real, waits: list[float], place: int):  # noqa: ANN001, ANN201
    def call(*given):  # noqa: ANN002, ANN202
        begun = time.perf_counter()
        try:
            return real(*given)
        finally:
            waits[place] += time.perf_counter() - begun

    return call


@command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mb", type=int, default=4000, help="size of the long text; default 4000")
    parser.add_argument("--rounds", type=positive, default=20, help="at least two, for quartiles; default 20")
    parser.add_argument("--steps", type=int, default=10, help="steps per block")
    parser.add_argument("--folder", type=Path, help="where to make the texts; default a temporary folder")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.start is not None:
        print(json.dumps(start(args.start, args.cache, args.steps)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        lines = report(Path(folder), args.mb, max(args.rounds, 2), args.steps)
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


def report(folder: Path, megabytes: int, rounds: int, steps: int) -> list[str]:
    """Measure, and return what was found as lines."""
    paths = [folder / "short", folder / "long"]
    for path, size in zip(paths, (SHORT, megabytes), strict=True):
        make(path, size)
    lines = [
        facts_line(),
        f"texts of {SHORT} MB (kept in memory) and {megabytes} MB (tokenised into a store); tokenizer bytes",
        "",
        f"{'memory of one process, in MB':<34} {'at the start':>12} {'trained':>9} {'most':>7} {'beyond':>7}"
        f" {'readers':>8} {'start':>8}",
    ]
    for name, path in (
        ("short text", paths[0]),
        ("long text, first start", paths[1]),
        ("long text, restart", paths[1]),
    ):
        found = started(path, folder / "cache", steps)
        lines.append(
            f"{name:<34} {found['before']:>12.0f} {found['now']:>9.0f} {found['most']:>7.0f} "
            f"{found['most'] - found['before']:>7.0f} {found['readers']:>8.0f} {found['load_s']:>6.1f} s"
        )
    lines += ["", f"{'speed, ' + str(rounds) + ' blocks in turns':<34} {'short':>12} {'long':>9} {'long / short':>22}"]
    tokens = steps * 16 * 512
    for workers in (1, 0):
        short, long = speeds(paths, folder / "cache", rounds, steps, workers)
        rates = [tokens / median(seconds for seconds, _ in blocks) for blocks in (short, long)]
        ratios = [a / b for (a, _), (b, _) in zip(short, long, strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        kind = "tokens/s, 1 process reads ahead" if workers else "tokens/s, read when needed"
        lines.append(f"{kind:<34} {rates[0]:>12,.0f} {rates[1]:>9,.0f} {middle:>8.3f} ({low:.3f} to {high:.3f})")
        waits = [1000 * median(wait for _, wait in blocks) / steps for blocks in (short, long)]
        whole = 1000 * median(seconds for seconds, _ in long) / steps
        lines.append(f"{'  of a step, reading, in ms':<34} {waits[0]:>12.2f} {waits[1]:>9.2f} of {whole:.0f}")
    return lines


if __name__ == "__main__":
    main()
