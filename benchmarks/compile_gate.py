"""Compiles every Triton kernel in every shipped tile for every supported chip, without a GPU, and checks the result.

    python benchmarks/compile_gate.py [--chips sm_90 gfx942] [--only TEXT]

A compiler accepts tiles that no chip can launch, or that run from memory instead of registers. This exits with 1 for
spilled registers, stack, more shared memory than the chip has, and a matrix kernel of 16-bit numbers that does not
use the chip's best matrix instruction. It says nothing about speed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

if os.environ.pop("TRITON_INTERPRET", None):  # read when triton loads
    print("TRITON_INTERPRET is set; the gate compiles, and ignores it")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from workloads import ROOT

if find_spec("equimoe") is None:
    sys.path.insert(0, str(ROOT))


class Chip(NamedTuple):
    target: GPUTarget
    #: bytes of shared memory that one block may have, as the vendors document it
    shared: int
    #: what the best matrix instruction is called in the compiler's output, and where that is
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
            found.append(f"{self.spills} spills")
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if self.shared > chip.shared:
            found.append(f"{self.shared} bytes of shared memory")
        if is_matrix and not self.instruction:
            found.append("not the chip's matrix instruction")
        return found


def nvidia_usage(cubin: bytes) -> tuple[int, int, int]:
    """(registers, spills, stack); what is spilled lies on the stack or in local memory."""
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


def compile_one(chip: Chip, kernel: Any, signature: dict, constants: dict, options: dict) -> Report:
    names = kernel.arg_names
    # as at run time: torch's pointers, and sizes that are multiples of 16, are known to be aligned
    fixed = set(getattr(kernel, "do_not_specialize", ()) or ())
    divisible = [(i,) for i, n in enumerate(names) if signature[n] != "constexpr" and n not in fixed and i not in fixed]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={index: [["tt.divisibility", 16]] for index in divisible},
    )
    binary = triton.compile(source, target=chip.target, options=options)
    is_cuda = chip.target.backend == "cuda"
    usage = nvidia_usage(binary.asm["cubin"]) if is_cuda else amd_usage(binary.asm["amdgcn"])
    found = re.search(chip.matrix, binary.asm[chip.stage])
    return Report(*usage, binary.metadata.shared, found[0] if found else "")


def compile_cases(only: str = "") -> list[tuple]:
    """What the kernels' triton_ops.py export; ``only`` keeps the labels that it occurs in."""
    cases = []
    for path in sorted((ROOT / "kernels").glob("*/triton_ops.py")):
        module = import_module(f"equimoe.kernels.{path.parent.name}.triton_ops")
        cases += module.compile_cases()
    return [case for case in cases if only in case[4]]


def is_matrix_kernel(kernel: Any, signature: dict) -> bool:
    """Matrix products in 16 bits; exact fp32 has no matrix instruction."""
    return "tl.dot(" in kernel.src and not {"*bf16", "*fp16"}.isdisjoint(signature.values())


def gate(chips: dict[str, Chip], cases: list[tuple]) -> int:
    """Prints a line for each kernel and chip; the number of those at fault."""
    print(COLUMNS.format("chip", "kernel", "regs", "spills", "stack", "shared", "limit", "matrix", "fault"))
    faulty = done = 0
    for name, chip in chips.items():
        for kernel, signature, constants, options, label in cases:
            owner = label.split()[0]
            if owner in CHIPS and owner != name:
                continue
            done += 1
            report, faults = None, []
            try:
                report = compile_one(chip, kernel, signature, constants, options)
                faults = report.faults(chip, is_matrix_kernel(kernel, signature))
            except Exception as error:  # whatever a compiler raises is this case's fault, and the others go on
                faults = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
            faulty += bool(faults)
            numbers = report[:4] if report else ("-",) * 4
            shown = (name, label.removeprefix(name).strip(), *numbers, chip.shared)
            print(COLUMNS.format(*shown, report.instruction if report else "", "; ".join(faults)), flush=True)
    print(f"{done} compiled, {faulty} at fault")
    return faulty if done else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="all unless given")
    parser.add_argument("--only", default="", help="kernels whose label has this text in it")
    args = parser.parse_args()
    return int(gate({name: CHIPS[name] for name in args.chips}, compile_cases(args.only)) > 0)


if __name__ == "__main__":
    sys.exit(main())
