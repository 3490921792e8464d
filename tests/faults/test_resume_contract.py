"""Checks what a resumed run may change, on the command line: settings, the schedule, the data."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from equimoe.launch import env
from equimoe.launch.options import to_yaml
from equimoe.moe.observe.metrics import read_records
from equimoe.moe.train.config import OptimConfig
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.command import Ended, launch

Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a small configuration, which has been trained for 4 steps."""
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())
    optim = OptimConfig(lr=1e-2, warmup_steps=1)
    config = small.on(small.write_texts(tmp_path / "texts"), steps=4, optim=optim)
    (tmp_path / "small.yaml").write_text(to_yaml(config))
    base = ["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run")]
    first = launch(base)
    assert first.codes == [0], first
    (tmp_path / "first.txt").write_text(first.out[0])

    def resume(*options: str, world: int = 1) -> Ended:
        return launch([*base, "--resume", *options], world)

    return resume


def test_change_of_meaning_is_refused_and_can_be_allowed(run: Run, tmp_path: Path) -> None:
    change = ("--steps", "5", "--seed", "7", "--model.num_heads", "1", "--moe.activation", "gelu")
    refused = run(*change, world=2)
    assert refused.codes == [env.CONFIG] * 2
    (line,) = refused.errors
    assert line.startswith("error: the run was trained with other settings: seed from 0 to 7, model.num_heads from")
    assert line.endswith("add --allow-change seed --allow-change model.num_heads --allow-change moe.activation")
    allowed = run(*change, "--allow-change", "seed", "--allow-change", "model.num_heads", "--allow-change=moe")
    assert allowed.codes == [0], allowed
    assert "note: resumed with seed changed from 0 to 7\n" in allowed.out[0]
    assert re.search(r"^goes on after step [1-9]\d*$", allowed.out[0], re.M)
    unknown = run("--steps", "6", "--allow-change", "moe.topk")
    assert unknown.errors == ["error: --allow-change=moe.topk: no such setting; did you mean moe.top_k?"]
    report("54", "refused by name until allowed by name", exit_code=env.CONFIG)


def test_longer_schedule_is_announced_and_the_printed_command_keeps_the_rate(run: Run, tmp_path: Path) -> None:
    rates = [r["lr"] for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    first = (tmp_path / "first.txt").read_text()
    (command,) = [line for line in first.splitlines() if line.startswith("continue:")]
    assert command.endswith(f"--resume --steps 8 --optim.schedule constant --optim.lr {rates[-1]:.4g}")
    raised = run("--steps", "8", "--dry-run")
    assert raised.codes == [0] and "note: the changed schedule raises the learning rate from" in raised.out[0]
    assert f"add --optim.schedule constant --optim.lr {rates[-1]:.4g}\n" in raised.out[0]
    kept = run(*command.split("--resume ")[1].split())
    assert kept.codes == [0] and "raises the learning rate" not in kept.out[0], kept
    rates = [r["lr"] for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert rates[4:] == pytest.approx([rates[3]] * 4, rel=1e-3) and len(rates) == 8


def test_other_text_is_refused_and_can_be_allowed(run: Run, tmp_path: Path) -> None:
    other = ("--steps", "5", "--data.path", str(small.write_texts(tmp_path / "other" / "texts") / "domain0"))
    refused = run(*other)
    assert refused.codes == [env.CHECKPOINT] and "was trained on other data" in refused.errors[0]
    allowed = run(*other, "--allow-change", "data")
    assert allowed.codes == [0], allowed


def test_where_and_how_fast_a_run_computes_may_change(run: Run) -> None:
    changes = ("--steps", "6", "--data.micro_batch", "1", "--moe.backend", "reference", "--log.every", "2")
    more = run(*changes, "--parallel.ep", "2", "--health.nonfinite", "skip", world=2)
    assert more.codes == [0, 0], more
