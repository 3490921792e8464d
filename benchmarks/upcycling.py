"""Compares Drop-Upcycling with sparse upcycling and with training from scratch, at equal tokens.

    python benchmarks/upcycling.py [--quick] [--seeds 3] [--steps N] [--arms sparse,drop] [--jobs 2] [--out DIR]

A small dense model is trained on the text that comes with Python, and then grown into an MoE model by each method. All
models then train on the same new sequences; one has random weights, one stays dense, and one with random weights also
trains on what the dense model has seen. If the command is interrupted, the same command does the missing runs. It
writes a table (.md) and all numbers (.json) into DIR.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent)
    import checkout  # noqa: F401

import torch

from benchmarks.checkout import ROOT
from benchmarks.shared.options import CORES, Parser, positive
from benchmarks.shared.records import as_lines, facts, load_averages, spent, table, write
from equimoe.launch import initial
from equimoe.launch.env import command
from equimoe.moe import BalanceConfig, MoEConfig
from equimoe.moe.interop.upcycle import Recipe, upcycle
from equimoe.moe.observe.metrics import write_atomically
from equimoe.moe.train.config import DataConfig, LogConfig, ModelConfig, OptimConfig, TrainConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer

#: number of evaluations of a run
EVALUATIONS = 4


@dataclass(frozen=True)
class Size:
    """Size of the models and of the training runs."""

    #: steps of the dense model, and of every model after it
    dense_steps: int = 300
    steps: int = 300
    layers: int = 2
    hidden: int = 96
    width: int = 192
    experts: int = 8
    top_k: int = 2
    seq_len: int = 32
    batch: int = 64
    lr: float = 3e-3
    init_std: float = 0.05
    #: number of held-out sequences per domain
    heldout: int = 256
    bytes_per_domain: int = 1_000_000


FULL = Size()
QUICK = Size(dense_steps=12, steps=12, hidden=32, width=48, experts=4, heldout=16, bytes_per_domain=100_000)


@dataclass(frozen=True)
class Arm:
    """How a model comes to be."""

    label: str
    #: share of the channels that is drawn again when the dense model is grown; None: it is not grown
    ratio: float | None = None
    dense: bool = False
    #: train also on what the dense model has seen
    all_tokens: bool = False


ARMS = {
    "dense": Arm("the dense model, trained further", dense=True),
    "scratch": Arm("random weights"),
    "sparse": Arm("sparse upcycling", 0.0),
    "drop": Arm("Drop-Upcycling, ratio 0.5", 0.5),
    "scratch-all": Arm("random weights, also on the dense model's tokens", all_tokens=True),
}
#: the differences that are shown
PAIRS = (("drop", "sparse"), ("drop", "scratch"), ("sparse", "scratch"), ("drop", "scratch-all"))


def configure(size: Size, seed: int, steps: int, dense: bool, part: int) -> TrainConfig:
    """Return the configuration of a run; ``part`` is 0 for the dense model's sequences, 1 for those after it."""
    return TrainConfig(
        steps=steps,
        seed=2 * seed + part,
        model=ModelConfig(size.layers, num_heads=4, intermediate_size=size.width, moe_every=0 if dense else 1),
        moe=MoEConfig(
            size.hidden,
            size.width,
            size.experts,
            size.top_k,
            balance=BalanceConfig(coefficient=0.01),
            init_std=size.init_std,
        ),
        data=DataConfig(
            seq_len=size.seq_len,
            global_batch=size.batch,
            micro_batch=size.batch,
            builtin_bytes_per_domain=size.bytes_per_domain,
        ),
        optim=OptimConfig(lr=size.lr, warmup_steps=max(steps // 20, 3)),
        log=LogConfig(eval_sequences=size.heldout, trackers=None),
    )


def train(config: TrainConfig, start: Path | None, save: Path | None = None) -> list[dict[str, Any]]:
    """Train a model from the weights in a folder, or from random ones; return its evaluations."""
    torch.set_num_threads(1)
    corpus = load_corpus(config.data, load_tokenizer("bytes"))
    trainer = Trainer(config, corpus, None, torch.device("cpu"))
    if start is not None:
        initial.begin(trainer, start)
    found = [measured(trainer)]
    due = {config.steps * (number + 1) // EVALUATIONS for number in range(EVALUATIONS)}
    while trainer.step < config.steps:
        trainer.train_step(observed=False)
        if trainer.step in due:
            found.append(measured(trainer))
    if save is not None:
        trainer.save(save)
    return found


def measured(trainer: Trainer) -> dict[str, Any]:
    """Return the mean loss over domains, and how differently domains are routed, in bits."""
    record = trainer.evaluate()
    losses = [domain["loss"] for domain in record["domains"].values()]
    found = {"step": trainer.step, "loss": mean(losses)}
    return found | ({"divergence": mean(record["divergence"])} if "divergence" in record else {})


def run_dense(size: Size, seed: int, folder: Path) -> None:
    """Train the dense model of a seed, unless it exists."""
    if not (folder / "dense.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        found = train(configure(size, seed, size.dense_steps, True, 0), None, folder / "checkpoints")
        write_atomically(folder / "dense.json", json.dumps(found).encode())


def run(name: str, size: Size, seed: int, folder: Path) -> dict[str, Any]:
    """Do one run after the dense model's, and return its record, which is also written to the folder."""
    start, arm, source = time.perf_counter(), ARMS[name], folder
    config = configure(size, seed, size.steps, arm.dense, 1)
    if arm.ratio is not None:
        source = folder / name
        shutil.rmtree(source, ignore_errors=True)
        recipe = Recipe(size.experts, size.top_k, ratio=arm.ratio, seed=seed)
        upcycle([initial.weights(folder)], recipe, source)
    if arm.all_tokens:
        config = replace(config, steps=size.steps + size.dense_steps)
    found = train(config, source if arm.dense or arm.ratio is not None else None)
    record = {"arm": name, "seed": seed, "evaluations": found, "seconds": time.perf_counter() - start}
    write_atomically(folder / f"{name}.result.json", json.dumps(record).encode())
    return record


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Do the missing runs, ``jobs`` at a time; return all records."""
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(run_dense, args.size, seed, args.runs / str(seed)) for seed in range(args.seeds)]:
            job.result()
        jobs = {}
        for seed in range(args.seeds):
            for name in args.arms:
                if not (args.runs / str(seed) / f"{name}.result.json").exists():
                    jobs[pool.submit(run, name, args.size, seed, args.runs / str(seed))] = name, seed
        for job in as_completed(jobs):
            record = job.result()
            loss, seconds = record["evaluations"][-1]["loss"], record["seconds"]
            print(f"{record['arm']:<12} seed {record['seed']}  held-out loss {loss:.4f}  {seconds:4.0f} s", flush=True)
    files = [args.runs / str(seed) / f"{name}.result.json" for name in args.arms for seed in range(args.seeds)]
    return [json.loads(file.read_text()) for file in files]


# ---- the table


def spread(values: Sequence[float], spec: str = ".4f") -> str:
    """Return mean +- standard deviation."""
    text = format(mean(values), spec)
    return f"{text} \u00b1 {stdev(values):{spec.strip('+')}}" if len(values) > 1 else text


def values(records: Sequence[dict[str, Any]], arm: str, at: int, key: str = "loss") -> list[float]:
    """Return a value of an arm's evaluation, by seed."""
    found = [record["evaluations"][at] for record in records if record["arm"] == arm]
    return [one[key] for one in found if key in one]


def markdown(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    records, settings = result["runs"], result["settings"]
    quarters = [0, *range(1, EVALUATIONS + 1)]
    shares = ["start", *(f"{n}/{EVALUATIONS} of the steps" for n in quarters[1:])]
    rows = []
    shown = [name for name in ARMS if values(records, name, -1)]
    for name in shown:
        divergence = values(records, name, -1, "divergence")
        cells = [spread(values(records, name, at)) for at in quarters]
        rows.append([f"{name}: {ARMS[name].label}", *cells, spread(divergence, ".3f") if divergence else "-"])
    differences = []
    for one, other in (pair for pair in PAIRS if set(pair) <= set(shown)):
        each = [
            [a - b for a, b in zip(values(records, one, at), values(records, other, at), strict=True)]
            for at in quarters
        ]
        won = sum(difference < 0 for difference in each[-1])
        differences.append([f"{one} - {other}", *(spread(d, "+.4f") for d in each), f"{won} of {len(each[-1])}"])
    tokens = {key: settings[key] * settings["batch"] * settings["seq_len"] for key in ("dense_steps", "steps")}
    return "\n".join(
        [
            "# Drop-Upcycling, sparse upcycling and training from scratch",
            "",
            *as_lines(result),
            "",
            f"The dense model trains on {tokens['dense_steps']:,} tokens (bytes). Then every model trains on "
            f"{tokens['steps']:,} other tokens, the same for all; `scratch-all` on as many as both together. Loss in "
            "nats per token of held-out text, mean over domains; \u00b1 standard deviation over seeds. Divergence: how "
            "differently domains are routed at the end, in bits.",
            "",
            table(["arm", *shares, "divergence"], rows),
            "",
            "Differences of the loss, computed per seed. The last column is the number of seeds in which the first arm "
            "is better at the end.",
            "",
            table(["difference", *shares, "first is better"], differences),
            "",
        ]
    )


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models, one seed: a few seconds, to try the command")
    parser.add_argument("--seeds", type=positive, help="(default 3; quick 1)")
    parser.add_argument(
        "--steps", type=positive, help=f"after the dense model's {FULL.dense_steps} (default {FULL.steps})"
    )
    parser.add_argument("--arms", metavar="NAME,...", help=f"of {', '.join(ARMS)} (default: all)")
    parser.add_argument("--jobs", type=positive, default=CORES, help="runs at the same time (default %(default)s)")
    parser.add_argument("--runs", type=Path, help="folder for the runs (default runs/upcycling)")
    parser.add_out()
    args = parser.parse_args(argv)
    args.seeds, args.size = args.seeds or (1 if args.quick else 3), QUICK if args.quick else FULL
    if args.steps is not None:
        if args.steps < EVALUATIONS:
            parser.error(f"--steps={args.steps}: give at least {EVALUATIONS}")
        args.size = replace(args.size, steps=args.steps)
    chosen = args.arms.split(",") if args.arms else tuple(ARMS)
    if unknown := set(chosen) - set(ARMS):
        parser.error(f"--arms={','.join(sorted(unknown))}: choose from {', '.join(ARMS)}")
    args.arms = [name for name in ARMS if name in chosen]
    size, begin, before = args.size, time.perf_counter(), load_averages()
    args.runs = args.runs or ROOT / "runs" / f"upcycling-{size.dense_steps}-{size.steps}"
    runs = run_all(args)
    result: dict[str, Any] = {
        "facts": facts(),
        "command": " ".join(["python benchmarks/upcycling.py", *(sys.argv[1:] if argv is None else argv)]),
        "settings": asdict(size) | {"seeds": args.seeds},
        "runs": runs,
        **spent(begin, before),
    }
    text = markdown(result)
    name = "upcycling" + ("-quick" if args.quick else f"-{size.steps}" if size.steps != FULL.steps else "")
    print(text, "written: ", *write(result, text, args.out, name), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
