"""Checks that a run on two nodes goes on by itself after a rank or a node was killed, with equal results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.agents import Job, losses
from tests.faults.table import report

FAULTS = {
    "rank of the first node": "kill@rank=0,step=7,phase=dispatch",
    "rank of the second node": "kill@rank=1,step=7,phase=backward",
    # without a pause, the run may end while a busy machine is still killing the agent, which then ends the rank
    "agent of the first node": "kill@rank=0,step=7,phase=dispatch,whom=agent;sleep@rank=0,step=8,phase=data,seconds=4",
    "agent of the second node": "kill@rank=1,step=7,phase=optim,whom=agent;sleep@rank=1,step=8,phase=data,seconds=4",
}


def check_recovery(job: Job, what: str, straight: dict[int, float]) -> None:
    recovered = job.supervise(300)
    seconds = round(job.seconds_lost(), 1) if recovered else None
    outcome = "holds" if recovered else "fails"
    report("2 51 two nodes", outcome, what=what, rendezvous=job.rendezvous, seconds=seconds)
    assert recovered, job.logs()
    assert losses(job.run_dir) == straight


@pytest.mark.faults
@pytest.mark.timeout(400)
@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_two_nodes_recover(
    options: list[str], straight: dict[int, float], tmp_path: Path, rendezvous: str, what: str
) -> None:
    job = Job(tmp_path / "run", [*options, "--requeue"], rendezvous, faults=FAULTS[what])
    check_recovery(job, what, straight)


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_a_node_that_held_the_first_rank_is_replaced(
    options: list[str], straight: dict[int, float], tmp_path: Path
) -> None:
    """It is not the node with torchrun's rendezvous."""
    fault, addresses = FAULTS["agent of the first node"], ("127.0.0.2", "127.0.0.1")
    job = Job(tmp_path / "run", [*options, "--requeue"], faults=fault, addresses=addresses)
    check_recovery(job, "node of rank 0, without the rendezvous", straight)


KILLS = [
    (rank, step, phase)
    for rank, step, phase in (
        (0, 7, "data"), (1, 7, "forward"), (0, 7, "dispatch"), (1, 7, "dispatch"), (0, 7, "backward"), (1, 7, "optim"),
        (0, 2, "dispatch"), (1, 5, "save:shard"), (0, 5, "save:manifest"), (0, 10, "save:rename"),
    )
]  # fmt: skip


@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("rank", "step", "phase"), KILLS)
def test_one_node_recovers_from_a_kill_in_every_phase(
    options: list[str], straight: dict[int, float], tmp_path: Path, rank: int, step: int, phase: str
) -> None:
    fault = f"kill@rank={rank},step={step},phase={phase}"
    job = Job(tmp_path / "run", options, nodes=1, processes=2, restarts=2, replacements=0, faults=fault)
    recovered = job.supervise(200)
    seconds = round(job.seconds_lost(), 1) if recovered else None
    report("1 2 SIGKILL with restarts", "holds" if recovered else "fails", rank=rank, phase=phase, seconds=seconds)
    assert recovered, job.logs()
    assert "SIGTERM: saving after this step" not in job.logs()  # torchrun's signal to the other rank is no request
    assert losses(tmp_path / "run") == straight


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_second_kill_during_the_restart_is_recovered_too(options: list[str], tmp_path: Path) -> None:
    faults = "kill@rank=1,step=7,phase=dispatch;kill@rank=0,step=6,phase=forward;kill@rank=1,phase=setup,step=0,times=1"
    job = Job(tmp_path / "run", options, nodes=1, processes=2, restarts=4, replacements=0, faults=faults)
    recovered = job.supervise(250)
    report("3 SIGKILL during the restart", "holds" if recovered else "fails")
    assert recovered, job.logs()
    assert sorted(losses(tmp_path / "run")) == list(range(1, 13))
