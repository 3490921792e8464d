"""Checks that ranks end with the torchrun that has started them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from equimoe.launch.options import to_yaml
from equimoe.moe.observe.metrics import read_records
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.fork import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


def start(config: Path, run_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "equimoe.launch.train", "--config", str(config), "--run-dir", str(run_dir)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Return the processes that torchrun has started; each has its own session."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 60 * PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            if any(record.get("step", 0) >= step for record in read_records(run_dir / "metrics.jsonl")):
                return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.timeout(120)
@pytest.mark.faults
def test_ranks_end_with_their_torchrun(tmp_path: Path) -> None:
    """One of them is stopped, which the death of torchrun must end as well."""
    config = small.on(small.write_texts(tmp_path / "texts"), ep=2, steps=100_000)
    (tmp_path / "small.yaml").write_text(to_yaml(config))
    process = start(tmp_path / "small.yaml", tmp_path / "run")
    wait_for_step(tmp_path / "run", 3)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGSTOP)
    since = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    while any(alive(pid) for pid in ranks) and time.monotonic() - since < 30:
        time.sleep(0.05)
    seconds = time.monotonic() - since
    for pid in ranks:  # never leave them behind
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert seconds < 5
    report("57 ranks end with torchrun", "holds", seconds=round(seconds, 2))
