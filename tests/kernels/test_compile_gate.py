"""Tests that the gate accepts shipped tiles, rejects tiles that no chip can launch, and compiles what launches compile.

Compilation runs in separate processes, without the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from benchmarks.kernels.binary import CHIPS, Binary, blocks_together, table
from equimoe.kernels.matmul_tiles import ARCHS

ROOT = Path(__file__).resolve().parents[2]

PLANT = """
import sys
from benchmarks import planted
ok, line = planted.seen_by_gate()
print(line)
sys.exit(int(not ok))
"""

#: launches public ops at sizes that are not among the gate's cases; a hook of Triton replaces the compiler
COVERED = """
import sys
import torch, triton
from benchmarks.kernels import compile_gate, launches
from benchmarks.kernels.gate_cases import *

def key(found):
    attrs = tuple(sorted((k, str(v)) for k, v in found["configs"][0].items() if v))
    constants = tuple(sorted((k, str(v)) for k, v in found["constants"].items()))
    kinds = tuple(sorted(found["signature"].items()))
    return found["key"].split("[")[0], kinds, constants, attrs, found["num_warps"], found["num_stages"]

def keys(work, launch):
    seen = set()
    def hook(fn, compile, **_):
        name = fn.jit_function.__name__
        if "tl.dot(" in fn.jit_function.src:
            seen.add((name, *key(compile)[1:]))
        return True  # nothing is compiled or launched
    triton.knobs.runtime.jit_cache_hook = hook
    launch(work)
    triton.knobs.runtime.jit_cache_hook = None
    return seen

def replayed(work):
    for one in launches.recorded(work):
        launches.compiled(one)

with launches.on_chip("sm_90", compile_gate.CHIPS["sm_90"].target):
    declared = set()
    for name, work in works():
        if name.startswith("bf16"):
            declared |= keys(work, replayed)
    assert len(declared) > 40, len(declared)
    missing = 0
    for D, F, E, K in ((512, 128, 32, 8), (336, 80, 48, 4), (77, 35, 5, 3), (131, 257, 7, 5)):
        for bucket in BUCKETS:
            size = Size(D, F, E, K)
            real = keys(lambda: mlp(torch.bfloat16, size, bucket, "silu", True), lambda work: work())
            assert len(real) >= 5, len(real)
            for one in real - declared:
                missing += 1
                print("the gate does not compile", D, F, E, K, bucket, one)
sys.exit(int(missing > 0))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_subset_of_what_is_shipped_passes() -> None:
    done = python(
        "benchmarks/kernels/compile_gate.py", "--chips", "sm_90", "gfx942", "--only", "up_kernel bf16 few even silu"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " m64n128 " in done.stdout and " m32n32 " in done.stdout and "4 compiled, 0 at fault" in done.stdout


GOOD = Binary(122, 0, 0, 98304, 2, "m64n256", 24, 3)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ""),
        ({"stack": 16}, "16 bytes of stack"),
        ({"spills": 2}, "2 spilled"),
        ({"shared": 232449}, "232449 bytes of shared memory"),
        ({"matrix": ""}, "does not use the chip's matrix instruction"),
        ({"depth": 2}, "holds 2 of 3 steps"),
        ({"depth": 1}, "holds 1 of 3 steps"),
    ],
)
def test_what_is_a_fault(change: dict[str, Any], fault: str) -> None:
    assert "; ".join(GOOD._replace(**change).faults(CHIPS["sm_90"], True, 3)) == fault


@pytest.mark.parametrize(
    ("change", "loss"),
    [
        ({}, ""),
        ({"registers": 255, "copies": 12, "blocks": 1}, ""),
        ({"matrix": "m64n128"}, "multiplies by m64n128, in the table by m64n256"),
        ({"matrix": ""}, "multiplies by no matrix instruction, in the table by m64n256"),
        ({"depth": 2}, "holds 2 steps, in the table 3"),
        ({"depth": 0}, "holds 0 steps, in the table 3"),
    ],
)
def test_what_is_worse_than_the_table(change: dict[str, Any], loss: str) -> None:
    assert "; ".join(GOOD._replace(**change).losses(GOOD, True)) == loss


def test_blocks_of_a_multiprocessor() -> None:
    """By shared memory with 1 KiB per block for the system, by registers in eights, and by warps."""
    assert blocks_together(CHIPS["sm_90"], 128, 98304, 8) == 2 and blocks_together(CHIPS["sm_90"], 128, 131072, 8) == 1
    assert blocks_together(CHIPS["sm_90"], 129, 98304, 8) == 1 and blocks_together(CHIPS["sm_90"], 16, 0, 8) == 8
    assert blocks_together(CHIPS["sm_120"], 16, 0, 8) == 6 and blocks_together(CHIPS["gfx942"], 128, 32768, 8) == 2


def test_the_table_covers_every_chip() -> None:
    rows = table()
    assert {chip for chip, _ in rows} == set(ARCHS) == set(CHIPS)
    products = [row for row in rows.values() if row.chip == "sm_90" and row.tile and " bf16 many even" in row.label]
    assert len(products) >= 8 and all(row.binary.matrix.startswith("m64n") for row in products)
    assert all(not row.binary.stack and not row.binary.spills for row in rows.values())


#: the kernels of the table without one of them, as if its op no longer launched it
GONE = """
import sys
from benchmarks.kernels import compile_gate
from benchmarks.kernels.compile_gate import Result, gate_all, table

class Pool:
    def __init__(self, *_, **__): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass
    map = staticmethod(lambda run, *arguments: map(run, *arguments))

def examine(name, only):
    rows = [row for row in table().values() if row.chip == name]
    return [Result(row, row.label, False) for row in rows if row.label != "sort_place E513"]

compile_gate.ProcessPoolExecutor, compile_gate.examine = Pool, examine
sys.exit(int(not gate_all(["sm_90"], sys.argv[1], 1, False)))
"""


def test_a_kernel_that_is_not_compiled_any_more_is_a_fault() -> None:
    done = python("-c", GONE, "")
    assert done.returncode == 1 and done.stdout.endswith(", 1 at fault\n"), done.stdout + done.stderr
    assert "1 of compiled.tsv are not compiled, first 'sm_90 sort_place E513'" in done.stdout
    assert python("-c", GONE, "silu").returncode == 0


@pytest.mark.slow
def test_nothing_to_compile_is_a_failure() -> None:
    done = python("benchmarks/kernels/compile_gate.py", "--chips", "sm_90", "--only", "no such kernel")
    assert done.returncode == 1 and "--only=no such kernel: no kernel's label" in done.stdout


@pytest.mark.slow
def test_an_oversize_tile_fails() -> None:
    done = python("-c", PLANT)
    assert done.returncode == 0 and "bytes of stack" in done.stdout, done.stdout + done.stderr


def test_launches_of_other_sizes_get_what_the_gate_compiles() -> None:
    """Compare types, constants, argument attributes, warps and stages of every matrix kernel."""
    done = python("-c", COVERED)
    assert done.returncode == 0, done.stdout + done.stderr
