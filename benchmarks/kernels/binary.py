"""What compiled kernels need of their chip and how they are pipelined: read from the compiler's output, and a table."""

from __future__ import annotations

import csv
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget


class Chip(NamedTuple):
    """A GPU architecture. Sizes are per multiprocessor (a compute unit of AMD's), as documented by the vendor."""

    target: GPUTarget
    #: bytes of shared memory: of a block at most, and in all
    shared: int
    all_shared: int
    #: blocks of 32 threads (64 on AMD's) that are resident at most
    warps: int
    #: the pattern of the best matrix instruction in the assembly; its groups are m and n, if it has them
    matrix: str
    #: the pattern of a copy from global to shared memory that needs no registers
    copy: str

    @property
    def is_cuda(self) -> bool:
        return bool(self.target.backend == "cuda")


_MMA, _CP = r"\bmma\.sync\.aligned\.m(\d+)n(\d+)k\d+", r"\bcp\.async\.(?:c[ag]|bulk)\.\S*shared\S*"
_WGMMA = r"\bwgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k\d+"
_MFMA, _LDS = r"\bv_mfma_[a-z0-9]+_(\d+)x(\d+)x\w+", r"\b(?:global|buffer)_load_\w*(?:lds_\w+|\b.*\blds\b)"
CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 166912, 167936, 64, _MMA, _CP),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 232448, 233472, 64, _WGMMA, _CP),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 232448, 233472, 64, r"\btcgen05\.mma\b", _CP),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 101376, 102400, 48, _MMA, _CP),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 65536, 65536, 32, _MFMA, _LDS),
    "gfx950": Chip(GPUTarget("hip", "gfx950", 64), 163840, 163840, 32, _MFMA, _LDS),
}


class Binary(NamedTuple):
    """The form of one compiled kernel, on one chip."""

    registers: int
    spills: int
    stack: int
    shared: int
    #: blocks that fit on a multiprocessor together
    blocks: int
    #: the narrowest matrix instruction as "m64n256", or the accumulator's tile on sm_100; "" without one
    matrix: str
    #: instructions that copy from global to shared memory without registers
    copies: int
    #: steps of the main loop in shared memory at once: one is multiplied, the others are on their way. 0: no such copy
    depth: int

    def faults(self, chip: Chip, is_matrix: bool, stages: int) -> list[str]:
        """Say what is wrong with a kernel whose tile asks for ``stages``."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spilled")
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if self.shared > chip.shared:
            found.append(f"{self.shared} bytes of shared memory")
        if is_matrix and not self.matrix:
            found.append("does not use the chip's matrix instruction")
        if is_matrix and self.depth and self.depth < stages:
            found.append(f"holds {self.depth} of {stages} steps")
        return found

    def losses(self, before: Binary, is_matrix: bool) -> list[str]:
        """Say how a kernel is worse than ``before``: a narrower matrix instruction, a shallower pipeline."""
        found = []
        if width(self.matrix) < width(before.matrix):
            found.append(f"multiplies by {self.matrix or 'no matrix instruction'}, in the table by {before.matrix}")
        if is_matrix and self.depth < before.depth:
            found.append(f"holds {self.depth} steps, in the table {before.depth}")
        return found


def width(matrix: str) -> int:
    """Return the columns of a matrix instruction."""
    return int(matrix.partition("n")[2] or 0)


def read(chip: Chip, compiled: Any, warps: int) -> Binary:
    """Read the form of a kernel that Triton compiled for ``chip`` with ``warps`` warps."""
    assembly, middle = compiled.asm["ptx" if chip.is_cuda else "amdgcn"], compiled.asm["ttgir"]
    registers, spills, stack = nvidia_usage(compiled.asm["cubin"]) if chip.is_cuda else amd_usage(assembly)
    shared = compiled.metadata.shared
    return Binary(
        registers,
        spills,
        stack,
        shared,
        blocks_together(chip, registers, shared, warps),
        _matrix(chip, assembly, middle),
        len(re.findall(chip.copy, assembly)),
        _depth(middle),
    )


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


def blocks_together(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """Return how many blocks fit on a multiprocessor: by registers, by shared memory and by warps."""
    lanes = chip.target.warp_size
    # a warp gets registers in eights per thread; AMD's chips have twice as many, in four separate parts
    per_warp = max(-(-registers // 8) * 8, 8) * lanes
    by_registers = 65536 * (1 if chip.is_cuda else 2) // per_warp // warps
    reserved = 1024 if chip.is_cuda else 0  # of each block's shared memory, for the system
    return min(by_registers, chip.all_shared // (shared + reserved) if shared else 32, chip.warps // warps, 32)


def _matrix(chip: Chip, assembly: str, middle: str) -> str:
    found = list(re.finditer(chip.matrix, assembly))
    if not found:
        return ""
    if not found[0].groups():  # the instruction takes its shape from a descriptor: read the accumulators' shapes
        tiles = re.findall(r"tmem_alloc[^\n]*!ttg\.memdesc<(\d+)x(\d+)xf32", middle)
        m, n = min(((int(m), int(n)) for m, n in tiles), key=lambda tile: tile[1], default=(0, 0))
        return f"m{m}n{n}"
    m, n = min(((int(one[1]), int(one[2])) for one in found), key=lambda tile: tile[1])
    return f"m{m}n{n}"


def _depth(middle: str) -> int:
    """Return one more than the number of steps that are copied before the main loop, by the operand with the fewest.

    It is no more than there are buffers for, unless the step that is multiplied is in registers by then.
    """
    before, _, rest = middle.partition("scf.for")
    copy = r"(?:async_copy_global_to_local|buffer_load_to_local)[^\n]*tensor<(\w+x)!tt\.ptr<[a-z]*f\d+>"
    ahead, steps = re.findall(copy, before), re.findall(copy, rest)
    if not steps:
        return 0
    depth = 1 + min(ahead.count(one) // steps.count(one) for one in steps)
    if "warp_group_dot" in middle or "tc_gen5_mma" in middle:
        buffers = re.findall(r"local_alloc[^\n]*memdesc<(\d+)x\d+x\d+x[a-z]*f\d+", before)
        return min([depth, *map(int, buffers)])
    return depth


TABLE = Path(__file__).with_name("compiled.tsv")
HEADINGS = ("chip", "kernel", "tile", "regs", "spills", "stack", "shared", "blocks", "matrix", "copies", "depth")


class Row(NamedTuple):
    """One kernel of one case on one chip. ``tile`` is rows x columns x depth, warps and stages, of matrix kernels."""

    chip: str
    label: str
    tile: str
    binary: Binary

    def cells(self) -> list[str]:
        return [self.chip, self.label, self.tile, *map(str, self.binary)]

    @classmethod
    def of(cls, cells: Sequence[str]) -> Row:
        *numbers, matrix, copies, depth = cells[3:]
        return cls(*cells[:3], Binary(*map(int, numbers), matrix, int(copies), int(depth)))


def table(path: Path = TABLE) -> dict[tuple[str, str], Row]:
    """Read the committed table: rows by chip and label."""
    with path.open(newline="") as file:
        rows = [Row.of(cells) for cells in list(csv.reader(file, delimiter="\t"))[1:]]
    return {row[:2]: row for row in rows}


def write(rows: dict[tuple[str, str], Row], path: Path = TABLE) -> None:
    ordered = sorted(rows.values(), key=lambda row: (list(CHIPS).index(row.chip), row.label))
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([HEADINGS, *(row.cells() for row in ordered)])
