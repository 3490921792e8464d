"""Checks that a run on two nodes goes on by itself after a rank or a node was killed, with equal results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from equimoe.launch.options import to_yaml
from equimoe.moe.observe.metrics import read_records
from equimoe.moe.train.config import CheckpointConfig
from tests.faults.agents import Job
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.command import launch

FAULTS = {
    "rank of the first node": "kill@rank=0,step=7,phase=dispatch",
    "rank of the second node": "kill@rank=1,step=7,phase=backward",
    "agent of the first node": "kill@rank=0,step=7,phase=dispatch,whom=agent",
    "agent of the second node": "kill@rank=1,step=7,phase=optim,whom=agent",
}


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("equimoe.launch.report.PLOTS", ())
    config = small.on(small.write_texts(tmp_path / "texts"), ep=2, steps=12, checkpoint=CheckpointConfig(5, 9))
    config = replace(config, parallel=replace(config.parallel, timeout_s=20.0))
    (tmp_path / "small.yaml").write_text(to_yaml(config))
    return ["--config", str(tmp_path / "small.yaml")]


def losses(run_dir: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_records(run_dir / "metrics.jsonl") if r["kind"] == "train"}


@pytest.mark.faults
@pytest.mark.timeout(400)
@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
@pytest.mark.parametrize("shared_store", [False, True])
def test_two_nodes_recover(options: list[str], tmp_path: Path, rendezvous: str, what: str, shared_store: bool) -> None:
    """With and without the setting that gives every attempt a store of its own, which static rendezvous ignores."""
    if rendezvous == "static" and not shared_store:
        pytest.skip("static rendezvous always shares torchrun's store")
    environment = {} if shared_store else {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    job = Job(tmp_path / "run", [*options, "--requeue"], rendezvous, faults=FAULTS[what], environment=environment)
    recovered = job.supervise(300)
    report(
        "2 two nodes, a killed rank or agent",
        "holds" if recovered else "fails",
        what=what,
        rendezvous=rendezvous,
        shared_store=shared_store,
        seconds=round(job.seconds_lost(), 1) if recovered else None,
    )
    assert recovered, job.logs()
    straight = launch([*options, "--run-dir", str(tmp_path / "straight")], 2)
    assert straight.codes == [0, 0]
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
