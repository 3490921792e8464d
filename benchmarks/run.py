"""Measures every op and the whole layer on one device, against lower bounds and other implementations.

    python benchmarks/run.py [--suite kernels|layer|all] [--device cuda|cpu] [--shapes 30B-b,7B-a] [--out DIR]
                             [--backend triton|torch] [--peer NAME=PATH] [--minutes 8]

All outputs and gradients are compared with fp64, first at a reduced size, then on the inputs that were timed. If one of
ours is wrong, the command prints no measurements and exits with 1. Inputs are random and of unit scale, routing is even
or Zipf-skewed, and contestants take turns in one process. The lower bounds ("floors") follow from the matrix-product
and copy rates that the machine reaches in this process. On a CPU, shapes have fewer tokens and experts.

The command writes a .json file and its tables (.md), with times relative to the floors.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent)
    import checkout  # noqa: F401

import torch

from benchmarks.kernels import kernel_suite
from benchmarks.layer import foreign, layer_suite, peers
from benchmarks.shared import against, report, shapes
from benchmarks.shared.agreement import WrongResult
from benchmarks.shared.options import CORES, Parser, positive, threads
from benchmarks.shared.records import OURS, facts, load_averages, slug
from benchmarks.shared.shapes import Shape
from benchmarks.shared.timing import Context, Timer, yardstick
from equimoe.launch.env import command

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
SUITES = ("kernels", "layer")
PACKAGES = ("triton", "transformers", "liger-kernel", "scattermoe", "sonic-moe", "transformer-engine")
#: for how many shapes grouped_mm is compiled, which takes tens of seconds twice per shape
COMPILED = {"cuda": 2, "cpu": 0}
MINUTES = {"cuda": 7.5, "cpu": 5.0}
#: rounds of all contestants, and about how many seconds each contestant gets in total per routing
ROUNDS = {"cuda": (10, 0.8), "cpu": (3, 1.0)}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all", help="(default %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("torch", "triton"), help="(default: triton on a GPU, torch on a CPU)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="(default %(default)s)")
    parser.add_argument("--shapes", metavar="NAME,...", help=f"of {', '.join(shapes.BY_NAME)} (default: all but tiny)")
    parser.add_argument("--peer", metavar="NAME=PATH", action="append", default=[], help="checkout of another project")
    parser.add_argument("--only", metavar="NAME,...", help="contestants to measure besides ours (default: all)")
    parser.add_argument("--compiled", type=int, metavar="N", help="compile grouped_mm for N shapes (default: 2; CPU 0)")
    parser.add_argument("--minutes", type=float, help="time limit for all shapes (default: 7.5; CPU 5)")
    parser.add_argument("--threads", type=threads, default=min(2, CORES), help="CPU threads (default %(default)s)")
    parser.add_out()
    parser.add_argument(
        "--against", metavar="PATH", type=Path, help="another checkout, which takes turns with this one"
    )
    parser.add_argument("--rounds", type=positive, default=3, help="runs of each with --against (default %(default)s)")
    args = parser.parse_args(argv)
    if args.against and not (args.against / "benchmarks" / "run.py").is_file():
        parser.error(f"--against={args.against}: does not contain benchmarks/run.py; give the folder of a checkout")
    args.backend = args.backend or ("triton" if args.device == "cuda" else "torch")
    args.compiled = COMPILED[args.device] if args.compiled is None else args.compiled
    args.minutes = MINUTES[args.device] if args.minutes is None else args.minutes
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: torch finds no GPU; use --device cpu")
    if args.device == "cpu" and args.backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        how = (
            "TRITON_INTERPRET=1 python benchmarks/run.py --device cpu --backend triton --suite kernels --shapes tiny-b"
        )
        parser.error(f"--backend=triton: needs a GPU; to check only that it runs: {how}")
    try:
        args.chosen, args.foreign = shapes.parse(args.shapes), foreign.find(args.peer)
        known = {*peers.own("", True), *args.foreign}
        if unknown := {*(args.only or "").split(",")} - known - {""}:
            raise ValueError(f"--only={','.join(sorted(unknown))}: choose from {', '.join(sorted(known))}")
    except ValueError as error:
        parser.error(str(error))
    return args


def forwarded(argv: list[str]) -> list[str]:
    """Return the arguments without --against, --rounds and --out."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--against", "--rounds", "--out"):
        parser.add_argument(name)
    return parser.parse_known_args(argv)[1]


def device_facts(device: str) -> dict[str, Any]:
    """Return hardware, versions and commit."""
    found = facts(*PACKAGES)
    if device == "cpu":
        return {"device": found["cpu"], **found}
    memory = torch.cuda.get_device_properties(0).total_memory
    return {"device": torch.cuda.get_device_name(), **found, "gpu_memory": memory, "cuda": torch.version.cuda}


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def sized(shape: Shape, device: str) -> Shape:
    return shape if device == "cuda" else shapes.for_cpu(shape)


def needed_bytes(shape: Shape, size: int, device: torch.device) -> int:
    """Estimate the memory for weights, gradients and rows, generously on a CPU, where running out kills the process."""
    copies, times = (2, 1) if device.type == "cuda" else (3, 2)
    rows = shape.rows * (3 * shape.D + 6 * shape.F) + 6 * shape.T * shape.D
    fp64_reference = 4 * shape.weights + 40 * shape.T * shape.D
    return size * (copies * shape.weights + times * rows) + fp64_reference


def run_shape(shape: Shape, args: argparse.Namespace, context: Context) -> dict[str, Any]:
    """Check and measure one shape."""
    actual = sized(shape, args.device)
    result: dict[str, Any] = {key: getattr(actual, key) for key in ("T", "D", "F", "E", "K", "rows", "source")}
    result |= {"published": {"T": shape.T, "E": shape.E}, "gate": {}, "load_before": load_averages()}
    torch.manual_seed(0)
    if args.suite in ("layer", "all"):
        result["gate"]["layer"], refused = layer_suite.gate(actual, context)
        result["layer"] = layer_suite.measure(actual, context, {**context.absent, **refused})
        context.timer.release()
    if args.suite in ("kernels", "all"):
        result["gate"]["kernels"] = kernel_suite.gate(actual, context)
        result["kernels"] = kernel_suite.measure(actual, context)
    result["load_after"] = load_averages()
    return result


def run_all(args: argparse.Namespace, context: Context, result: dict[str, Any], partial: Path) -> None:
    """Measure the shapes in order, except those for which time or memory does not suffice."""
    begin, usual = time.monotonic(), 0.0
    compiled = 0
    for index, shape in enumerate(args.chosen):
        passed = time.monotonic() - begin
        if index and passed + 0.7 * usual > 60 * args.minutes:
            result["left_out"][shape.name] = f"would take longer than --minutes={args.minutes:g}"
            continue
        needed = needed_bytes(sized(shape, args.device), context.dtype.itemsize, context.device)
        free = free_bytes(context.device)
        if needed > 0.8 * free:
            result["left_out"][shape.name] = f"needs about {needed >> 30} GiB, {free >> 30} GiB are free"
            continue
        use_compiled = compiled < args.compiled
        compiled += 1
        context.builders = builders(args, use_compiled)
        context.absent = {} if use_compiled else {peers.COMPILED: f"--compiled={args.compiled} shapes only"}
        print(f"{shape.name} ...", end=" ", flush=True)
        start = time.monotonic()
        result["shapes"][shape.name] = run_shape(shape, args, context)
        took = time.monotonic() - start
        usual = usual if use_compiled else took
        print(f"correct; measured in {took:.0f} s", flush=True)
        partial.write_text(json.dumps(result, indent=1))


def builders(args: argparse.Namespace, use_compiled: bool) -> dict[str, Any]:
    """Return the builders of the chosen contestants."""
    found = {**peers.own(args.backend, use_compiled), **args.foreign}
    if args.only is None:
        return {name: build for name, build in found.items() if name not in foreign.ONLY_IF_NAMED}
    return {name: build for name, build in found.items() if name in (OURS, *args.only.split(","))}


def rates_of(context: Context) -> dict[str, float]:
    return {"matmul_tflops": context.rates.flops / 1e12, "copy_tbs": context.rates.bytes / 1e12}


def new_context(args: argparse.Namespace) -> Context:
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    interpreted = args.device == "cpu" and args.backend == "triton"
    timer, dtype = Timer(device), DTYPES[args.dtype]
    rounds, seconds = (1, 1.0) if interpreted else ROUNDS[args.device]
    rates = yardstick(timer, dtype, quick=_quick(args))
    return Context(timer, dtype, args.backend, rates, {}, rounds, seconds)


def _quick(args: argparse.Namespace) -> bool:
    return all(shape in shapes.TINY for shape in args.chosen)


@command
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.against:
        print(against.compare(args.against.resolve(), args.rounds, forwarded(sys.argv[1:] if argv is None else argv)))
        return 0
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    context = new_context(args)
    plain = {
        key: value for key, value in vars(args).items() if key not in ("chosen", "foreign", "out", "against", "rounds")
    }
    result: dict[str, Any] = {
        "facts": device_facts(args.device),
        "command": "python benchmarks/run.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "arguments": plain,
        "yardstick": {"start": rates_of(context)},
        "notes": notes(args),
        "shapes": {},
        "left_out": {},
        "load_before": load_averages(),
    }
    machine = slug(result["facts"]["device"]) + f"-{args.threads}threads" * (args.device == "cpu")
    path = args.out / f"{args.suite}_{machine}_{args.backend}_{args.dtype}.json"
    partial = path.with_suffix(".partial.json")
    begin = time.monotonic()
    try:
        run_all(args, context, result, partial)
    except KeyboardInterrupt:
        result["notes"].append("interrupted by the user before the end")
    except WrongResult as error:
        partial.unlink(missing_ok=True)
        print()
        print(f"WRONG: {error}; no measurements are shown", file=sys.stderr)
        return 1
    context.rates = yardstick(context.timer, context.dtype, quick=_quick(args))
    result["yardstick"]["end"] = rates_of(context)
    result |= {"seconds": round(time.monotonic() - begin, 1), "load_after": load_averages()}
    result["aims"] = [aim._asdict() for aim in report.aims(result)]
    path.write_text(json.dumps(result, indent=1) + "\n")
    partial.unlink(missing_ok=True)
    print("\n" + report.markdown(result))
    print("written:", path, report.write(result, path))
    return 0


def notes(args: argparse.Namespace) -> list[str]:
    """Return what a reader of the tables must know."""
    found = ["time/ours: forward and backward together; of floor: the floor at the measured rates, divided by the time"]
    if args.device == "cpu":
        found.append(
            f"on a CPU, tokens are reduced to about {shapes.CPU_FLOPS:.0e} operations per step, and experts to "
            f"{shapes.CPU_WEIGHTS:.0e} weights or 2K experts; large random tensors repeat one block; floors ignore "
            "caches, which hold much of small shapes"
        )
    if args.backend == "triton" and args.device == "cpu":
        found.append("Triton's interpreter: this shows that everything runs, and says nothing about speed")
    if args.dtype == "fp32":
        found.append("floors and byte counts assume 16-bit tensors")
    found.append("contestants that are missing are listed with the reason below each table")
    unasked = [name for name in foreign.ONLY_IF_NAMED if args.only is None or name not in args.only]
    found += [f"{name} runs only if --only names it: {foreign.ONLY_IF_NAMED[name]}" for name in unasked]
    return found


if __name__ == "__main__":
    sys.exit(main())
