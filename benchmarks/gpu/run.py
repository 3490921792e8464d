"""Checks and measures on a GPU, in three stages of at most four minutes each.

    python benchmarks/gpu/run.py [gate] [speed] [why] [--out DIR]

gate: are the kernels, the layer, training, resuming and collectives right on this GPU? speed: how fast are the ops and
the layer, beside other libraries? why: a profile, the fastest backends (kernels/auto.json) and tiles (as a change of
their table), CUDA graphs, and torch.compile.

Each part is a process with a time limit, so that one that hangs or crashes costs only itself. It prints to a file of
its own in DIR, which is kept whatever ends the command. A part that fails is one line. The command exits with 1 if a
part of the gate has failed.

Without a GPU it says so, and rehearses the parts on the CPU, with Triton's interpreter or with tensors without values.
The rehearsal shows that the parts run; its times say nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.checkout import RESULTS, ROOT
from benchmarks.shared.options import Parser, folder
from benchmarks.shared.records import slug
from equimoe.launch.env import command

STAGE_SECONDS = 4 * 60
#: how many times as long a part may take on a CPU, with Triton's interpreter
REHEARSAL = 4
SHAPES = "30B-b,Qwen3-30B-8k,Mixtral-8x7B-8k,7B-a"
KERNEL_TESTS = [f"tests/kernels/test_triton_{name}.py" for name in ("expert_mlp", "grouped_gemm", "gate", "sort")]
KERNEL_TESTS += [f"tests/kernels/test_triton_{name}.py" for name in ("permute", "layer")]
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


class Part(NamedTuple):
    """One process: Python's arguments on a GPU, those of the rehearsal, and the time limit in seconds."""

    arguments: tuple[str, ...]
    #: empty: cannot be rehearsed
    rehearsal: tuple[str, ...]
    seconds: int
    #: what the rehearsal sets in the environment
    environment: tuple[tuple[str, str], ...] = ()


INTERPRETED = (("TRITON_INTERPRET", "1"),)


def own(name: str, seconds: int, *, environment: tuple[tuple[str, str], ...] = ()) -> Part:
    """Return a part of parts.py, which adapts to the device by itself."""
    arguments = ("benchmarks/gpu/parts.py", name)
    return Part(arguments, arguments, seconds, environment)


def measured(*options: str, seconds: int) -> Part:
    tiny = ("--device", "cpu", "--shapes", "tiny-b", "--minutes", "0.2", "--compiled", "0")
    rehearsal = ("benchmarks/run.py", "--suite", "kernels", "--backend", "triton", *tiny)
    return Part(("benchmarks/run.py", *options, "--shapes", SHAPES), rehearsal, seconds, INTERPRETED)


STAGES: dict[str, dict[str, Part]] = {
    "gate": {
        "facts": own("facts", 25),
        "tiles": Part((*PYTEST, *KERNEL_TESTS), (*PYTEST, KERNEL_TESTS[4], "-k", "sums or strides"), 100, INTERPRETED),
        "layer": own("layer", 30, environment=INTERPRETED),
        "attention": own("attention", 20),
        "waits": Part(
            ("benchmarks/gpu/parts.py", "waits"), (*PYTEST, "tests/devices/test_layer_device.py", "-k", "torch"), 40
        ),
        "repeatability": own("repeatability", 20, environment=INTERPRETED),
        "collectives": own("collectives", 20),
        "training": own("training", 100),
    },
    "speed": {
        "ops and layer": measured("--suite", "all", "--minutes", "2.5", "--compiled", "1", seconds=180),
        "torch's products": measured(
            *("--suite", "layer", "--backend", "torch", "--only", "grouped_mm", "--compiled", "0", "--minutes", "0.7"),
            seconds=60,
        ),
    },
    "why": {
        "profile": own("profile", 30, environment=INTERPRETED),
        "backends": Part(("benchmarks/kernels/tune.py",), (), 60),
        "tiles": own("sweep", 110, environment=INTERPRETED),
        "graphs": Part(("benchmarks/gpu/parts.py", "graphs"), (), 30),
        "compiled": Part(("benchmarks/gpu/parts.py", "compiled"), (), 35),
    },
}


def run_part(part: Part, file: Path, on_gpu: bool, seconds: float) -> int:
    """Run a part, which prints to ``file``; return its exit code, 124 if it ran out of time."""
    arguments = part.arguments if on_gpu else part.rehearsal
    if arguments[0] == "benchmarks/run.py":
        arguments = (*arguments, "--out", str(file.parent))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment |= {} if on_gpu else dict(part.environment)
    with file.open("w") as printed:
        # a session of its own, so that its children end with it
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_stage(stage: str, out: Path, on_gpu: bool) -> list[str]:
    """Run the parts of a stage, and return the names of those that failed."""
    patience = 1 if on_gpu else REHEARSAL
    failed, end = [], time.monotonic() + patience * STAGE_SECONDS
    for name, part in STAGES[stage].items():
        if not on_gpu and not part.rehearsal:
            print(f"{stage}: {name}: cannot be rehearsed without a GPU", flush=True)
            continue
        begin, file = time.monotonic(), out / f"{stage}_{slug(name)}.txt"
        seconds = max(min(patience * part.seconds, end - begin), 0)
        code = run_part(part, file, on_gpu, seconds)
        verdict = {0: "passed", 124: f"ran longer than the {seconds:.0f} s that it had"}.get(
            code, f"FAILED with exit code {code}"
        )
        if code:
            failed.append(name)
            verdict += f": {_last_line(file)}"
        print(f"{stage}: {name}: {verdict} ({time.monotonic() - begin:.0f} s)", flush=True)
    return failed


def _last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").splitlines()
    return next((line.strip()[:160] for line in reversed(lines) if line.strip()), "it printed nothing")


def _stop(number: int, frame: object) -> None:
    """End as after Ctrl-C, so that the part that is running ends too: it is in a session of its own."""
    sys.exit(128 + number)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--out", type=folder, help="folder for results (default: benchmarks/results/gpu_<name>)")
    args = parser.parse_args(argv)
    if unknown := [stage for stage in args.stages if stage not in STAGES]:
        parser.error(f"STAGE={unknown[0]}: unknown; use {', '.join(STAGES)}")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        out = args.out or RESULTS / f"gpu_{slug(torch.cuda.get_device_name())}"
    else:
        print("torch finds no GPU on this machine; the parts are rehearsed on its CPU, and their times say nothing")
        out = args.out or Path(tempfile.mkdtemp(prefix="rehearsal-"))
    out.mkdir(parents=True, exist_ok=True)
    failed = {stage: run_stage(stage, out, on_gpu) for stage in args.stages or STAGES}
    total = sum(map(len, failed.values()))
    print(f"{total or 'no'} {'part has' if total == 1 else 'parts have'} failed; what they printed is in {out}")
    return int(bool(failed.get("gate")) if on_gpu else total > 0)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    sys.exit(main())
