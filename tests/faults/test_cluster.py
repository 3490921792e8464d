"""Checks torchrun's own part: what it retries, the signals that it forwards, and the files for clusters."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from equimoe.launch import env
from equimoe.moe import checkpoint
from tests.faults.agents import ROOT, Job, clean_environment, free_port, losses
from tests.faults.table import report
from tests.helpers.command import launch
from tests.helpers.fork import PATIENCE

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (["--optim.lr", "-1"], env.CONFIG),
        (["--data.path", "/nowhere"], env.DATA),
        (["--optim.lr", "1e30", "--optim.warmup_steps", "0"], env.NON_FINITE),
    ],
)
def test_torchrun_does_not_retry_what_would_fail_again(
    options: list[str], tmp_path: Path, wrong: list[str], code: int
) -> None:
    exit_file = tmp_path / "code"
    environment = {"EQUIMOE_EXIT_FILE": str(exit_file)}
    job = Job(tmp_path / "run", [*options, *wrong], restarts=2, replacements=0, environment=environment)
    job.supervise(120)
    lines = job.logs().splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, job.logs()
    assert int(exit_file.read_text()) == code
    report("59 mistakes are not retried", "holds", code=code)


def test_a_refused_start_is_not_a_takeover_after_torchruns_restart(options: list[str], tmp_path: Path) -> None:
    assert launch([*options, "--run-dir", str(tmp_path / "run")], 2).codes == [0, 0]
    before = losses(tmp_path / "run")
    job = Job(tmp_path / "run", [*options, "--steps", "20"], restarts=2, replacements=0)
    assert not job.supervise(120) and "already holds a run" in job.logs(), job.logs()
    assert losses(tmp_path / "run") == before


def test_a_signal_to_torchrun_alone_loses_no_step(
    options: list[str], straight: dict[int, float], tmp_path: Path
) -> None:
    job = Job(tmp_path / "run", [*options, "--requeue"], faults="term@rank=1,step=7,phase=data,whom=agent")
    assert job.supervise(300), job.logs()  # the supervisor replaces the agents, which continue the run
    # the signal reaches the ranks by way of their agent, in this step or a later one
    assert re.search(r"stopped by SIGTERM after step ([7-9]|1[01]) of 12; no step is lost", job.logs()), job.logs()
    assert losses(tmp_path / "run") == straight
    report("6 SIGTERM to one of two agents", "holds", steps_lost=0)


# ---- the files for clusters


def tool(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(stat.S_IRWXU)


@contextmanager
def own_group(command: list[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a session of its own, which is killed at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=clean_environment(**variables), stdout=output, stderr=output, cwd=ROOT, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ended(process: subprocess.Popen[bytes], limit_s: float, log: Path) -> int:
    try:
        return process.wait(limit_s * PATIENCE)
    except subprocess.TimeoutExpired:
        raise AssertionError(log.read_text()[-4000:]) from None


def test_the_slurm_job_is_requeued_at_three_points(
    options: list[str], straight: dict[int, float], tmp_path: Path
) -> None:
    """Killed before the first checkpoint, asked to stop in the middle, and killed while it saves."""
    tools, run_dir, log = tmp_path / "tools", tmp_path / "run", tmp_path / "job.log"
    tool(tools, "scontrol", f'if [ "$1" = requeue ]; then touch {tmp_path}/requeued; else echo 127.0.0.1; fi')
    tool(tools, "srun", 'shift 2; exec "$@"')
    start = f'exec {sys.executable} -m torch.distributed.run "${{@//equimoe.launch.train/tests.faults.inject}}"'
    tool(tools, "torchrun", start)
    points = [
        ("kill@rank=1,step=3,phase=dispatch,whom=agent", 128 + signal.SIGKILL, True),
        ("term@rank=0,step=7,phase=dispatch,whom=agent", 128 + signal.SIGTERM, True),
        (
            "kill@rank=1,step=10,phase=save:rename,whom=agent;kill@rank=0,step=10,phase=save:rename,whom=agent",
            128 + signal.SIGKILL,
            True,
        ),
        ("", 0, False),
    ]
    for number, (fault, code, requeued) in enumerate(points):
        variables = {
            "PATH": f"{tools}:{os.environ['PATH']}", "MOE_FAULT": fault, "RUN_DIR": str(run_dir), "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2", "PORT": str(free_port()),
            "SLURM_RESTART_COUNT": str(number), "SLURM_JOB_END_TIME": "1", "MAX_RESTARTS": "0",
        }  # fmt: skip
        (tmp_path / "requeued").unlink(missing_ok=True)
        (tmp_path / "run.faults").exists() and (tmp_path / "run.faults").rename(tmp_path / f"faults{number}")
        with own_group(["bash", str(ROOT / "launch/slurm/train.sbatch"), *options], log, **variables) as job:
            assert ended(job, 150, log) == code, log.read_text()[-4000:]
        assert (tmp_path / "requeued").exists() == requeued, (number, log.read_text()[-4000:])
    assert "ended before its first checkpoint; starting again" in log.read_text()
    assert "stopped by SIGTERM after step 7" in log.read_text()
    assert losses(run_dir) == straight
    report("52 Slurm, requeued at three points", "holds", requeued=3)


def test_the_kubernetes_command_as_two_processes_with_a_restart_policy(
    options: list[str], straight: dict[int, float], tmp_path: Path
) -> None:
    """Each process stands for a pod. The one that fails is replaced, as the job's controller would do."""
    (_, job) = yaml.safe_load_all((ROOT / "launch/k8s/train.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    script = container["command"][2].replace("-m equimoe.launch.train", "-m tests.faults.inject")
    tools, run_dir, log = tmp_path / "tools", tmp_path / "run", tmp_path / "pods.log"
    tool(tools, "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    variables = {entry["name"]: str(entry.get("value")) for entry in container["env"]} | {
        "PATH": f"{tools}:{os.environ['PATH']}", "NPROC_PER_NODE": "1", "RDZV_HOST": "127.0.0.1",
        "RDZV_PORT": str(free_port()), "RUN_DIR": str(run_dir), "CORES": "1", "TMPDIR": str(tmp_path),
        "MOE_FAULT": "kill@rank=1,step=7,phase=dispatch,whom=agent",
    }  # fmt: skip
    starts, deadline = [0, 0], time.monotonic() + 250 * PATIENCE
    pods: dict[int, subprocess.Popen[bytes]] = {}
    try:
        while time.monotonic() < deadline:
            for index in (0, 1):
                if index not in pods or pods[index].poll() not in (None, 0):
                    starts[index] += 1
                    assert sum(starts) < 8, log.read_text()[-4000:]
                    with log.open("ab") as output:
                        pods[index] = subprocess.Popen(
                            ["bash", "-c", script, "train", "--recipe", "quickstart", *options],
                            env=clean_environment(**variables, JOB_COMPLETION_INDEX=str(index)),
                            stdout=output, stderr=output, cwd=ROOT, start_new_session=True,
                        )  # fmt: skip
            if all(pod.poll() == 0 for pod in pods.values()):
                break
            time.sleep(0.5)
        assert all(pod.poll() == 0 for pod in pods.values()), log.read_text()[-4000:]
    finally:
        for pod in pods.values():
            with suppress(OSError):
                os.killpg(pod.pid, signal.SIGKILL)
    assert sum(starts) > 2
    assert re.fullmatch(r"step-0*12", checkpoint.newest(run_dir / "checkpoints").name)
    assert losses(run_dir) == straight
    report("52 Kubernetes, one of two pods replaced", "holds", starts=sum(starts))
