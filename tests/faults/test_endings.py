"""Checks how runs end that hang, are asked to stop or lose their reader: what is printed, and ``exit_code``."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from equimoe.launch import env, joining, signals, train
from equimoe.launch.failing import Failure
from equimoe.launch.joining import Meeting
from equimoe.moe import checkpoint
from equimoe.moe.health import heartbeat
from tests.faults.agents import Job
from tests.faults.conftest import Run
from tests.faults.table import report
from tests.helpers.command import print_to


def exit_code(run_dir: Path) -> int | None:
    file = run_dir / "exit_code"
    return int(file.read_text()) if file.exists() else None


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return options with which every phase may last as long as the longest one, and that is three seconds."""
    for phase in heartbeat.PATIENCE:
        monkeypatch.setitem(heartbeat.PATIENCE, phase, max(heartbeat.PATIENCE.values()))
    monkeypatch.setattr("equimoe.launch.train.JOIN", 50.0)
    return ["--parallel.timeout_s", "0.3"]


@pytest.mark.parametrize(("phase", "rank"), [("setup", 0), ("evaluate", 1)])
@pytest.mark.faults
def test_a_hang_outside_of_steps_is_named_too(
    run: Run, tmp_path: Path, hasty: list[str], phase: str, rank: int
) -> None:
    """The collective in which the other rank waits must not end before the heartbeats have found the cause."""
    ended = run(*hasty, "--log.eval_every", "2", faults=f"sleep@rank={rank},phase={phase},seconds=600")
    assert env.HANG in ended.codes and {*ended.codes} <= {env.HANG, -signal.SIGKILL} and ended.seconds < 30, ended
    (line,) = ended.errors
    assert f"phase {phase}: rank {rank} keeps the others waiting" in line, ended
    assert exit_code(tmp_path / "run") == (env.HANG if phase == "evaluate" else None)  # there is no folder yet


@pytest.mark.faults
def test_a_hang_of_a_single_process_is_named_too(run: Run, tmp_path: Path) -> None:
    ended = run("--parallel.timeout_s", "2", faults="sleep@step=5,phase=data,seconds=600", world=1)
    assert ended.codes == [env.HANG] and ended.seconds < 30, ended
    (line,) = ended.errors
    assert "no progress for 2 s in step 5, phase step: the process is at moe/" in line, ended
    assert exit_code(tmp_path / "run") == env.HANG


@pytest.mark.faults
def test_a_process_that_was_stopped_does_not_hang(run: Run) -> None:
    """As after Ctrl-Z and ``fg``, in the middle of a step."""

    @contextmanager
    def stopped() -> Iterator[None]:
        if not os.fork():
            time.sleep(0.7)
            os.kill(os.getppid(), signal.SIGSTOP)
            time.sleep(2.5)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        yield

    ended = run("--parallel.timeout_s", "1.5", faults="sleep@step=2,phase=data,seconds=1.2", world=1, within=stopped)
    assert ended.codes == [0] and ended.seconds > 2.5, ended


def test_a_clock_that_jumps_changes_nothing(run: Run) -> None:
    """As when somebody corrects the machine's clock: again and again, an hour ahead and back."""

    @contextmanager
    def jumping() -> Iterator[None]:
        real, looks = time.time, itertools.count()
        with mock.patch("time.time", lambda: real() + 3600 * (next(looks) % 2)):
            yield

    ended = run(within=jumping)
    assert ended.codes == [0, 0] and ended.errors == [], ended
    report("46", "a clock that jumps: works")


# ---- signals


def test_a_signal_that_also_ends_the_reader_loses_no_step(run: Run, tmp_path: Path) -> None:
    """As Ctrl-C with ``2>&1 | tee log``: the signal reaches tee, too."""

    @contextmanager
    def tee() -> Iterator[None]:
        reader, writer = os.pipe()
        print_to(writer)
        threading.Thread(target=read, args=(reader,), daemon=True).start()
        yield

    def read(reader: int) -> None:
        text = b""
        while b"4/8  loss" not in text:
            text += os.read(reader, 4096)
        os.close(reader)
        os.kill(os.getpid(), signal.SIGINT)

    slow = "sleep@phase=data,seconds=0.05,times=0"
    ended = run(faults=slow, world=1, within=tee)
    assert ended.codes == [128 + signal.SIGINT], ended
    assert exit_code(tmp_path / "run") == 128 + signal.SIGINT
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name > "step-00000004"


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_after_the_last_step_does_not_stop_what_is_finished(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    """If that hangs, a second one ends the rank."""
    conclude = train.conclude

    def interrupted(*arguments: Any) -> None:
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.2)
        if signals == 2:
            time.sleep(60)
        conclude(*arguments)

    monkeypatch.setattr(train, "conclude", interrupted)
    ended = run()
    said = [line for line in "\n".join(ended.err).splitlines() if "SIGTERM" in line]
    if signals == 1:
        assert ended.codes == [0, 0] and not said, ended
    else:
        assert 128 + signal.SIGTERM in ended.codes and "by a second SIGTERM" in said[0] and len(said) == 1, ended
    assert exit_code(tmp_path / "run") == (0 if signals == 1 else 128 + signal.SIGTERM)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let torchrun restart the ranks three times; return a file with a line for each rank that tells it to end."""
    parent, real, file = os.getpid(), os.kill, tmp_path / "told"
    file.touch()

    def kill(pid: int, number: int) -> None:
        if pid != parent:
            real(pid, number)
            return
        with file.open("a") as lines:
            lines.write(f"{os.environ['RANK']}\n")

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(env, "is_launcher", lambda _: True)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    return file


def test_ranks_stay_until_torchrun_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes: the rank that tells it records the exit code before, on a disk that may be busy."""
    signals: list[int] = []
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    monkeypatch.setattr(env, "is_launcher", lambda _: True)
    monkeypatch.setattr(os, "kill", lambda _, number: signals.append(number))
    waits = threading.Thread(target=env.end_agent, args=(env.Process(1, 2, 1, 2), env.CONFIG, False))
    waits.start()
    waits.join(1.5)
    assert waits.is_alive() and not env.agent_told(env.Process())
    env.end_agent(env.Process(0, 2, 0, 2), env.CONFIG, tells=True)
    waits.join(5.0)
    assert not waits.is_alive() and signals == [signal.SIGTERM]
    assert env.agent_told(env.Process()) and not env.agent_told(env.Process(restarts=1))


@pytest.mark.parametrize("wrong", ["--optim.lr=-1", "--data.path=/nowhere"])
def test_nobody_leaves_before_the_line_is_printed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """torchrun ends all ranks when the first one exits, and the one that prints may be slow."""

    def slowly(text: str) -> str:
        if os.environ["RANK"] == "0":
            time.sleep(1.5)
            (tmp_path / "printing").touch()
        return text

    def leave(process: env.Process, code: int, message: str) -> None:
        assert (tmp_path / "printing").exists()
        sys.exit(code)

    monkeypatch.setattr(env, "leave", leave)
    monkeypatch.setattr(env, "printable", slowly)
    ended = run(wrong)
    assert len(set(ended.codes)) == 1 and ended.codes[0] in (env.CONFIG, env.DATA) and len(ended.errors) == 1, ended


@pytest.mark.parametrize("faults", ["", "oom@phase=setup"])
def test_a_rank_that_says_why_it_ends_is_not_interrupted(
    run: Run, monkeypatch: pytest.MonkeyPatch, faults: str
) -> None:
    """torchrun asks it to end as soon as another one has, although it may be slow."""

    def slowly(text: str) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        return text

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr("equimoe.launch.signals.is_launcher", lambda _: True)
    for module in ("env", "failing"):
        monkeypatch.setattr(f"equimoe.launch.{module}.printable", slowly)
    ended = run(*([] if faults else ["--data.path=/nowhere"]), faults=faults)
    code = env.MEMORY if faults else env.DATA
    assert ended.codes == [code] * 2 and len(ended.errors) == 1 and "SIGTERM" not in ended.errors[0], ended


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_end_with_the_error_of_one_before_the_first_step(run: Run, rank: int) -> None:
    """The others wait in a collective, which does not fail before the rank has gone; rank 0 holds the store."""
    ended = run(faults=f"oom@rank={rank},phase=setup")
    assert ended.codes == [env.MEMORY] * 2 and len(ended.errors) == 1, ended
    assert ended.errors[0].startswith(f"error: rank {rank}, step 0, phase setup: out of memory"), ended


@pytest.mark.parametrize(("where", "rank"), [(",rank=0", 0), (",rank=1", 1), ("", 0)], ids=["rank 0", "rank 1", "all"])
def test_a_mistake_that_only_one_rank_finds_while_it_builds_the_model_ends_all(run: Run, where: str, rank: int) -> None:
    """The other goes on to a collective, which must not meet another one of this rank, nor wait for the time limit."""
    ended = run(faults=f"raise@phase=setup{where}")
    assert ended.codes == [env.CONFIG] * 2 and ended.seconds < 30, ended
    assert ended.errors == [f"error: rank {rank}: injected on rank {rank} in phase setup"], ended


def test_the_reason_of_a_hang_is_said_before_torchrun_can_see_that_a_rank_has_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr("os.kill", lambda *_: said.append(capsys.readouterr().err))
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        failure_of(1, store=dist.HashStore()).hang("rank 1 is silent", [1])
    assert ended.value.code == env.HANG and said == ["error: rank 1 is silent\n"]


def test_a_rank_of_the_same_node_tells_why_it_ended_without_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store may have gone with the rank that held it, and there may be no run folder yet."""
    for rank in (0, 1):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / str(rank) / "error.json"))
        if not rank:
            (tmp_path / "attempt_0").mkdir()
            assert failure_of()._written() is None and not env.is_ending(env.Process())
            env.record_exit(env.Process(), env.MEMORY)
    assert failure_of()._written() == (None, env.MEMORY) and env.is_ending(env.Process())
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert failure_of()._written() is None


@pytest.mark.parametrize(("rank", "met"), [(0, False), (1, False), (1, True)])
def test_a_line_is_not_lost_with_the_rank_that_was_to_print_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, rank: int, met: bool
) -> None:
    """Another one prints it; once they know each other's process, they name the one that was killed instead."""
    introduce = joining.introduce

    def is_here() -> bool:
        return os.environ["RANK"] == str(rank)

    def refused(process: env.Process, facts: dict[str, str], _: object) -> joining.Introduction:
        return introduce(process, facts, (env.CONFIG, "steps=x: is wrong") if is_here() and not met else None)

    def exists(_: Path) -> bool:
        if is_here():
            raise ValueError("run_dir='x': cannot be used")
        return False

    def killed(text: str) -> str:
        if is_here():
            os.kill(os.getpid(), signal.SIGKILL)
        return text

    monkeypatch.setattr(joining, "PRINT_S", 0.5)
    monkeypatch.setattr(joining, "introduce", refused)
    monkeypatch.setattr("equimoe.launch.earlier.exists", exists)
    monkeypatch.setattr(env, "printable", killed)
    ended = run()
    assert ended.codes[rank] == -signal.SIGKILL and ended.codes[1 - rank] == (1 if met else env.CONFIG), ended
    (line,) = ended.errors
    assert f"rank {rank} (process " in line if met else line == f"error: rank {rank}: steps=x: is wrong", line


@pytest.mark.parametrize("rank", [0, 1])
def test_the_end_of_a_rank_before_all_had_joined_is_not_the_users_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    """torchrun asks the others to stop, who do not know each other yet: the oldest one that is left says it."""
    watcher = signals.Signals(env.Process(rank, 3, rank, 3))
    monkeypatch.setattr(watcher, "_parent", 1)
    monkeypatch.setattr(signals, "_children", lambda _: [os.getpid(), os.getpid() - rank])
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        watcher._receive(signal.SIGTERM)
    assert ended.value.code == 1
    said = f"error: rank {rank}: another rank of this node has ended before all had joined\n"
    assert capsys.readouterr().err == ("" if rank else said)


def test_only_processes_that_run_count_as_ranks_of_this_node() -> None:
    before = signals._children(os.getpid())
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    running = signals._children(os.getpid())
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    after = signals._children(os.getpid())
    os.waitpid(child, 0)
    assert {*running} - {*before} == {child} and child not in after


def test_the_first_rank_tells_its_torchrun_unless_the_rank_with_the_cause_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two torchruns may run on machines of the same name, or on one."""
    told: list[bool] = []
    monkeypatch.setattr("equimoe.launch.failing.end_agent", lambda *_, tells: told.append(tells))
    monkeypatch.setattr("os._exit", sys.exit)
    for local_world in (1, 2):
        failure = failure_of(1)
        failure.process = env.Process(0, 2, 0, local_world, 0, 3)
        with pytest.raises(SystemExit):
            failure._follow(1, env.MEMORY)
    assert told == [True, False]


def test_no_rank_leaves_a_stopped_run_before_the_first_one_has_said_how_to_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun would kill it while it writes the report."""

    def slowly(*_: object) -> None:
        time.sleep(1.5)
        (tmp_path / "said").touch()

    def leave(process: env.Process, code: int, message: str) -> None:
        assert (tmp_path / "said").exists()
        sys.exit(code)

    monkeypatch.setattr("equimoe.launch.train.conclude_early", slowly)
    monkeypatch.setattr(env, "leave", leave)
    ended = run(faults="term@step=3,phase=data")
    assert ended.codes == [128 + signal.SIGTERM] * 2, ended


def test_torchruns_signal_after_it_was_told_is_quiet(run: Run, told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank that told it may have ended since; nobody killed it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr("equimoe.launch.signals.is_launcher", lambda _: True)
    late = "sleep@rank=1,phase=setup,seconds=1.5;term@rank=1,phase=setup"
    ended = run(faults=f"oom@rank=0,phase=setup;{late}")
    assert ended.codes == [env.MEMORY, 128 + signal.SIGTERM] and len(ended.errors) == 1, ended
    assert told.read_text() == "0\n"


def test_a_signal_before_the_first_step_is_not_restarted(run: Run, told: Path) -> None:
    ended = run(faults="term@rank=1,phase=setup")
    assert ended.codes == [128 + signal.SIGTERM] * 2, ended
    assert ended.err == ["", "error: stopped by SIGTERM before the first step; nothing is lost\n"], ended
    assert told.read_text() == "1\n", ended


def test_a_run_that_torchrun_restarts_does_not_take_its_signal_for_the_users(run: Run, told: Path) -> None:
    """It closes the ranks that are left before it restarts all of them; being told to end, it would not."""
    killed = "kill@rank=1,phase=setup"
    ended = run(faults=f"{killed};sleep@rank=0,phase=setup,seconds=0.2;term@rank=0,phase=setup")
    assert ended.codes[0] == 128 + signal.SIGTERM and told.read_text() == "", ended


def all_ranks(ranks: int, place: str) -> str:
    return ";".join(f"term@rank={rank},{place}" for rank in range(ranks))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("nodes", "processes", "restarts", "faults"),
    [
        (1, 1, 3, all_ranks(1, "phase=setup")),
        (1, 2, 3, all_ranks(2, "phase=setup")),
        (1, 2, 3, "term@rank=0,phase=setup;sleep@rank=1,phase=setup,seconds=0.4;term@rank=1,phase=setup"),
        (1, 2, 0, "term@rank=0,phase=setup;sleep@rank=1,phase=setup,seconds=0.4;term@rank=1,phase=setup"),
        (1, 1, 3, all_ranks(1, "step=5,phase=data")),
        (1, 2, 3, all_ranks(2, "step=5,phase=data")),
        (2, 1, 3, "term@rank=0,step=5,phase=data"),
    ],
    ids=[
        "setup-one-rank",
        "setup-two-ranks",
        "setup-one-by-one",
        "setup-one-by-one-without-restarts",
        "one-rank",
        "two-ranks",
        "a-rank-of-two-nodes",
    ],
)
def test_ranks_that_get_a_signal_without_their_torchrun_are_not_restarted(
    options: list[str], tmp_path: Path, nodes: int, processes: int, restarts: int, faults: str
) -> None:
    """The user, or a node's monitor, has signalled every rank of a node."""
    code = tmp_path / "code"
    own = {"nodes": nodes, "processes": processes, "restarts": restarts, "replacements": 0}
    options = [*options, "--parallel.ep", str(nodes * processes)]
    job = Job(tmp_path / "run", options, faults=faults, environment={"EQUIMOE_EXIT_FILE": str(code)}, **own)
    assert not job.supervise(60)
    assert code.read_text() == f"{128 + signal.SIGTERM}\n", job.logs()
    assert "Starting worker group" not in job.logs() and job.logs().count("SIGTERM: saving") <= 1, job.logs()
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints") if "step" in faults else None
    assert saved is None or saved.name == "step-00000005", job.logs()


@pytest.mark.faults
def test_a_second_signal_is_not_restarted(run: Run, tmp_path: Path, told: Path) -> None:
    again = ["term@rank=1,step=5,phase=data", "sleep@rank=1,step=5,phase=data,seconds=1.2", "term@rank=1,step=5"]
    ended = run("--parallel.timeout_s", "60", faults=";".join([*again, "sleep@rank=0,step=5,phase=data,seconds=2"]))
    assert ended.codes == [128 + signal.SIGTERM] * 2, ended
    assert ended.err[1].startswith("error: ended at once by a second SIGTERM") and "error" not in ended.err[0], ended
    assert told.read_text() == "1\n" and exit_code(tmp_path / "run") == 128 + signal.SIGTERM


@pytest.mark.faults
def test_one_rank_with_a_final_error_is_not_restarted(run: Run, tmp_path: Path, told: Path) -> None:
    ended = run(faults="oom@rank=1,step=2,phase=forward")
    assert ended.codes == [env.MEMORY] * 2 and told.read_text() == "1\n", ended
    assert exit_code(tmp_path / "run") == env.MEMORY


@pytest.mark.faults
@pytest.mark.parametrize("first", [0, 1])
def test_one_of_two_ranks_with_the_same_error_before_the_first_step_prints_it(run: Run, first: int) -> None:
    """Rank 0 holds the store, and there is no run folder yet that could tell the other one."""
    both = f"oom@rank={first},phase=setup;sleep@rank={1 - first},phase=setup,seconds=0.3;oom@rank={1 - first}"
    ended = run(faults=f"{both},phase=setup")
    assert ended.codes == [env.MEMORY] * 2 and len(ended.errors) == 1, ended


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_before_the_first_step_is_named(options: list[str], tmp_path: Path, rank: int) -> None:
    """torchrun then asks the others to stop, which is not the user's signal: 1 tells that the run may start again."""
    file = tmp_path / "code"
    faults = f"kill@rank={rank},phase=setup;sleep@rank={1 - rank},phase=setup,seconds=2"
    environment = {"EQUIMOE_EXIT_FILE": str(file)}
    own = {"nodes": 1, "processes": 2, "restarts": 0, "replacements": 0}
    job = Job(tmp_path / "run", options, faults=faults, environment=environment, **own)
    assert not job.supervise(100)
    (line,) = [line for line in job.logs().splitlines() if line.startswith("error: ")]
    assert f"rank {rank} (process " in line and "has ended without a word" in line and "SIGTERM" not in line, line
    assert file.read_text() == "1\n"


def failure_of(*processes: int, store: dist.Store | None = None, verdict: Path | None = None) -> Failure:
    """Return what happens when a run fails, for the first of several ranks of this machine."""
    places = tuple((socket.gethostname(), process) for process in (os.getpid(), *processes))
    failure = Failure(env.Process(0, len(places)), Meeting(places, ("",), False, store))
    failure.verdict = verdict
    return failure


def test_torchrun_may_be_restarting_as_soon_as_one_rank_has_ended() -> None:
    """Another one may be too busy, or stopped, to tell that it has got the signal, too."""
    ended = os.fork()
    if not ended:
        os._exit(0)
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
    assert failure_of(os.getppid(), ended, store=dist.HashStore()).restarting()
    assert not failure_of(os.getppid(), store=dist.HashStore()).restarting()
    os.waitpid(ended, 0)


@pytest.mark.parametrize("all_have_it", [True, False])
def test_torchrun_may_be_restarting_because_of_another_node(all_have_it: bool) -> None:
    """A rank cannot see whether one of another node was killed, but torchrun signals all of its own ranks then."""
    store = dist.HashStore()
    failure = failure_of(os.getppid(), store=store)
    failure.meeting = replace(failure.meeting, places=(*failure.meeting.places, ("another", 1)))
    if all_have_it:
        store.set("signalled/1", "")
    assert failure.restarting() == all_have_it


# ---- the exit code in the run folder


@pytest.mark.parametrize("content", ["", "\n", "x", None])
def test_an_exit_code_that_cannot_be_read_is_unknown(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "exit_code").write_text(content)
    assert failure_of(verdict=tmp_path / "exit_code")._written() is None
    (tmp_path / "exit_code").write_text("77\n")
    assert failure_of(verdict=tmp_path / "exit_code")._written() == (None, env.MEMORY)


@pytest.mark.parametrize("name", ["exit_code", "mine"])
def test_only_a_users_own_exit_file_may_be_a_link(tmp_path: Path, name: str) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / name).symlink_to("victim")
    env.record_exit(env.Process(exit_files=(tmp_path / name,)), 70)
    assert (tmp_path / name).read_text() == "70\n"
    assert (tmp_path / "victim").read_text() == ("precious" if name == "exit_code" else "70\n")


def test_a_report_to_torchrun_that_cannot_be_written_hides_no_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    with pytest.raises(SystemExit) as ended:
        env.leave(env.Process(), env.CANNOT_WRITE, "the disk is full")
    assert ended.value.code == env.CANNOT_WRITE


@pytest.mark.faults
def test_the_run_folder_has_the_exit_code_of_the_last_job(run: Run, tmp_path: Path) -> None:
    folder, alone = tmp_path / "run", {"world": 1}
    assert run(**alone).codes == [0] and exit_code(folder) == 0
    for options, code in ((["--steps", "9"], env.CHECKPOINT), (["--resume", "--dry-run", "--steps", "9"], 0)):
        (folder / "exit_code").write_text("143")
        assert run(*options, **alone).codes == [code] and exit_code(folder) == 143  # it has not held the folder
    assert run("--resume", **alone).codes == [0] and exit_code(folder) == 0  # is finished
    for steps in ([], ["--steps", "9"]):
        (folder / "exit_code").unlink()
        ended = run("--resume", "--seed", "7", *steps, **alone)
        assert ended.codes == [env.CONFIG] and exit_code(folder) == env.CONFIG, ended
    assert run("--resume", "--data.path", "nowhere", **alone).codes == [env.DATA] and exit_code(folder) == env.DATA
    assert run("--resume", "--steps", "9", faults="raise@phase=data", **alone).codes == [1] and exit_code(folder) == 1
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{")
    assert run("--resume", **alone).codes == [env.CHECKPOINT] and exit_code(folder) == env.CHECKPOINT


def test_a_users_exit_file_may_be_that_of_the_run_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not tell how an earlier job ended, after this one was killed."""
    monkeypatch.setenv("EQUIMOE_EXIT_FILE", str(tmp_path / "run" / "exit_code"))
    assert run("--steps", "2", world=1).codes == [0] and exit_code(tmp_path / "run") == 0
    assert run("--resume", "--steps", "4", faults="kill@phase=data", world=1).codes == [-signal.SIGKILL]
    assert exit_code(tmp_path / "run") is None


@pytest.mark.faults
def test_a_killed_rank_and_a_refused_restart_are_recorded(run: Run, tmp_path: Path) -> None:
    assert run(faults="kill@rank=1,step=6,phase=dispatch,saved=4").codes == [1, -signal.SIGKILL]
    assert exit_code(tmp_path / "run") == 1
    assert run("--resume", "--seed", "7").codes == [env.CONFIG] * 2 and exit_code(tmp_path / "run") == env.CONFIG


def test_a_folder_in_the_place_of_the_exit_code_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run" / "exit_code").mkdir(parents=True)
    ended = run(world=1)
    assert ended.codes == [env.CANNOT_WRITE], ended
    assert ended.errors == [
        f"error: {tmp_path}/run/exit_code: is not a regular file; delete it, or choose another --run-dir"
    ]
