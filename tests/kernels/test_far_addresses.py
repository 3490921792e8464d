"""Addresses beyond 2**31 elements, in a separate process, which a wrong address would crash; see far_addresses.py."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if sys.platform != "linux":
    pytest.skip("needs an operating system that provides memory when it is touched", allow_module_level=True)
ROOT = Path(__file__).resolve().parents[2]
TREE = ast.parse((Path(__file__).parent / "far_addresses.py").read_text())
#: the keys of CASES, read from the source: importing the module would change this process's interpreter
NAMES = next(
    [ast.literal_eval(key) for key in node.value.keys]
    for node in TREE.body
    if isinstance(node, ast.AnnAssign) and node.target.id == "CASES"  # type: ignore[union-attr]
)


@pytest.fixture(scope="module")
def output() -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.kernels.far_addresses"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, output: str) -> None:
    assert f"passed: {name}\n" in output, output[-2000:]


def test_little_memory_is_used(output: str) -> None:
    assert int(re.search(r"peak: (\d+) MiB", output)[1]) < 1500
