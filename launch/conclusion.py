"""What the training command prints after the last step."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..moe import checkpoint
from ..moe.observe.metrics import METRICS_FILE, read_records
from ..moe.observe.printable import printable
from ..moe.train.optim import rise_on_resume
from ..moe.train.trainer import Trainer
from . import env
from .options import Launch
from .records import numbers


def constant_rate(rate: float) -> str:
    """Return the options with which a run goes on at a learning rate."""
    return f"--optim.schedule constant --optim.lr {rate:.4g}"


def conclude(trainer: Trainer, launch: Launch, result: dict[str, Any], arguments: list[str]) -> None:
    """Print the held-out losses of a finished run, where its files are, and how to train on."""
    run_dir, config = launch.run_dir, launch.config
    report = _report(run_dir)  # first: whatever happens to the terminal, the page exists
    try:
        records = read_records(run_dir / METRICS_FILE)
    except OSError:  # a full disk did not end the run, and the missing file does not either
        records = []
    baseline = next((record for record in records if record["kind"] == "baseline"), {})
    trained: dict[str, Any] = next(
        (record for record in reversed(records) if record["kind"] == "train"), {"layers": []}
    )
    print("\nheld-out loss (nats per token), compared with a bigram model of the whole training text:")
    rows = [(d, entry["loss"]) for d, entry in result["domains"].items()] + [("all", result["loss"])]
    for domain, loss in rows:
        bigram = numbers([baseline], "bigram", domain)[0]
        print(f"  {printable(domain):<16} {loss:.4f}   bigram {bigram:.4f}")
    dead = sum(int(layer["dead"]) for layer in trained["layers"])
    print(f"dead experts in the last step: {dead} of {len(trained['layers']) * config.moe.num_experts}")
    print(f"checkpoint: {printable(str(checkpoint.newest(run_dir / 'checkpoints')))}")
    print(f"metrics:    {printable(str(run_dir / METRICS_FILE))}")
    print(f"report:     {report}")
    generate = shlex.join([_python(), "-m", "equimoe.launch.generate", "--run-dir", str(run_dir), "--prompt", "The "])
    print(f"generate:   {printable(generate)}")
    longer = replace(config, steps=2 * config.steps)
    command = printable(command_to_continue(arguments, env.this_process(), longer.steps))
    if (rise := rise_on_resume(config.optim, config.steps, longer, config.steps)) is None:
        print(f"continue:   {command}", flush=True)
    else:
        print(f"continue:   {command} {constant_rate(rise[0])}")
        print(f"            without the last two options, the learning rate would rise to {rise[1]:.2g}", flush=True)


def conclude_early(trainer: Trainer, launch: Launch, number: int, arguments: list[str], process: env.Process) -> None:
    """Say where a run that the signal ``number`` stopped is, and how to continue it."""
    run_dir, steps = launch.run_dir, trainer.config.steps
    print(f"\nstopped by {signal.Signals(number).name} after step {trainer.step} of {steps}; no step is lost")
    print(f"checkpoint: {printable(str(checkpoint.newest(run_dir / 'checkpoints')))}")
    print(f"metrics:    {printable(str(run_dir / METRICS_FILE))}")
    print(f"report:     {_report(run_dir)}")
    print(f"continue:   {printable(command_to_continue(arguments, process, steps))}", flush=True)


def report_if_missing(run_dir: Path) -> None:
    """Write the report of a finished run that was killed before it had one."""
    from .report import REPORT_FILE

    page, metrics = run_dir / REPORT_FILE, run_dir / METRICS_FILE
    if metrics.exists() and (not page.exists() or page.stat().st_mtime < metrics.stat().st_mtime):
        print(f"report:     {_report(run_dir)}")


def _report(run_dir: Path) -> str:
    """Write the report; return its path, or why there is none. A finished run does not fail for it."""
    from .report import write_report  # imported late: matplotlib takes a second

    try:
        return printable(str(write_report(run_dir)))
    except (ValueError, OSError) as problem:
        return f"not written: {printable(str(problem))}"


def command_to_continue(arguments: list[str], process: env.Process, steps: int) -> str:
    """Return the command that continues this run, for the folder in which it was started.

    A script that starts the run in its own way says so with the variable ``EQUIMOE_COMMAND``: a command that resumes
    the run and takes further options.
    """
    if command := os.environ.get("EQUIMOE_COMMAND"):
        return f"{command.strip()} --steps {steps}"
    kept, skip = [], False
    for argument in arguments:
        name = argument.split("=")[0]
        if not skip and name not in ("--resume", "--steps", "--processes"):
            kept.append(argument)
        skip = not skip and argument in ("--steps", "--processes")
    more = [*kept, "--resume", "--steps", str(steps)]
    if process.local_world < process.world:
        return f"run the same command on every machine with the options {shlex.join(more)}"
    if launcher := _launcher():
        return shlex.join([*launcher, *more])
    processes = ["--processes", str(process.world)] if process.world > 1 else []
    return shlex.join([_python(), "-m", "equimoe.launch.train", *processes, *more])


def _launcher() -> list[str]:
    """Return the torchrun command of the user who started this rank, up to the module; empty if there is none."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
        module = words.index("equimoe.launch.train")
    except (OSError, ValueError):
        return []
    programs = {"torchrun": ["torchrun"], "torch.distributed.run": [_python(), "-m", "torch.distributed.run"]}
    for place, word in enumerate(words[:module]):
        if (name := os.path.basename(word)) in programs:
            return [*programs[name], *words[place + 1 : module + 1]]
    return []  # --processes has started torchrun


def _python() -> str:
    """Return the path of this Python, as a user in this folder writes it."""
    return os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd() + os.sep) else sys.executable
