"""``--processes`` under faults: the exit code is that of the rank that failed, and nothing follows what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from equimoe.launch import env
from equimoe.launch.options import to_yaml
from tests.faults.agents import ROOT, clean_environment
from tests.helpers import small

START = "import sys; from equimoe.launch import env; env.start(2, 'tests.faults.inject', sys.argv[1:])"


@pytest.mark.faults
@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        ("raise@rank=0,phase=forward", env.FAILED, ["rank 0, step 1, phase first step: ValueError: injected"]),
        ("raise@rank=1,phase=forward", env.FAILED, ["rank 1, step 1, phase first step: ValueError: injected"]),
        ("kill@rank=1,phase=forward", 128 + 9, ["has ended without a word", "rank 1 was killed by SIGKILL"]),
    ],
    ids=["the first rank raises", "the last rank raises", "killed"],
)
def test_the_code_is_that_of_the_rank(tmp_path: Path, fault: str, code: int, says: list[str]) -> None:
    (tmp_path / "small.yaml").write_text(to_yaml(small.on(small.write_texts(tmp_path / "texts"), steps=2)))
    command = [
        sys.executable,
        "-c",
        START,
        "--config",
        str(tmp_path / "small.yaml"),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, env=clean_environment(MOE_FAULT=fault), capture_output=True, text=True, cwd=ROOT)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code and len(errors) == len(says), done.stderr
    assert all(words in line for words, line in zip(says, errors, strict=True))
    assert done.stderr.count("Traceback") == (code == env.FAILED), done.stderr
