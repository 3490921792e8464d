"""Checks how ranks start: their variables, the lock of the run folder, and who is missing or unreachable."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from equimoe.launch import env, folder, joining, signals
from equimoe.launch.env import Process
from equimoe.launch.folder import RunLock
from equimoe.launch.options import to_yaml
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.command import Ended, launch

PLACE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that replaces all variables of launchers."""

    def replace(**given: str) -> None:
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM", "OMPI", "PMI", "TORCHELASTIC", "EQUIMOE_EXIT"))
        }
        kept = {k: v for k, v in kept.items() if k not in (*env.PLACE, *env.LOCAL_WORLD)}
        monkeypatch.setattr(os, "environ", {**kept, **given})

    return replace


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"RANK": "1"}, "RANK=1: is set, but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not; start ranks"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8: is set, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"),
        (PLACE | {"RANK": "two"}, "RANK=two: must be a whole number"),
        (PLACE | {"RANK": ""}, "RANK=: must be a whole number"),
        (PLACE | {"RANK": "2"}, "RANK=2: must be in 0..1, because WORLD_SIZE=2"),
        (PLACE | {"RANK": "-1"}, "RANK=-1: must be in 0..1"),
        (PLACE | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be at least 1"),
        (PLACE | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999: must be in 1..65535"),
        (PLACE | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3: must be in 1..2, because WORLD_SIZE=2"),
        (PLACE | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "1"}, "LOCAL_RANK=1: must be in 0..0"),
        (PLACE | {"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT=x: must be a whole number"),
    ],
)
def test_variables_that_cannot_be_right_are_one_line(
    variables: Callable[..., None], given: dict[str, str], words: str
) -> None:
    variables(**given)
    with pytest.raises(ValueError, match="torchrun") as refused:
        env.this_process()
    assert str(refused.value).startswith(words) and "\n" not in str(refused.value)


def test_variables_that_are_right(variables: Callable[..., None]) -> None:
    variables(MASTER_ADDR="elsewhere", MASTER_PORT="1")  # of another program; they say nothing about ranks
    assert env.this_process() == Process()
    variables(**PLACE, LOCAL_WORLD_SIZE="2", TORCHELASTIC_MAX_RESTARTS="3", EQUIMOE_EXIT_FILE="code")
    assert env.this_process() == Process(0, 2, 0, 2, 0, 3, (Path("code"),))
    variables(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    assert env.this_process() == Process()
    variables(**PLACE, LOCAL_SIZE="2")  # DeepSpeed's launcher
    assert env.this_process().local_world == 2


@pytest.mark.parametrize(
    ("given", "processes", "launcher"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, None, "srun"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 2, "srun"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, 2, "srun"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "2"}, None, ""),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, 8, ""),  # a batch script
        ({"SLURM_NTASKS": "8"}, None, ""),  # a shell of salloc
        ({"OMPI_COMM_WORLD_SIZE": "4"}, None, "mpirun"),
        ({"PMI_SIZE": "1"}, None, ""),
    ],
)
def test_another_launcher_is_noticed(
    variables: Callable[..., None], given: dict[str, str], processes: int | None, launcher: str
) -> None:
    variables(**given)
    if not launcher:
        env.check_launcher(processes)
        return
    with pytest.raises(ValueError, match=f"{launcher} starts the training command itself"):
        env.check_launcher(processes)


@pytest.mark.parametrize(
    ("given", "expected"), [("4", 4), ("4,2", 4), (" 3 ", 3), ("", os.cpu_count()), (" ", os.cpu_count())]
)
def test_openmp_threads(variables: Callable[..., None], given: str, expected: int) -> None:
    variables(OMP_NUM_THREADS=given)
    assert env.threads(Process()) == expected


@pytest.mark.parametrize("given", ["abc", "0", "-1", "1.5", ",2", "9" * 30])
def test_openmp_threads_that_cannot_be_are_one_line(
    variables: Callable[..., None], tmp_path: Path, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from equimoe.launch import train

    variables(OMP_NUM_THREADS=given)
    with pytest.raises(SystemExit) as ended:
        train.main(["--run-dir", str(tmp_path / "run")])
    assert ended.value.code == env.CONFIG
    assert capsys.readouterr().err.startswith(f"error: OMP_NUM_THREADS={given}: must begin with a whole number")


def test_a_stale_rank_does_not_train(
    variables: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from equimoe.launch import train

    variables(RANK="1")
    with pytest.raises(SystemExit) as ended:
        train.main(["--run-dir", str(tmp_path / "run")])
    assert ended.value.code == env.CONFIG and not (tmp_path / "run").exists()
    assert capsys.readouterr().err.startswith("error: RANK=1: is set, but WORLD_SIZE")
    report("58", "one line", exit_code=env.CONFIG)


@pytest.mark.parametrize("rank", [None, "0"])
def test_a_stale_torchrun_is_said(
    variables: Callable[..., None],
    rank: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a rank, its variable means nothing; a rank whose parent is a script does not end without a word."""
    ended: list[int] = []
    variables(TORCHELASTIC_RUN_ID="old", **({} if rank is None else {"RANK": rank}))
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    monkeypatch.setattr(signals, "is_launcher", lambda pid: False)
    monkeypatch.setattr(signals.ctypes, "CDLL", mock.Mock())
    parent = signals._bind_to_parent()
    if rank is None:
        assert parent == 0 and not ended and not env.under_torchrun()
    else:
        why = f"error: rank 0: its parent, process {os.getppid()}, is not torchrun; if torchrun runs, let a script in"
        assert ended == [128 + signal.SIGKILL] and capsys.readouterr().err.startswith(why)


# ---- the lock


def hold(run_dir: Path, pipe: Any) -> None:
    lock = RunLock(run_dir, ["their agent"])
    lock.confirm()
    pipe.send("held")
    time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A process that holds the lock of ``run``."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=hold, args=(tmp_path / "run", there))
    process.start()
    assert here.recv() == "held"
    yield process
    process.kill()
    process.join()


def test_a_second_job_is_refused_by_name(holder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "ENDING_S", 0.2)
    with pytest.raises(ValueError, match=f"is in use by process {holder.pid} on {socket.gethostname()}; stop that job"):
        RunLock(tmp_path / "run", ["our agent"])
    report("45 two jobs in one folder", "holds", named=True)


@pytest.mark.faults
def test_a_second_run_is_refused_before_it_does_anything(holder: Any, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(to_yaml(small.on(small.write_texts(tmp_path / "texts"), steps=2)))
    ended = launch(["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run"), "--requeue"], 2)
    assert ended.codes == [env.CANNOT_WRITE] * 2 and len(ended.errors) == 1, ended
    assert f"is in use by process {holder.pid} on" in ended.errors[0] and os.listdir(tmp_path / "run") == ["lock"]


def test_the_lock_of_a_killed_job_is_taken_over_and_said(
    holder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder.kill()
    holder.join()
    lock = RunLock(tmp_path / "run", ["our agent"])
    assert f"was held by process {holder.pid} on" in capsys.readouterr().err and not lock.continues
    lock.confirm()
    lock.release()
    again = RunLock(tmp_path / "run", ["our agent"])
    assert capsys.readouterr().err == "" and again.continues  # it was given back
    again.release()


def elsewhere(run_dir: Path) -> Path:
    run_dir.mkdir()
    lock = run_dir / "lock"
    lock.write_text(json.dumps({"host": "node-b", "pid": 7, "process": "1", "agents": [], "ended": False}))
    return lock


def test_the_lock_of_another_host_is_respected_while_it_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = elsewhere(tmp_path / "run")
    real, start = folder.RunLock._modified, time.monotonic()

    def modified(self: RunLock) -> int:
        if time.monotonic() - start > 0.5:
            os.utime(lock)  # as its holder does
        return real(self)

    monkeypatch.setattr(folder.RunLock, "_modified", modified)
    with pytest.raises(ValueError, match="is in use by process 7 on node-b"):
        RunLock(tmp_path / "run", [])


@pytest.mark.parametrize("age", [0.0, 3600.0, -3600.0])
def test_an_abandoned_lock_of_another_host_is_taken_over(
    tmp_path: Path, age: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is not old yet is watched until it is, but not for an hour if the clock was set back by one."""
    monkeypatch.setattr(folder, "STALE_S", 20.0 if age > 0 else 1.0)
    lock, start = elsewhere(tmp_path / "run"), time.time()
    os.utime(lock, (start - age, start - age))
    RunLock(tmp_path / "run", []).release()
    assert "was held by process 7 on node-b, which has ended; taking it over" in capsys.readouterr().err
    assert (time.time() - start > 0.9) == (age <= 0)


def test_the_name_of_a_holder_is_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folder, "STALE_S", 0.0)
    (tmp_path / "lock").write_text(json.dumps({"host": "\x1b]0;owned\x07\nb", "pid": 7}))
    RunLock(tmp_path, []).release()
    assert "process 7 on \\x1b]0;owned\\x07\\nb, which has ended" in capsys.readouterr().err


def test_without_flock_a_living_holder_is_still_found(
    holder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(folder.fcntl, "flock", none)
    with pytest.raises(ValueError, match=f"in use by process {holder.pid}"):
        RunLock(tmp_path / "run", [])
    holder.kill()
    holder.join()
    RunLock(tmp_path / "run", []).release()


AGENTS = ['{"agents": 5}', '{"agents": [["a"]]}', '{"agents": {"our": 1}}']


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"pid": "x", "host": 3}', *AGENTS])
def test_a_damaged_lock_is_no_obstacle(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "STALE_S", 0.0)
    (tmp_path / "lock").write_text(content)
    lock = RunLock(tmp_path, ["our agent"])
    assert not lock.continues
    lock.release()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="lock: is a link, which is not followed"):
        RunLock(tmp_path, [])


# ---- joining


def start_some(present: tuple[int, ...], world: int, options: list[str], changes: dict[str, str]) -> Ended:
    """Start only some of ``world`` ranks."""
    real = os.environ.copy()

    def within() -> Any:
        from contextlib import nullcontext

        rank = present[int(os.environ["RANK"])]
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)} | changes
        os.environ["LOCAL_WORLD_SIZE"] = str(world)
        return nullcontext()

    ended = launch(options, len(present), within=within, timeout=30)
    assert os.environ == real
    return ended


FEW = ["--parallel.timeout_s", "0.7"]


@pytest.mark.parametrize(("restarts", "told"), [(0, False), (1, True)])
def test_after_a_restart_the_cause_may_be_torchruns_store(
    monkeypatch: pytest.MonkeyPatch, restarts: int, told: bool
) -> None:
    """torchrun keeps the address of its first store, although rank 0 may be on another node now."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    process = Process(1, 2, 0, 1, restarts, 3)
    found = joining._attend(dist.HashStore(), process, joining.introduce(process, {}), limit_s=-4.9)
    assert isinstance(found, joining.Refusal) and found.code == env.HANG and found.printer == 1
    assert found.message.startswith("rank 0 has not joined within ")
    assert ("with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in found.message) == told


@pytest.mark.parametrize(
    ("present", "printed"),
    [
        ((0, 2), "2 of 4 ranks joined within 2 s: ranks 0, 2 on {host}; missing: ranks 1, 3. Check whether"),
        ((1,), "MASTER_ADDR=127.0.0.1: rank 1 on {host} cannot reach port"),
    ],
)
def test_missing_ranks_are_named(present: tuple[int, ...], printed: str) -> None:
    ended = start_some(present, 4 if 0 in present else 2, FEW, {})
    assert ended.codes == [env.HANG] * len(present), ended
    assert (
        ended.errors
        == [line for line in ended.errors if line.startswith(f"error: {printed}".format(host=socket.gethostname()))]
        and len(ended.errors) == 1
    ), ended
    report("47 a world that never completes", "holds", seconds=ended.seconds)


def test_a_wrong_address_is_one_line() -> None:
    ended = start_some((1,), 2, FEW, {"MASTER_ADDR": "no-such-host.invalid"})
    assert ended.codes == [env.HANG] and len(ended.errors) == 1, ended
    assert ended.errors[0].startswith("error: MASTER_ADDR=no-such-host.invalid: rank 1 on"), ended
    report("47 wrong address", "holds", seconds=ended.seconds)


def test_a_busy_port_is_one_line() -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        ended = start_some((0,), 2, FEW, {"MASTER_PORT": port})
    assert ended.codes == [env.HANG] and len(ended.errors) == 1, ended
    assert ended.errors[0].startswith(f"error: MASTER_PORT={port}: is used by another process on"), ended
    report("47 busy port", "holds", seconds=ended.seconds)


def join(store: dist.Store, rank: int, results: Any) -> None:
    """Join a world of two with a store that outlives attempts, as torchrun's does."""
    own = joining.Introduction({"seed": "0"}, f"host-{rank}", os.getpid())
    results.append((rank, (joining._attend if rank else joining._chair)(store, Process(rank, 2), own, 5.0)))


def test_a_restarted_rank_joins_whatever_the_store_still_holds() -> None:
    """Rank 1 of an earlier attempt has introduced itself, and is gone."""
    import threading

    store, results = dist.HashStore(), []  # type: ignore[var-annotated]
    store.set("joining/1", json.dumps(["old token", vars(joining.Introduction({"seed": "0"}, "host-1", 1))]))
    chair = threading.Thread(target=partial(join, store, 0, results))
    chair.start()
    time.sleep(0.3)  # it has answered the old token
    other = threading.Thread(target=partial(join, store, 1, results))
    other.start()
    chair.join(10)
    other.join(10)
    assert len(results) == 2 and results[0][1]["name"] == results[1][1]["name"], results
    assert all(answer["places"] == [["host-0", os.getpid()], ["host-1", os.getpid()]] for _, answer in results)


def test_nodes_may_have_restarted_different_numbers_of_times() -> None:
    ranks = {0: joining.Introduction({}, "a", 1, "a/1", 3), 1: joining.Introduction({}, "b", 2, "b/2", 0)}
    answer = joining._answer("x", ranks, None)
    assert answer["restarted"] and answer["agents"] == ["a/1", "b/2"]
