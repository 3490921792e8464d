"""Compiles every Triton kernel with every shipped tile for every supported GPU, without a GPU, and checks the result.

    python benchmarks/kernels/compile_gate.py [--chips sm_90 gfx942] [--only TEXT]

The compiler accepts tiles that no GPU can launch, and tiles that spill registers to memory. This command exits with 1
if a kernel spills registers, uses a stack, needs more shared memory than the chip has, or multiplies 16-bit matrices
without the chip's best matrix instruction. It does not measure speed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

if os.environ.pop("TRITON_INTERPRET", None):  # read when triton loads
    print("TRITON_INTERPRET is ignored: this command compiles")

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.kernels.gate_cases import works
from benchmarks.kernels.launches import Launch, compiled, on_chip, recorded
from benchmarks.shared.options import Parser
from equimoe.launch.env import command


class Chip(NamedTuple):
    target: GPUTarget
    #: bytes of shared memory per block, as documented by the vendor
    shared: int
    #: the compiler stage whose output contains matrix instructions, and the pattern of the best one
    stage: str
    matrix: str


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 166912, "ptx", r"\bmma\.sync"),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 232448, "ptx", r"\bwgmma\.mma_async"),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 232448, "ptx", r"\btcgen05\.mma"),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 101376, "ptx", r"\bmma\.sync"),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 65536, "amdgcn", r"\bv_mfma_"),
    "gfx950": Chip(GPUTarget("hip", "gfx950", 64), 163840, "amdgcn", r"\bv_mfma_"),
}
COLUMNS = "{:7} {:52} {:>5} {:>6} {:>6} {:>7}/{:<7} {:10} {}"


class Report(NamedTuple):
    registers: int
    spills: int
    stack: int
    shared: int
    instruction: str

    def faults(self, chip: Chip, is_matrix: bool) -> list[str]:
        found = []
        if self.spills:
            found.append(f"{self.spills} spilled")
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if self.shared > chip.shared:
            found.append(f"{self.shared} bytes of shared memory")
        if is_matrix and not self.instruction:
            found.append("does not use the chip's matrix instruction")
        return found


def nvidia_usage(cubin: bytes) -> tuple[int, int, int]:
    """Return registers, spills and stack. Spilled registers are on the stack or in local memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    numbers = {name: int(re.search(rf"{name}:(\d+)", text.stdout)[1]) for name in ("REG", "STACK", "LOCAL")}
    return numbers["REG"], numbers["LOCAL"], numbers["STACK"]


def amd_usage(assembly: str) -> tuple[int, int, int]:
    def number(name: str) -> int:
        return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return number("vgpr_count"), spills, number("private_segment_fixed_size")


def inspect(chip: Chip, binary: Any) -> Report:
    is_cuda = chip.target.backend == "cuda"
    usage = nvidia_usage(binary.asm["cubin"]) if is_cuda else amd_usage(binary.asm["amdgcn"])
    found = re.search(chip.matrix, binary.asm[chip.stage])
    return Report(*usage, binary.metadata.shared, found[0] if found else "")


def is_matrix_kernel(launch: Launch) -> bool:
    """Return whether the kernel multiplies 16-bit matrices. (There is no matrix instruction for exact fp32.)"""
    halves = (torch.bfloat16, torch.float16)
    return "tl.dot(" in launch.kernel.src and any(getattr(one, "dtype", None) in halves for one in launch.args)


def line(name: str, label: str, launch: Launch, seen: set[int]) -> tuple[str, bool] | None:
    """Return the report line of one launch and whether it has a fault, or None if its binary is in ``seen``."""
    chip, report = CHIPS[name], None
    try:
        binary = compiled(launch)
        if id(binary) in seen:
            return None
        seen.add(id(binary))
        report = inspect(chip, binary)
        faults = report.faults(chip, is_matrix_kernel(launch))
    except Exception as error:  # a compiler error is a fault of this case; the others continue
        faults = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    numbers = report[:4] if report else ("-",) * 4
    shown = (name, label, *numbers, chip.shared, report.instruction if report else "", "; ".join(faults))
    return COLUMNS.format(*shown), bool(faults)


def gate(name: str, only: str = "") -> list[tuple[str, bool]]:
    """Return a report line for each kernel and case on one chip, and whether it has a fault."""
    lines, seen = [], set[int]()
    torch.set_num_threads(1)
    with on_chip(name, CHIPS[name].target):
        for case, work in works():
            for launch in recorded(work):
                label = f"{launch.kernel.__name__.strip('_')} {case}"
                if only in label and (found := line(name, label, launch, seen)):
                    lines.append(found)
    return lines


def gate_all(chips: Sequence[str], only: str, jobs: int) -> bool:
    """Compile for all chips in parallel and print the report; return whether something was compiled without faults."""
    print(COLUMNS.format("chip", "kernel", "regs", "spills", "stack", "shared", "limit", "matrix", "fault"), flush=True)
    done = faulty = 0
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for lines in pool.map(gate, chips, [only] * len(chips)):
            print("\n".join(text for text, _ in lines), flush=True)
            done, faulty = done + len(lines), faulty + sum(fault for _, fault in lines)
    print(f"{done} compiled, {faulty} at fault")
    return done > 0 and not faulty


@command
def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="(default: all)")
    parser.add_argument("--only", default="", help="compile only kernels whose label contains this text")
    args = parser.parse_args()
    jobs = min(len(args.chips), os.cpu_count() or 1)
    return int(not gate_all(args.chips, args.only, jobs))


if __name__ == "__main__":
    sys.exit(main())
