"""Every op and the whole layer, beside their floors and their peers, on one device.

    python benchmarks/run.py [--suite kernels|layer|all] [--device cuda|cpu] [--shapes 30B-b,7B-a] [--out DIR]
                             [--backend triton|torch] [--peer NAME=PATH] [--minutes 8]

Everything is compared with fp64, forward and backward: first at a reduced size, then what was timed on the inputs that
were timed. When anything of ours is wrong, no figure is printed and the command exits with 1. Random inputs of unit
scale, uniform and Zipf-skewed routing, contestants by turns in one process, beside the product and copy rates that the
machine reaches in that process. On a CPU the shapes get fewer tokens and experts.
Writes JSON, the tables (.md) and a picture (.png) of the fractions of the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  (first: it decides which equimoe is imported)

# isort: split
import against
import foreign
import kernel_suite
import layer_suite
import peers
import report
import shapes
import torch
from agreement import Red
from checkout import ROOT
from options import CORES, Parser, folder, positive, threads
from shapes import Shape
from timing import Timer, yardstick
from workloads import environment

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
SUITES = ("kernels", "layer")
PACKAGES = ("triton", "transformers", "liger-kernel", "scattermoe", "sonic-moe", "transformer-engine")
#: a compilation takes tens of seconds, twice for each shape
COMPILED = {"cuda": 2, "cpu": 0}
MINUTES = {"cuda": 7.5, "cpu": 5.0}
#: rounds of all contestants, and about how many seconds each may take in all per routing
ROUNDS = {"cuda": (10, 0.8), "cpu": (3, 1.0)}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all", help="(default %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("torch", "triton"), help="(default: triton on a GPU, torch on a CPU)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="(default %(default)s)")
    parser.add_argument("--shapes", metavar="NAME,...", help=f"of {', '.join(shapes.BY_NAME)} (default: all but tiny)")
    parser.add_argument("--peer", metavar="NAME=PATH", action="append", default=[], help="where another project lies")
    parser.add_argument("--only", metavar="NAME,...", help="these contestants beside ours (default: all)")
    parser.add_argument("--compiled", type=int, metavar="N", help="compile grouped_mm for N shapes (2; CPU 0)")
    parser.add_argument("--minutes", type=float, help="no shape begins when it would end after so many (7.5; CPU 5)")
    parser.add_argument("--threads", type=threads, default=min(2, CORES), help="on a CPU (default %(default)s)")
    parser.add_argument("--out", type=folder, default=str(ROOT / "benchmarks/results"), help="(default %(default)s)")
    parser.add_argument(
        "--against", metavar="PATH", type=Path, help="another checkout, measured by turns with this one"
    )
    parser.add_argument("--rounds", type=positive, default=3, help="runs of each with --against (default %(default)s)")
    args = parser.parse_args(argv)
    if args.against and not (args.against / "benchmarks" / "run.py").is_file():
        parser.error(f"--against={args.against}: has no benchmarks/run.py; give the folder of a checkout")
    args.backend = args.backend or ("triton" if args.device == "cuda" else "torch")
    args.compiled = COMPILED[args.device] if args.compiled is None else args.compiled
    args.minutes = MINUTES[args.device] if args.minutes is None else args.minutes
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: torch sees no GPU; use --device cpu")
    if args.device == "cpu" and args.backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        how = (
            "TRITON_INTERPRET=1 python benchmarks/run.py --device cpu --backend triton --suite kernels --shapes tiny-b"
        )
        parser.error(f"--backend=triton: there is no GPU; to see that it runs, and nothing of its speed: {how}")
    try:
        args.chosen, args.foreign = shapes.parse(args.shapes), foreign.find(args.peer)
        known = {*peers.own("", True), *args.foreign}
        if unknown := {*(args.only or "").split(",")} - known - {""}:
            raise ValueError(f"--only={','.join(sorted(unknown))}: choose from {', '.join(sorted(known))}")
    except ValueError as error:
        parser.error(str(error))
    return args


def forwarded(argv: list[str]) -> list[str]:
    """The arguments without those of the comparison, and without --out."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--against", "--rounds", "--out"):
        parser.add_argument(name)
    return parser.parse_known_args(argv)[1]


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else str(environment(())["cpu"])


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions, commit."""
    found: dict[str, Any] = {"device": device_name(args.device), **environment(PACKAGES), "cores": os.cpu_count()}
    if args.device == "cuda":
        found |= {"gpu_memory": torch.cuda.get_device_properties(0).total_memory, "cuda": torch.version.cuda}
    return found


def load() -> list[float]:
    """The machine's load averages, for judging whether anything else ran."""
    return [round(value, 2) for value in os.getloadavg()]


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def sized(shape: Shape, device: str) -> Shape:
    return shape if device == "cuda" else shapes.for_cpu(shape)


def needed_bytes(shape: Shape, size: int, device: torch.device) -> int:
    """Weights, their gradients, and rows. A GPU says when it is full, and a contestant is left out; a CPU does not."""
    copies, times = (2, 1) if device.type == "cuda" else (3, 2)
    rows = shape.rows * (3 * shape.D + 6 * shape.F) + 6 * shape.T * shape.D
    right = 4 * shape.weights + 40 * shape.T * shape.D  # the reference's gradients, its inputs and outputs
    return size * (copies * shape.weights + times * rows) + right


def run_shape(shape: Shape, args: argparse.Namespace, context: layer_suite.Context) -> dict[str, Any]:
    """Gate and figures of one shape. Raises Red."""
    actual = sized(shape, args.device)
    result: dict[str, Any] = {key: getattr(actual, key) for key in ("T", "D", "F", "E", "K", "rows", "source")}
    result |= {"published": {"T": shape.T, "E": shape.E}, "gate": {}, "load_before": load()}
    torch.manual_seed(0)
    if args.suite in ("layer", "all"):
        result["gate"]["layer"], refused = layer_suite.gate(actual, context)
        result["layer"] = layer_suite.measure(actual, context, {**context.absent, **refused})
        context.timer.release()
    if args.suite in ("kernels", "all"):
        result["gate"]["kernels"] = kernel_suite.gate(actual, context)
        result["kernels"] = kernel_suite.measure(actual, context)
    result["load_after"] = load()
    return result


def run_all(args: argparse.Namespace, context: layer_suite.Context, result: dict[str, Any], partial: Path) -> None:
    """All shapes for which there is time and memory, most important first."""
    begin, usual = time.monotonic(), 0.0
    compiled = 0
    for index, shape in enumerate(args.chosen):
        passed = time.monotonic() - begin
        if index and passed + 0.7 * usual > 60 * args.minutes:
            result["left_out"][shape.name] = f"no time left of {args.minutes:g} minutes"
            continue
        needed = needed_bytes(sized(shape, args.device), context.dtype.itemsize, context.device)
        free = free_bytes(context.device)
        if needed > 0.8 * free:
            result["left_out"][shape.name] = f"needs about {needed >> 30} GiB, {free >> 30} GiB are free"
            continue
        use_compiled = compiled < args.compiled
        compiled += 1
        context.builders = builders(args, use_compiled)
        context.absent = {} if use_compiled else {peers.COMPILED: f"for {args.compiled} shapes only (--compiled)"}
        print(f"{shape.name} ...", end=" ", flush=True)
        start = time.monotonic()
        result["shapes"][shape.name] = run_shape(shape, args, context)
        took = time.monotonic() - start
        usual = usual if use_compiled else took
        print(f"right, and measured in {took:.0f} s", flush=True)
        partial.write_text(json.dumps(result, indent=1))


def builders(args: argparse.Namespace, use_compiled: bool) -> dict[str, Any]:
    """The contestants that were asked for."""
    found = {**peers.own(args.backend, use_compiled), **args.foreign}
    if args.only is None:
        return {name: build for name, build in found.items() if name not in foreign.ONLY_IF_NAMED}
    return {name: build for name, build in found.items() if name in (peers.OURS, *args.only.split(","))}


def rates_of(context: layer_suite.Context) -> dict[str, float]:
    return {"matmul_tflops": context.rates.flops / 1e12, "copy_tbs": context.rates.bytes / 1e12}


def new_context(args: argparse.Namespace) -> layer_suite.Context:
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    interpreted = args.device == "cpu" and args.backend == "triton"
    timer, dtype, (rounds, seconds) = (
        Timer(device),
        DTYPES[args.dtype],
        (1, 1.0) if interpreted else ROUNDS[args.device],
    )
    rates = yardstick(timer, dtype, quick=_quick(args))
    return layer_suite.Context(timer, dtype, args.backend, rates, {}, rounds, seconds)


def _quick(args: argparse.Namespace) -> bool:
    return all(shape in shapes.TINY for shape in args.chosen)


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
        "facts": facts(args),
        "command": "python benchmarks/run.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "arguments": plain,
        "yardstick": {"start": rates_of(context)},
        "notes": notes(args),
        "shapes": {},
        "left_out": {},
        "load_before": load(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", result["facts"]["device"].lower()).strip("-")
    slug += f"-{args.threads}threads" * (args.device == "cpu")
    path = args.out / f"{args.suite}_{slug}_{args.backend}_{args.dtype}.json"
    partial = path.with_suffix(".partial.json")
    begin = time.monotonic()
    try:
        run_all(args, context, result, partial)
    except KeyboardInterrupt:
        result["notes"].append("stopped by hand before the end")
    except Red as error:
        partial.unlink(missing_ok=True)
        print()
        print(f"WRONG: {error}; no figures", file=sys.stderr)
        return 1
    context.rates = yardstick(context.timer, context.dtype, quick=_quick(args))
    result["yardstick"]["end"] = rates_of(context)
    result |= {"seconds": round(time.monotonic() - begin, 1), "load_after": load()}
    result["aims"] = [aim._asdict() for aim in report.aims(result)]
    path.write_text(json.dumps(result, indent=1) + "\n")
    partial.unlink(missing_ok=True)
    print("\n" + report.markdown(result))
    print("written:", path, *report.write(result, path))
    return 0


def notes(args: argparse.Namespace) -> list[str]:
    """What a reader of the figures has to know."""
    found = ["time/ours is that of forward and backward; of floor is the least time at the yardstick's rates over ours"]
    if args.device == "cpu":
        found.append(f"a CPU: tokens are reduced to about {shapes.CPU_FLOPS:.0e} operations a step, and experts to")
        found[-1] += f" {shapes.CPU_WEIGHTS:.0e} weights or 2K experts; large random tensors repeat one block; floors"
        found[-1] += " leave caches out, which hold much of small shapes"
    if args.backend == "triton" and args.device == "cpu":
        found.append("Triton's interpreter: the figures say that everything runs, and nothing about its speed")
    if args.dtype == "fp32":
        found.append("floors and byte counts by formula are those of 16-bit tensors")
    found.append("absent contestants are named with the reason below each table")
    unasked = [name for name in foreign.ONLY_IF_NAMED if args.only is None or name not in args.only]
    found += [f"{name} is run only if --only names it: {foreign.ONLY_IF_NAMED[name]}" for name in unasked]
    return found


if __name__ == "__main__":
    sys.exit(main())
