"""Replays a run's loads on other ranks: ``python -m equimoe.launch.placement --loads RUN --ranks 32 --nodes 4``."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..moe.config import PlacementConfig
from ..moe.observe.metrics import METRICS_FILE, read_records, write_atomically
from ..moe.placement import write_owners
from ..moe.plan.replay import METHODS, Machine, Outcome, replay
from . import env
from .text import counted
from .usage import Parser, a_path, run_on_files

MIB = 1 << 20
#: what the cost of an expert depends on
NEEDED = ("hidden_size", "intermediate_size", "top_k", "gated")
#: largest number of choices; up to it, fp64 holds all whole numbers
MOST = 1 << 53


@env.command
def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with code 64 for an option that does not fit, 73 if a file cannot be read or written."""
    arguments = _parser().parse_args(argv)
    run_on_files(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    for name in ("ranks", "nodes", "tokens", "tflops", "bandwidth"):
        if not 0 < getattr(arguments, name) < math.inf:
            raise ValueError(f"--{name}={getattr(arguments, name)}: must be greater than 0, and finite")
    if arguments.ranks % arguments.nodes:
        raise ValueError(f"--nodes={arguments.nodes}: must divide --ranks={arguments.ranks}; use a divisor")
    if not 0 <= arguments.latency < math.inf:
        raise ValueError(f"--latency={arguments.latency}: must be at least 0, and finite")
    config = PlacementConfig(
        overlap=arguments.overlap,
        memory_mb=arguments.memory_mb,
        window=arguments.window,
        reshard_every=arguments.reshard_every,
    )
    file = arguments.loads / METRICS_FILE if arguments.loads.is_dir() else arguments.loads
    try:
        records = read_records(file)
    except OSError as error:
        raise ValueError(f"--loads={file}: cannot be read ({error.strerror}); give a run's folder") from None
    counts_SLE, moe = loads_of(records, file)
    machine = _machine(arguments, moe)
    if (most := MOST // machine.ranks // moe["top_k"]) < arguments.tokens:
        raise ValueError(f"--tokens={arguments.tokens}: must be at most {most} on {counted(machine.ranks, 'rank')}")
    # choices of a micro-batch on all ranks, in the proportions that were recorded
    scale = arguments.tokens * machine.ranks * moe["top_k"] / counts_SLE.sum(-1, keepdim=True).clamp_min(1)
    counts_SLE = (counts_SLE * scale).round().long()
    found = {name: replay(counts_SLE, method, machine, config) for name, method in METHODS.items()}
    print(describe(found, machine, config, counts_SLE, arguments.tokens))
    methods = {name: {k: v for k, v in vars(o).items() if k != "owners"} for name, o in found.items()}
    text = json.dumps({"machine": asdict(machine), "methods": methods}, indent=2) + "\n"
    for path, content in ((arguments.write_owners, write_owners(found["FSSDP"].owners)), (arguments.out, text)):
        try:
            if path is not None:
                write_atomically(path, content.encode())
        except OSError as error:
            env.stop(env.Process(), env.CANNOT_WRITE, f"{path}: cannot be written ({error.strerror})")


def loads_of(records: list[dict[str, Any]], file: Path) -> tuple[Tensor, dict[str, int]]:
    """Return the choices of all recorded steps, int64 [S, L, E], and the configuration of the run's layers.

    Raises ValueError if there are none, or if they are not those of a run.
    """
    trained = [r for r in records if r.get("kind") == "train" and r.get("layers")]
    runs = [r for r in records if r.get("kind") == "run"]
    if not trained or not runs:
        raise ValueError(f"--loads={file}: has no loads of MoE layers; give the metrics of a run, or its folder")
    try:
        counts_SLE = torch.tensor([[layer["counts"] for layer in r["layers"]] for r in trained], dtype=torch.float64)
        moe = {name: int(runs[-1]["config"]["moe"][name]) for name in NEEDED}
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"--loads={file}: its loads cannot be read ({type(error).__name__}: {error})") from None
    possible = counts_SLE.dim() == 3 and counts_SLE.numel() and bool((counts_SLE >= 0).all())
    if not possible or not bool((counts_SLE.sum(-1) < MOST).all()):
        raise ValueError(f"--loads={file}: its loads cannot be read (counts must be whole numbers of at least 0)")
    if wrong := [name for name, value in moe.items() if value < (name != "gated")]:
        raise ValueError(f"--loads={file}: its loads cannot be read (moe.{wrong[0]}={moe[wrong[0]]})")
    return counts_SLE.long(), moe


def _machine(arguments: argparse.Namespace, moe: dict[str, int]) -> Machine:
    values = (2 + moe["gated"]) * moe["hidden_size"] * moe["intermediate_size"]
    return Machine(
        ranks=arguments.ranks,
        node_size=arguments.ranks // arguments.nodes,
        seconds_per_row=3 * 2 * values / (arguments.tflops * 1e12),
        expert_bytes=2 * values,
        bandwidth=arguments.bandwidth * 1e9,
        latency=arguments.latency * 1e-6,
    )


def describe(
    found: dict[str, Outcome], machine: Machine, config: PlacementConfig, counts_SLE: Tensor, tokens: int
) -> str:
    """Format the outcomes as a table."""
    steps, layers, experts = counts_SLE.shape
    lines = [
        f"{counted(steps, 'recorded step')}, {counted(layers, 'layer')} of {experts} experts, replayed on "
        f"{counted(machine.ranks, 'rank')}, {machine.node_size} per node, {tokens:,} tokens each",
        f"an expert: {machine.expert_bytes / MIB:.2f} MiB in bf16; a copy of it takes as long as "
        f"{machine.rows_per_copy:,.0f} rows (model)",
        f"copies of {counted(config.overlap, 'expert')} per layer and rank hide behind other work",
        "",
        f"{'':<30}{'busiest rank':>17}{'copied':>12}{'moved':>12}{'replicas':>12}{'time':>9}",
        f"{'':<30}{'mean':>8}{'worst':>9}{'MiB':>12}{'MiB':>12}{'MiB':>12}{'ms':>9}",
    ]
    for name, o in found.items():
        sizes = "".join(f"{_mib(count):>12}" for count in (o.copied_bytes, o.moved_bytes, o.replica_bytes))
        lines.append(f"{name:<30}{o.straggler:>8.3f}{o.straggler_max:>9.2f}{sizes}{1e3 * o.seconds:>9.3f}")
    lines += [
        "",
        "busiest rank: its rows over the mean. copied: weights and gradients of replicas, of all ranks, per layer and",
        "step. moved: weights and moments that change owners, likewise. replicas: the most on a rank. time: a layer's",
        "experts, forward and backward, with the copies that delay it, modelled as latency + bytes / bandwidth.",
    ]
    return "\n".join(lines)


def _mib(count: float) -> str:
    return f"{count / MIB:.1f}" if count >= MIB or not count else f"{count / MIB:.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m equimoe.launch.placement", description=(__doc__ or "").split(":")[0])
    add = parser.add_argument
    add("--loads", type=a_path, required=True, metavar="RUN", help="a run's folder, or its metrics.jsonl")
    add("--ranks", type=int, required=True, help="ranks that the experts are distributed over")
    add("--nodes", type=int, default=1, help="nodes that the ranks are on; default 1")
    add("--tokens", type=int, default=4096, help="tokens of a rank in a micro-batch; default 4096")
    add("--overlap", type=int, default=2, help="experts per layer whose copies hide behind other work; default 2")
    room = "MiB for a layer's replicas on a rank; default: those of --overlap experts, which leaves none to calibrate"
    add("--memory-mb", type=int, help=room)
    add("--window", type=int, default=5, help="recorded steps whose mean load is expected next; default 5")
    add("--reshard-every", type=int, default=10, help="recorded steps between changes of owners; 0: never; default 10")
    add("--tflops", type=float, default=400.0, help="TFLOP/s of a rank's grouped products; default 400")
    add("--bandwidth", type=float, default=50.0, help="GB/s that a rank sends and receives; default 50")
    add("--latency", type=float, default=20.0, help="microseconds per copy; default 20")
    add("--write-owners", type=a_path, metavar="FILE", help="write the last owners of FSSDP, for placement.owners")
    add("--out", type=a_path, metavar="FILE", help="also write the result to this JSON file")
    return parser


if __name__ == "__main__":
    main()
