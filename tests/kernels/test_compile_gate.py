"""The gate passes what is shipped, and fails what no chip could launch. Compiles in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]

PLANT = """
import sys
sys.path.insert(0, {folder!r})
import compile_gate
kernel, signature, constants, options, label = compile_gate.compile_cases("sm_90 gemm bf16 many")[0]
constants = {{**constants, "BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 128}}
case = (kernel, signature, constants, {{"num_warps": 8, "num_stages": 4}}, label)
sys.exit(int(compile_gate.gate({{"sm_90": compile_gate.CHIPS["sm_90"]}}, [case]) > 0))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)


def test_a_subset_of_what_is_shipped_passes() -> None:
    done = python("benchmarks/compile_gate.py", "--chips", "sm_90", "gfx942", "--only", "gated bf16 few")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wgmma.mma_async" in done.stdout and "v_mfma_" in done.stdout and "2 compiled, 0 at fault" in done.stdout


def test_nothing_to_compile_is_a_failure() -> None:
    assert python("benchmarks/compile_gate.py", "--only", "no such kernel").returncode == 1


def test_an_oversize_tile_fails() -> None:
    done = python("-c", PLANT.format(folder=str(ROOT / "benchmarks")))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "bytes of shared memory" in done.stdout and "bytes of stack" in done.stdout
