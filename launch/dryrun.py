"""Simulates one rank of a large job: ``python -m equimoe.launch.dryrun --recipe deepseek_v3 --world 1024``.

It runs on a laptop and prints what the rank allocates, sends and computes in one optimizer step. See
:mod:`equimoe.moe.plan.dry_run`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..moe.plan import DryRun, dry_run
from ..moe.train.config import TrainConfig
from . import env
from .options import parse
from .text import counted
from .usage import check_file

USAGE = """usage: python -m equimoe.launch.dryrun --world N [--rank R] [--node N] [--json FILE] [--recipe NAME] ...

  --world INT   number of ranks in the job
  --rank INT    rank to simulate; default 0
  --node INT    ranks per node; default 8
  --json FILE   also write the result to this file

All options of python -m equimoe.launch.train that configure a run also work: --recipe, --config, --SECTION.FIELD.
"""


def describe(found: DryRun, config: TrainConfig) -> str:
    """Format the result of a dry run as text."""
    lines = [
        f"rank {found.rank} of {found.world}: blocks {_ranges(found.blocks)} of {config.model.num_layers}, "
        f"with {_amount(found.parameters, 1000)} parameters, which may be sharded over several ranks",
        f"simulated {found.simulated} of {counted(found.micro_batches, 'micro-batch')} in {found.seconds:.0f} s; "
        "all numbers are for one whole step",
        *found.notes,
        "",
        f"{'memory':<24}{'at the peak':>14}{'own maximum':>18}",
    ]
    for kind, size in sorted(found.most.items(), key=lambda row: -row[1]):
        lines.append(f"  {kind:<22}{_bytes(found.memory.get(kind, 0)):>14}{_bytes(size):>18}")
    lines.append(f"  {'total':<22}{_bytes(sum(found.memory.values())):>14}")
    lines += ["", f"{'collective':<16}{'axis':<14}{'ranks':>6} {'within node':<12}{'calls':>9}{'sent':>13}  when"]
    for what, calls, size in found.traffic:
        row = f"{what.verb:<16}{what.axis:<14}{what.ranks:>6} {'yes' if what.inside_node else 'no':<12}"
        lines.append(f"{row}{calls:>9}{_bytes(size):>13}  {what.when}")
    lines += ["", "floating-point operations, including recomputation"]
    for part, count in [*sorted(found.flops.items(), key=lambda row: -row[1]), ("total", sum(found.flops.values()))]:
        lines.append(f"  {part:<22}{_amount(count, 1000):>14}FLOP")
    return "\n".join(lines)


def _bytes(size: int) -> str:
    return _amount(size, 1024) + "B"


def _amount(value: float, base: int) -> str:
    """Format a number with three or four digits and a unit prefix, as in 12.3 Gi or 1.23 T."""
    prefixes = ["", "Ki", "Mi", "Gi", "Ti", "Pi"] if base == 1024 else ["", "k", "M", "G", "T", "P", "E"]
    while value >= base and len(prefixes) > 1:
        value, prefixes = value / base, prefixes[1:]
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {prefixes[0]}"


def _ranges(numbers: list[int]) -> str:
    """Format sorted numbers as ranges: 0, 1, 2, 5 becomes "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _own(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split ``argv`` into this command's own options, and the remaining arguments."""
    own, rest, left = {"world": "", "rank": "0", "node": "8", "json": ""}, [], list(argv)
    while left:
        name, equals, text = left.pop(0).partition("=")
        if name.startswith("--") and name[2:] in own:
            if not equals and (not left or left[0].startswith("--")):
                raise ValueError(f"{name}: give a value, as in {name} VALUE")
            own[name[2:]] = text if equals else left.pop(0)
            if not own[name[2:]].strip():
                raise ValueError(f"{name}=: is empty; give a value, or leave the option out")
        else:
            rest.append(name + equals + text)
    return own, rest


def _number(own: dict[str, str], name: str, low: int, high: int | None = None) -> int:
    text = own[name]
    if not text:
        raise ValueError(f"--{name}: is missing; give the number of ranks, as in --{name} 1024")
    bound = f"of at least {low}" if high is None else f"from {low} to {high}"
    if not text.lstrip("-").isdigit() or int(text) < low or (high is not None and int(text) > high):
        raise ValueError(f"--{name}={text}: must be a whole number {bound}")
    return int(text)


@env.command
def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with code 64 for a wrong option or configuration, 73 if the file cannot be written."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return
    try:
        own, rest = _own(arguments)
        world, node = _number(own, "world", 1), _number(own, "node", 1)
        rank = _number(own, "rank", 0, world - 1)
        config = parse(rest).config
        if own["json"]:
            check_file("--json", Path(own["json"]))
        found = dry_run(config, world, rank, node)
    except ValueError as error:
        env.stop(env.Process(), env.code_of(error), " ".join(str(error).split()))
    print(describe(found, config))
    if own["json"]:
        try:
            Path(own["json"]).write_text(json.dumps(_as_json(found), indent=1) + "\n")
        except OSError as error:
            env.stop(env.Process(), env.CANNOT_WRITE, f"--json={own['json']}: {error.strerror}")


def _as_json(found: DryRun) -> dict[str, Any]:
    traffic = [asdict(kind) | {"calls": calls, "bytes_sent": size} for kind, calls, size in found.traffic]
    return {f.name: getattr(found, f.name) for f in fields(found)} | {"traffic": traffic}


if __name__ == "__main__":
    main()
