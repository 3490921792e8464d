"""Compiles every Triton kernel with every shipped tile for every supported GPU, without a GPU, and checks the result.

    python benchmarks/kernels/compile_gate.py [--chips sm_90 gfx942] [--only TEXT] [--update]

The compiler accepts tiles that no GPU can launch, and tiles that spill registers to memory. This command prints what
each kernel needs and compares it with the table compiled.tsv. It exits with 1 if a kernel spills registers, uses a
stack, needs more shared memory than the chip has, holds fewer steps in its pipeline than its tile asks for, multiplies
16-bit matrices without the chip's best matrix instruction, or with a narrower one or fewer steps than in the table, is
missing in the table, or is not compiled any more. --update writes the table. It does not measure speed.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

if os.environ.pop("TRITON_INTERPRET", None):  # read when triton loads
    print("TRITON_INTERPRET is ignored: this command compiles")

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.kernels.binary import CHIPS, HEADINGS, TABLE, Row, read, table, write
from benchmarks.kernels.gate_cases import works
from benchmarks.kernels.launches import Launch, compiled, on_chip, recorded
from benchmarks.shared.options import Parser
from equimoe.launch.env import command

COLUMNS = "{:7} {:46} {:19} {:>5} {:>6} {:>5} {:>6} {:>6} {:9} {:>6} {:>5}  {}"


def is_matrix_kernel(launch: Launch) -> bool:
    """Return whether the kernel multiplies 16-bit matrices. (There is no matrix instruction for exact fp32.)"""
    halves = (torch.bfloat16, torch.float16)
    is_half = any(getattr(one, "dtype", None) in halves for one in launch.args)
    return splits(launch) or ("tl.dot(" in launch.kernel.src and is_half)


def splits(launch: Launch) -> bool:
    """Return whether the kernel splits its fp32 operands into bf16 terms, in registers."""
    return "_add_product(" in launch.kernel.src


def steps_of(launch: Launch) -> int:
    """Return how many steps the pipeline should hold: what is in registers needs no place in shared memory."""
    return int(launch.options.get("num_stages", 0)) - splits(launch)


def tile_of(launch: Launch) -> str:
    given = launch.options
    if "BLOCK_M" not in given:
        return ""
    return "{BLOCK_M}x{BLOCK_N}x{BLOCK_K} w{num_warps} s{num_stages}".format(**given)


class Result(NamedTuple):
    """A kernel's row (None if it does not compile), the line to print, and whether there is a fault."""

    row: Row | None
    line: str
    faulty: bool


def examined(name: str, label: str, launch: Launch, seen: set[int], known: Row | None) -> Result | None:
    """Compile one launch and compare it with its row of the table, or return None if its binary is in ``seen``."""
    chip, tile, row, notes = CHIPS[name], tile_of(launch), None, []
    try:
        found = compiled(launch)
        if id(found) in seen:
            return None
        seen.add(id(found))
        row = Row(name, label, tile, read(chip, found, found.metadata.num_warps))
        is_matrix = is_matrix_kernel(launch)
        faults = row.binary.faults(chip, is_matrix, steps_of(launch))
        if known is not None:
            faults += row.binary.losses(known.binary, is_matrix)
            pairs = zip(HEADINGS[2:], row.cells()[2:], known.cells()[2:], strict=True)
            notes = [f"({heading} was {old or 'none'})" for heading, new, old in pairs if new != old]
    except Exception as error:  # a compiler error is a fault of this case; the others continue
        faults = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    cells = row.cells() if row else [name, label, tile, *["-"] * 8]
    return Result(row, COLUMNS.format(*cells, "; ".join(faults + notes)).rstrip(), bool(faults))


def examine(name: str, only: str = "") -> list[Result]:
    """Compile each kernel of each case for one chip."""
    results, seen, known = [], set[int](), table() if TABLE.exists() else {}
    torch.set_num_threads(1)
    with on_chip(name, CHIPS[name].target):
        for case, work in works():
            times = Counter[str]()
            for launch in recorded(work):
                label = f"{launch.kernel.__name__.strip('_')} {case}"
                times[label] += 1
                if times[label] > 1:
                    label += f" {times[label]}"
                found = examined(name, label, launch, seen, known.get((name, label))) if only in label else None
                if found is not None:
                    results.append(found)
    return results


def gate(name: str, only: str = "") -> list[tuple[str, bool]]:
    """Return a report line for each kernel and case on one chip, and whether it has a fault."""
    return [(result.line, result.faulty) for result in examine(name, only)]


def gate_all(chips: Sequence[str], only: str, jobs: int, update: bool) -> bool:
    """Compile for all chips in parallel and print the report; return whether something was compiled without faults."""
    print(COLUMNS.format(*HEADINGS, "fault, or (what the table says)"), flush=True)
    done = faulty = 0
    rows = {} if not TABLE.exists() else table()
    missing, gone = [], []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for name, results in zip(chips, pool.map(examine, chips, [only] * len(chips)), strict=True):
            print("\n".join(result.line for result in results), flush=True)
            done, faulty = done + len(results), faulty + sum(result.faulty for result in results)
            found = {row[:2]: row for row in (result.row for result in results) if row}
            missing += [label for label in found if label not in rows]
            if all(result.row for result in results):
                gone += [label for label in rows if label[0] == name and label not in found]
            if update and not only:  # rows of kernels that are gone
                rows = {key: row for key, row in rows.items() if key[0] != name}
            if update:
                rows |= found
    if update:
        write(rows)
        print(f"wrote {TABLE}")
    elif missing and not only:  # with --only, a binary can appear under the name of a later case
        print(f"{len(missing)} are missing in {TABLE.name}, first {' '.join(missing[0])!r}: add them with --update")
        faulty += len(missing)
    if gone and not update and not only:  # nothing would say so if an op no longer launched its kernel
        print(f"{len(gone)} of {TABLE.name} are not compiled, first {' '.join(gone[0])!r}: remove them with --update")
        faulty += len(gone)
    if not done:
        print(f"--only={only}: no kernel's label contains this; leave it out to compile all")
    print(f"{done} compiled, {faulty} at fault")
    return done > 0 and not faulty


@command
def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="(default: all)")
    parser.add_argument("--only", default="", help="compile only kernels whose label contains this text")
    parser.add_argument("--update", action="store_true", help="write the table; a part of it with --chips or --only")
    args = parser.parse_args()
    jobs = min(len(args.chips), os.cpu_count() or 1)
    return int(not gate_all(args.chips, args.only, jobs, args.update))


if __name__ == "__main__":
    sys.exit(main())
