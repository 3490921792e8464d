"""Trains with micro-batch and global-batch balance, each with and without replicas of the busiest experts.

    python benchmarks/placement.py [--quick] [--seeds 3] [--steps N] [--arms global,global-fssdp] [--out DIR]

Every run has four processes, which is one expert-parallel group. If the command is interrupted, the same command does
the missing runs. It writes a table (.md), a picture (.png) and all numbers (.json) into DIR.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent)
    import checkout  # noqa: F401

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.checkout import ROOT
from benchmarks.shared.options import Parser
from benchmarks.shared.records import as_lines, facts, load_averages, spent, table, write
from equimoe.launch.env import command
from equimoe.moe.config import PlacementConfig
from equimoe.moe.observe.metrics import METRICS_FILE, read_records, write_atomically
from equimoe.moe.plan.replay import METHODS, Machine, replay

RANKS = 4


@dataclass(frozen=True)
class Size:
    """Size of the model and of the training runs."""

    steps: int = 300
    layers: int = 2
    hidden: int = 64
    width: int = 64
    experts: int = 16
    top_k: int = 2
    seq_len: int = 32
    global_batch: int = 128
    micro_batch: int = 8
    bytes_per_domain: int = 1_000_000
    log_every: int = 5


FULL = Size()
QUICK = Size(steps=12, hidden=32, width=32, experts=8, global_batch=32, bytes_per_domain=100_000, log_every=2)

#: what is balanced -> options
BALANCE: dict[str, list[str]] = {
    "micro": ["--moe.balance.scope=micro"],
    "global": ["--moe.balance.scope=global"],
    "global+micro": ["--moe.balance.scope=global", "--moe.balance.extra.micro=0.0001"],
}
#: how experts are placed -> options
REPLICATED = ["--parallel.experts=fssdp", "--placement.overlap=2", "--placement.window=5"]
PLACEMENT: dict[str, list[str]] = {
    "": [f"--parallel.ep={RANKS}"],
    "-fssdp": REPLICATED,
    "-fssdp-moved": [*REPLICATED, "--placement.reshard_every=20"],
}
ARMS = {
    f"{balance}{placement}": BALANCE[balance] + PLACEMENT[placement] for balance in BALANCE for placement in PLACEMENT
}


def options(size: Size, seed: int) -> list[str]:
    """Return the options that all arms share."""
    values = {
        "steps": size.steps,
        "seed": seed,
        "model.num_layers": size.layers,
        "model.num_heads": 4,
        "model.intermediate_size": size.width,
        "moe.hidden_size": size.hidden,
        "moe.intermediate_size": size.width,
        "moe.num_experts": size.experts,
        "moe.top_k": size.top_k,
        "moe.balance.coefficient": 0.01,
        "moe.init_std": 0.05,
        "data.seq_len": size.seq_len,
        "data.global_batch": size.global_batch,
        "data.micro_batch": size.micro_batch,
        "data.builtin_bytes_per_domain": size.bytes_per_domain,
        "optim.lr": 3e-3,
        "optim.warmup_steps": max(size.steps // 20, 3),
        "log.every": size.log_every,
        "log.eval_sequences": 64,
        "log.trackers": "none",
        "checkpoint.every": 0,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def run(name: str, size: Size, seed: int, folder: Path) -> dict[str, Any]:
    """Do one run, and return its record, which is also written to the folder."""
    file, run_dir, begin = folder / f"{name}-{seed}.json", folder / f"{name}-{seed}", time.perf_counter()
    if file.exists():
        return json.loads(file.read_text())
    shutil.rmtree(run_dir, ignore_errors=True)
    argv = [sys.executable, "-m", "equimoe.launch.train", "--processes", str(RANKS), "--run-dir", str(run_dir)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*argv, *options(size, seed), *ARMS[name]], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(
            f"{name}, seed {seed}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    record = measured(run_dir, size) | {"arm": name, "seed": seed, "seconds": time.perf_counter() - begin}
    write_atomically(file, json.dumps(record).encode())
    shutil.rmtree(run_dir)
    return record


def measured(run_dir: Path, size: Size) -> dict[str, Any]:
    """Return what a run's metrics say, of the second half of the run where they change over time."""
    records = read_records(run_dir / METRICS_FILE)
    trained = [r for r in records if r["kind"] == "train"]
    late = [r for r in trained if r["step"] > size.steps // 2]
    last = [r for r in records if r["kind"] == "eval"][-1]
    found = {
        "loss": last["loss"],
        "divergence": mean(last["divergence"]),
        "straggler": mean(r["straggler"] for r in late),
        "curve": [[r["step"], r["straggler"], r.get("replicated_straggler", r["straggler"])] for r in trained],
    }
    for name in ("replicated_straggler", "copied_bytes", "forecast_error"):
        if name in late[-1]:  # only in runs with replicas
            found[name] = mean(r[name] for r in late)
    return found


# ---- the table and the picture


def spread(values: Sequence[float], spec: str) -> str:
    """Return mean +- standard deviation."""
    if not values:
        return "-"
    return format(mean(values), spec) + (f" \u00b1 {stdev(values):{spec}}" if len(values) > 1 else "")


COLUMNS = (
    ("loss", "held-out loss", ".4f", 1.0),
    ("divergence", "divergence of domains", ".3f", 1.0),
    ("straggler", "busiest rank, owners only", ".3f", 1.0),
    ("replicated_straggler", "with replicas", ".3f", 1.0),
    ("forecast_error", "error of the forecast", ".2f", 1.0),
    ("copied_bytes", "copied, MiB per layer and step", ".2f", 1.0 / (1 << 20)),
)


def markdown(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    records, s = result["runs"], result["settings"]
    shown = [name for name in ARMS if any(record["arm"] == name for record in records)]
    rows = []
    for name in shown:
        of_arm = [record for record in records if record["arm"] == name]
        rows.append(
            [name] + [spread([r[key] * scale for r in of_arm if key in r], spec) for key, _, spec, scale in COLUMNS]
        )
    loss = {(record["arm"], record["seed"]): record["loss"] for record in records}
    changes = []
    for name in shown:
        plain = name.partition("-")[0]
        if name != plain and plain in shown:
            changes.append([name, *(f"{loss[key] - loss[plain, key[1]]:+.4f}" for key in loss if key[0] == name)])
    seeds = sorted({record["seed"] for record in records})
    return "\n".join(
        [
            "# Balance and placement of experts",
            "",
            *as_lines(result),
            "",
            f"{s['layers']} layers of {s['experts']} experts, top-{s['top_k']}, on {RANKS} ranks; {s['steps']} steps "
            f"of {s['global_batch']} sequences of {s['seq_len']} bytes, in micro-batches of {s['micro_batch']}. "
            "`-fssdp` replicates up to two experts in every step on all ranks, chosen by the loads of the five steps "
            "before; `-fssdp-moved` also moves experts to new owners every 20 steps. `global+micro` adds a micro-batch "
            "loss with 1 % of the coefficient. Loss in nats per token of held-out text; divergence in bits, how "
            "differently domains are routed; busiest rank: its rows in a micro-batch over the mean, mean of the second "
            "half of the run; \u00b1 standard deviation over seeds.",
            "",
            table(["arm", *(title for _, title, *_ in COLUMNS)], rows),
            "",
            "What replicas change in the held-out loss, per seed. They change only the order of additions.",
            "",
            table(["arm", *(f"seed {seed}" for seed in seeds)], changes),
            "",
        ]
    )


def flipping(steps: int = 24, ranks: int = 8, experts: int = 32) -> dict[str, list[float]]:
    """Return the busiest rank in every step, if another expert gets a third of all choices in each."""
    counts_SLE = torch.full((steps, 1, experts), 1000)
    for step in range(steps):
        counts_SLE[step, 0, step * 7 % experts] = 1000 * experts // 2
    machine = Machine(ranks, ranks, seconds_per_row=1e-6, expert_bytes=1000, bandwidth=1e9, latency=4e-6)
    config = PlacementConfig(overlap=2, memory_mb=1)
    names = ("expert parallel", "FSSDP", "FSSDP, calibrated")
    return {name: replay(counts_SLE, METHODS[name], machine, config).curve for name in names}


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw the busiest rank over training for every way to balance, and where the busiest expert always changes."""
    figure, (*panels, flips) = pyplot.subplots(1, len(BALANCE) + 1, figsize=(13, 3.4), layout="constrained")
    for name, curve in flipping().items():
        flips.plot(range(1, len(curve) + 1), curve, label=name)
    flips.set_title("another busy expert in every step (replay)")
    flips.set_xlabel("step")
    flips.legend()
    for axes, balance in zip(panels, BALANCE, strict=True):
        for arm, column, label in (
            ("-fssdp", 1, "owners only"),
            ("-fssdp", 2, "with replicas"),
            ("-fssdp-moved", 2, "with replicas and new owners"),
        ):
            curves = [r["curve"] for r in result["runs"] if r["arm"] == balance + arm]
            if curves:
                values = [mean(curve[i][column] for curve in curves) for i in range(len(curves[0]))]
                axes.plot([point[0] for point in curves[0]], values, label=label)
        axes.set_title(f"{balance} balance")
        axes.set_xlabel("step")
        axes.set_ylim(bottom=1.0, top=max(axes.get_ylim()[1], 1.6))
    panels[0].set_ylabel("rows of the busiest rank / mean")
    panels[-1].legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


@command
def main(argv: list[str] | None = None) -> int:
    args = Parser(__doc__).parse_arms(argv, ARMS, FULL.steps, "placement")
    size = QUICK if args.quick else FULL
    size = replace(size, steps=args.steps or size.steps)
    begin, before = time.perf_counter(), load_averages()
    folder = args.runs or ROOT / "runs" / f"placement-{'quick-' if args.quick else ''}{size.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in range(args.seeds):
        for name in args.arms:
            runs.append(record := run(name, size, seed, folder))
            factor = record.get("replicated_straggler", record["straggler"])
            print(
                f"{name:<20} seed {seed}  held-out loss {record['loss']:.4f}  busiest rank {factor:.3f}  "
                f"{record['seconds']:4.0f} s",
                flush=True,
            )
    result: dict[str, Any] = {
        "facts": facts(),
        "command": " ".join(["python benchmarks/placement.py", *(sys.argv[1:] if argv is None else argv)]),
        "settings": asdict(size) | {"seeds": args.seeds},
        "runs": runs,
        **spent(begin, before),
    }
    text = markdown(result)
    files = write(result, text, args.out, "placement" + ("-quick" if args.quick else ""))
    picture = Path(files[0]).with_suffix(".png")
    draw(result, picture)
    print(text, "written: ", *files, picture, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
