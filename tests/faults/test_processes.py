"""Checks what happens to a run whose ranks are killed, stopped, asked to stop, slow or wrong: forked ranks."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from equimoe.launch import env
from equimoe.moe import checkpoint
from equimoe.moe.observe.metrics import read_records
from tests.faults.conftest import Run
from tests.faults.table import report
from tests.helpers.checkpoints import load_all

pytestmark = pytest.mark.faults

#: seconds in which a stopped rank has been killed by another one; the test itself kills ranks after 60
KILLED_S = 30.0
#: options with which a hang is found soon; other tests have more patience, because disks may be busy
SOON = ("--parallel.timeout_s", "3")


def losses(run_dir: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_records(run_dir / "metrics.jsonl") if r["kind"] == "train"}


def assert_equal_ends(one: Path, other: Path, step: int = 8) -> None:
    ends = [load_all(folder / "checkpoints" / f"step-{step:08d}") for folder in (one, other)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert losses(one) == losses(other)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.timeout(180)
def test_a_signal_to_one_rank_saves_on_all_and_loses_no_step(run: Run, tmp_path: Path, number: signal.Signals) -> None:
    """The other rank must stop after the same step. Step 6 is one that is not saved otherwise."""
    kind = number.name.removeprefix("SIG").lower()
    ended = run(faults=f"{kind}@rank=1,step=6,phase=dispatch")
    assert ended.codes == [128 + number] * 2, ended
    assert f"stopped by {number.name} after step 6 of 8; no step is lost" in ended.out[0]
    assert "continue:" in ended.out[0] and "--resume --steps 8" in ended.out[0] and "report.html" in ended.out[0]
    assert (tmp_path / "run" / "report.html").exists()
    assert int((tmp_path / "run" / "exit_code").read_text()) == 128 + number
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "step-00000006"
    if number == signal.SIGTERM:
        assert run("--resume").codes == [0, 0]
        assert int((tmp_path / "run" / "exit_code").read_text()) == 0
        assert run(folder="straight").codes == [0, 0]
        assert_equal_ends(tmp_path / "run", tmp_path / "straight")
    report("6 SIGTERM" if number == signal.SIGTERM else "6 SIGINT", "holds", steps_lost=0, exit_code=ended.codes[0])


def test_a_signal_that_comes_twice_within_a_second_is_one_request(run: Run, tmp_path: Path) -> None:
    """A scheduler signals the ranks, and torchrun, which forwards it."""
    ended = run(faults="term@rank=1,step=6,phase=dispatch,times=2")
    assert ended.codes == [128 + signal.SIGTERM] * 2, ended
    assert len(list((tmp_path / "run.faults").iterdir())) == 2
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "step-00000006"


def test_a_second_signal_ends_at_once(run: Run, tmp_path: Path) -> None:
    slow = "sleep@rank=0,step=5,phase=data,seconds=5"
    ended = run(
        "--parallel.timeout_s",
        "60",
        faults=f"term@step=5,phase=data;sleep@rank=1,step=5,phase=data,seconds=1.3;"
        f"term@rank=1,step=5,phase=dispatch;{slow}",
    )
    assert ended.codes[1] == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "checkpoints" / "step-00000005").exists()


@pytest.mark.timeout(180)
def test_a_stopped_rank_is_named_and_killed(run: Run, tmp_path: Path) -> None:
    ended = run(*SOON, faults="stop@rank=1,step=5,phase=dispatch")
    assert ended.codes == [env.HANG, -signal.SIGKILL], ended
    assert ended.seconds < KILLED_S, ended
    assert len(ended.errors) == 1 and "rank 1 is silent" in ended.errors[0] and "step 5" in ended.errors[0], ended
    assert int((tmp_path / "run" / "exit_code").read_text()) == env.HANG
    report("7 SIGSTOP of a rank", "holds", exit_code=env.HANG, seconds=ended.seconds)


@pytest.mark.timeout(180)
def test_the_rank_that_holds_the_store_is_named_too(run: Run) -> None:
    ended = run(*SOON, faults="stop@rank=0,step=5,phase=backward")
    assert ended.codes == [-signal.SIGKILL, env.HANG], ended
    assert ended.seconds < KILLED_S, ended
    assert len(ended.errors) == 1 and "rank 0 is silent" in ended.errors[0], ended


@pytest.mark.timeout(180)
def test_a_rank_that_keeps_the_others_waiting_is_named(run: Run) -> None:
    ended = run(*SOON, faults="sleep@rank=1,step=5,phase=data,seconds=600")
    assert ended.codes == [env.HANG, -signal.SIGKILL] or ended.codes == [env.HANG] * 2, ended
    assert len(ended.errors) == 1 and "rank 1 keeps the others waiting" in ended.errors[0], ended


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.timeout(180)
def test_the_rank_with_the_error_prints_it_once_and_first(run: Run, rank: int) -> None:
    ended = run(faults=f"raise@rank={rank},step=5,phase=data")
    assert ended.codes == [1, 1], ended
    errors = [line for line in ended.errors if line.startswith("error: ")]
    assert errors == [f"error: rank {rank}, step 5, phase step: ValueError: injected on rank {rank} in phase data"]
    assert ended.err[rank].startswith("error: ") and ended.err[1 - rank] == "", ended
    report("9 a rank raises", "holds", rank=rank)


@pytest.mark.timeout(180)
def test_an_error_of_all_ranks_is_printed_once(run: Run) -> None:
    """Rank 0 holds the store, and has ended before rank 1 can ask there who was first."""
    ended = run(faults="sleep@rank=1,step=5,phase=data,seconds=1;raise@step=5,phase=data")
    assert ended.codes == [1, 1], ended
    errors = [line for line in ended.errors if line.startswith("error: ")]
    assert errors == ["error: rank 0, step 5, phase step: ValueError: injected on rank 0 in phase data"], ended


@pytest.mark.timeout(180)
def test_an_error_is_printed_although_the_stores_holder_was_killed(run: Run) -> None:
    ended = run(faults="kill@rank=0,step=5,phase=data;sleep@rank=1,step=5,phase=data,seconds=1;raise@rank=1,step=5")
    assert ended.codes == [-signal.SIGKILL, 1], ended
    errors = [line for line in ended.errors if line.startswith("error: ")]
    assert errors == ["error: rank 1, step 5, phase step: ValueError: injected on rank 1 in phase data"], ended


def test_running_out_of_memory_is_one_line_and_code_77(run: Run) -> None:
    ended = run(faults="oom@rank=1,step=2,phase=forward")
    assert ended.codes == [env.MEMORY] * 2, ended
    (line,) = ended.errors
    assert line.startswith("error: rank 1, step 2, phase step: out of memory: MoE layer of block 0: CUDA out of"), ended


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", ["dispatch", "data", "optim"])
@pytest.mark.timeout(180)
def test_a_killed_rank_is_named(run: Run, tmp_path: Path, phase: str, rank: int) -> None:
    ended = run(faults=f"kill@rank={rank},step=5,phase={phase}")
    seconds = time.time() - next((tmp_path / "run.faults").iterdir()).stat().st_mtime
    assert ended.codes[rank] == -signal.SIGKILL and ended.codes[1 - rank] == 1, ended
    assert len(ended.errors) == 1 and f"rank {rank} (process " in ended.errors[0] and "killed" in ended.errors[0], ended
    report("5 SIGKILL of the first and the last rank", "holds", rank=rank, seconds_to_exit=round(seconds, 1))


@pytest.mark.timeout(180)
def test_a_killed_rank_is_the_cause_although_another_holds_a_nan(run: Run) -> None:
    """Nobody can judge the step in which the rank was killed; a NaN of an earlier step would have ended the run."""
    ended = run(faults="nan@rank=0,step=5,phase=forward;kill@rank=1,step=5,phase=backward")
    assert ended.codes == [1, -signal.SIGKILL], ended
    assert len(ended.errors) == 1 and "rank 1 (process " in ended.errors[0] and "killed" in ended.errors[0], ended
    report("48 a killed rank, and a NaN on another", "holds")


@pytest.mark.timeout(180)
def test_a_kill_while_experts_move_loses_nothing(run: Run, tmp_path: Path) -> None:
    """The checkpoint before the move is whole, and the resumed run ends in the same bits as an uninterrupted one."""
    options = ["--parallel.ep=1", "--parallel.experts=fssdp", "--placement.reshard_every=1", "--placement.window=1"]
    options += ["--placement.overlap=0"]
    ended = run(*options, faults="kill@rank=1,step=6,phase=move,saved=4")
    assert -signal.SIGKILL in ended.codes, ended
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "step-00000004"
    assert run(*options, "--resume").codes == [0, 0]
    assert run(*options, folder="straight").codes == [0, 0]
    assert_equal_ends(tmp_path / "run", tmp_path / "straight")
    report("1 a rank is killed while experts move", "holds")


@pytest.mark.timeout(180)
def test_collectives_in_another_order_are_named_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compares them if it is asked to; both ranks then fail at the same time, and one of them speaks."""
    from equimoe.moe.health import Pulse

    real = Pulse.end

    def end(self: Pulse, signal: int, logged: bool) -> int:
        if os.environ["RANK"] == "1" and self.step == 3:
            torch.distributed.all_reduce(torch.zeros(7))
        return real(self, signal, logged)

    monkeypatch.setattr(Pulse, "end", end)
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    torch.distributed.set_debug_level_from_env()
    try:
        ended = run()
    finally:
        monkeypatch.undo()
        torch.distributed.set_debug_level_from_env()
    assert ended.codes == [1, 1], ended
    assert sum(line.startswith("error: rank ") for line in ended.errors) == 1, ended
    assert any("mismatch between collectives" in line and "step 3" in line for line in ended.errors), ended
    report("28 collectives in another order", "holds", seconds=ended.seconds)


@pytest.mark.timeout(180)
def test_a_slow_rank_is_named_in_the_records(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equimoe.moe.health.heartbeat.LEAST_LOOKS", 15)  # seconds less
    ended = run("--log.every", "8", faults="sleep@rank=1,phase=data,seconds=0.3,times=0")
    assert ended.codes == [0, 0], ended
    (trained,) = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert trained["stragglers"] == [1] and trained["busy_s"][1] > 0.2, trained
    assert "rank 1 is slow: it works 0." in ended.out[0]
    report("8 straggler", "holds", named=True, steps=8)


def test_a_few_looks_name_nobody(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equimoe.moe.health.heartbeat.LEAST_LOOKS", 10**9)
    assert run("--log.every", "1", faults="sleep@rank=1,phase=data,seconds=0.1,times=0").codes == [0, 0]
    trained = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert len(trained) == 8 and not any("stragglers" in record for record in trained)


# ---- starting again


def restarted(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))


@pytest.mark.timeout(180)
def test_a_restart_before_the_first_checkpoint_starts_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(faults="kill@rank=1,step=2,phase=dispatch").codes[1] == -signal.SIGKILL
    restarted(monkeypatch, 1)
    ended = run()
    assert ended.codes == [0, 0] and "ended before its first checkpoint; starting again" in ended.err[0], ended
    restarted(monkeypatch, 0)
    assert run(folder="straight").codes == [0, 0]
    assert_equal_ends(tmp_path / "run", tmp_path / "straight")


def test_a_run_without_a_checkpoint_is_no_dead_end(run: Run) -> None:
    assert run("--steps", "5", faults="kill@rank=1,step=2,phase=dispatch").codes[1] == -signal.SIGKILL
    ended = run("--resume", "--steps", "3")
    assert ended.codes == [0, 0] and "starting again" in ended.err[0], ended


def test_a_refused_start_does_not_become_a_takeover(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun restarts ranks that have refused another run's folder; they must refuse it again."""
    assert run("--steps", "2").codes == [0, 0]
    lock = tmp_path / "run" / "lock"
    lock.write_text(lock.read_text().replace("localhost", "elsewhere").replace(f"/{os.getpid()}/", "/1/"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for count in (0, 1):
        restarted(monkeypatch, count)
        ended = run("--steps", "4")
        assert ended.codes == [env.CHECKPOINT] * 2 and "already holds a run" in ended.errors[0], ended
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


@pytest.mark.timeout(180)
def test_a_requeued_job_starts_and_resumes(run: Run, tmp_path: Path) -> None:
    for fault, said in (
        ("kill@rank=0,step=2,phase=optim", ""),
        ("kill@rank=1,step=6,phase=optim,saved=4", "starting again"),
    ):
        ended = run("--requeue", faults=fault, folder="run")
        assert -signal.SIGKILL in ended.codes and said in ended.err[0], ended
    ended = run("--requeue")
    assert ended.codes == [0, 0], ended
    assert min(losses(tmp_path / "run")) == 1 and len(losses(tmp_path / "run")) == 8


# ---- agreement at the start


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 7}, ["seed: rank 0 has 0, rank 1 has 7"]),
        ({"steps": 9, "dtype": "bfloat16"}, ["steps: rank 0 has 8, rank 1 has 9", "dtype: "]),
    ],
)
def test_ranks_with_other_options_are_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, changes: dict, words: list[str]
) -> None:
    import equimoe.launch.train as train

    real = train.parse

    def parse(arguments: list[str]) -> object:
        found = real(arguments)
        return replace(found, config=replace(found.config, **changes)) if os.environ["RANK"] == "1" else found

    monkeypatch.setattr(train, "parse", parse)
    ended = run()
    assert ended.codes == [env.DISAGREEMENT] * 2 and len(ended.errors) == 1, ended
    assert all(word in ended.errors[0] for word in words), ended.errors
    report("22 options differ on one rank", "holds", seconds=ended.seconds)


@pytest.mark.parametrize("what", ["code_version", "local world", "bad option"])
def test_ranks_that_cannot_work_together_end_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    import equimoe.launch.train as train

    second = lambda: os.environ["RANK"] == "1"  # noqa: E731
    if what == "code_version":
        monkeypatch.setattr(train.joining, "code_version", lambda: f"made-{second()}")
        code, text, printer = env.DISAGREEMENT, "code version: rank 0 has made-False, rank 1 has made-True", 0
    elif what == "local world":
        real = env.this_process
        monkeypatch.setattr(env, "this_process", lambda: replace(real(), local_world=1 + second()))
        code, text, printer = env.DISAGREEMENT, "processes per node: rank 0 has 1, rank 1 has 2", 0
    else:
        parse = train.parse
        monkeypatch.setattr(train, "parse", lambda a: parse([*a, "--stepz", "3"] if second() else a))
        code, text, printer = env.CONFIG, "rank 1: --stepz: no such option", 1
    ended = run()
    assert ended.codes == [code] * 2 and ended.err[1 - printer] == "", ended
    assert ended.err[printer].startswith(f"error: {text}"), ended


def test_ranks_with_other_shapes_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configurations agree, but the code does not do the same: found before the first collective of a step."""
    import equimoe.moe.train.trainer as trainer

    real = trainer.build_model

    def other(config: Any, vocab_size: int) -> Any:
        wider = replace(config, moe=replace(config.moe, intermediate_size=20))
        return real(wider if os.environ["RANK"] == "1" else config, vocab_size)

    monkeypatch.setattr(trainer, "build_model", other)
    ended = run()
    assert ended.codes == [env.CONFIG] * 2 and len(ended.errors) == 1, ended
    assert "model: rank 1 has different parameters from rank 0" in ended.errors[0], ended
    report("23 shapes differ on one rank", "holds", seconds=ended.seconds)
