"""Checks how runs end that hang, are asked to stop or lose their reader: what is printed, and ``exit_code``."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from equimoe.launch import env
from equimoe.moe import checkpoint
from equimoe.moe.health import heartbeat
from tests.faults.conftest import Run
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
def test_a_hang_outside_of_steps_is_named_too(
    run: Run, tmp_path: Path, hasty: list[str], phase: str, rank: int
) -> None:
    """The collective in which the other rank waits must not end before the heartbeats have found the cause."""
    ended = run(*hasty, "--log.eval_every", "2", faults=f"sleep@rank={rank},phase={phase},seconds=600")
    assert env.HANG in ended.codes and {*ended.codes} <= {env.HANG, -signal.SIGKILL} and ended.seconds < 30, ended
    (line,) = ended.errors
    assert f"phase {phase}: rank {rank} keeps the others waiting" in line, ended
    assert exit_code(tmp_path / "run") == (env.HANG if phase == "evaluate" else None)  # there is no folder yet


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
        while b"step:    4/8" not in text:
            text += os.read(reader, 4096)
        os.close(reader)
        os.kill(os.getpid(), signal.SIGINT)

    slow = "sleep@phase=data,seconds=0.05,times=0"
    ended = run(faults=slow, world=1, within=tee)
    assert ended.codes == [128 + signal.SIGINT], ended
    assert exit_code(tmp_path / "run") == 128 + signal.SIGINT
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name > "step-00000004"
