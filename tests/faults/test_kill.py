"""Checks that a run under torchrun that is killed resumes as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from equimoe.launch.options import to_yaml
from equimoe.moe import checkpoint
from equimoe.moe.observe.metrics import read_records
from equimoe.moe.train.config import CheckpointConfig
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.checkpoints import load_all
from tests.helpers.command import launch

ROOT = Path(__file__).resolve().parents[2]


def start(config: Path, run_dir: Path, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", "equimoe.launch.train"]
    command += ["--config", str(config), "--run-dir", str(run_dir)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Return the processes that torchrun has started; each has its own session."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            if any(record.get("step", 0) >= step for record in read_records(run_dir / "metrics.jsonl")):
                return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in 60 s")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_killed_at_step_60_and_resumed_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the run that is killed needs torchrun; reports have no figures, which saves seconds."""
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())
    config = small.on(
        small.write_texts(tmp_path / "texts"), ep=2, steps=100, checkpoint=CheckpointConfig(every=20, keep_last=9)
    )
    (tmp_path / "small.yaml").write_text(to_yaml(config))
    killed = start(tmp_path / "small.yaml", tmp_path / "killed")
    wait_for_step(tmp_path / "killed", 60)
    for pid in [killed.pid, *ranks_of(killed)]:
        os.kill(pid, signal.SIGKILL)
    killed.communicate()
    assert checkpoint.newest(tmp_path / "killed" / "checkpoints").name != "step-00000100"
    base = ["--config", str(tmp_path / "small.yaml"), "--run-dir"]
    straight = launch([*base, str(tmp_path / "straight")], 2)
    resumed = launch([*base, str(tmp_path / "killed"), "--resume"], 2)
    assert straight.codes == resumed.codes == [0, 0], (straight, resumed)
    assert all(words in resumed.out[0] for words in ("held-out loss", "continue:", "report.html"))

    ends = [load_all(tmp_path / run / "checkpoints" / "step-00000100") for run in ("straight", "killed")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    logs = [read_records(tmp_path / run / "metrics.jsonl") for run in ("straight", "killed")]
    curves = [{r["step"]: r["loss"] for r in log if r["kind"] == "train"} for log in logs]
    assert curves[0] == curves[1] and len(curves[0]) == 100


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


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_torchrun_restarts_a_run_by_itself(tmp_path: Path) -> None:
    """A rank is killed before the first checkpoint, and again after it."""
    config = small.on(
        small.write_texts(tmp_path / "texts"), ep=2, steps=80, checkpoint=CheckpointConfig(every=20, keep_last=2)
    )
    (tmp_path / "small.yaml").write_text(to_yaml(config))
    process = start(tmp_path / "small.yaml", tmp_path / "run", restarts=2)
    wait_for_step(tmp_path / "run", 3)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert not checkpoint.complete(tmp_path / "run" / "checkpoints")
    wait_for_step(tmp_path / "run", 32)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and "held-out loss" in out, out
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "step-00000080"
    records = list(read_records(tmp_path / "run" / "metrics.jsonl"))
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 81))
    # a new run writes a new file, a resumed one adds to it
    assert sum(record["kind"] == "run" for record in records) == 2
