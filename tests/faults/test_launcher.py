"""Checks what the terminal shows after a user's mistake, under a real torchrun: one line, which is the last."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from equimoe.launch import env
from equimoe.launch.options import to_yaml
from tests.helpers import small
from tests.helpers.command import launch

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "equimoe.launch.train"]


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "small.yaml").write_text(to_yaml(small.on(small.write_texts(tmp_path / "texts"), steps=1)))
    return ["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run")]


def terminal(*command: str) -> tuple[int, list[str]]:
    """Return the exit code, and the lines of stdout and stderr together."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    place = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    clean = {name: value for name, value in os.environ.items() if name not in place}
    done = subprocess.run(
        [sys.executable, *command],
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_an_error_of_the_ranks_is_the_last_line_and_the_exit_code_theirs(base: list[str], tmp_path: Path) -> None:
    """Both ranks find the gradient that is not finite in the second step."""
    diverge = ["--optim.lr", "1e30", "--optim.warmup_steps", "0", "--steps", "9"]
    code, lines = terminal("-m", "equimoe.launch.train", "--processes", "2", *base, *diverge)
    assert code == env.NON_FINITE
    assert lines[-1].startswith("error: after step ") and "lower optim.lr" in lines[-1]
    assert sum(line.startswith("error: ") for line in lines) == 1 and not any("Traceback" in line for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_torchrun_itself_ends_with_the_line(base: list[str], tmp_path: Path) -> None:
    """torchrun prints a report of its own and always exits with 1; the line must be the last of that report."""
    code, lines = terminal(*TORCHRUN, *base, "--data.path", str(tmp_path / "nowhere"))
    assert code == 1
    assert set(lines[-1]) == {"="} and "error: data.path=" in lines[-2] and "nowhere" in lines[-2]


@pytest.mark.parametrize(
    ("failures", "recorded", "expected", "said"),
    [
        ({0: -15, 1: env.DATA}, "", env.DATA, ""),
        ({1: -9}, str(env.HANG), env.HANG, ""),
        ({1: -9}, "1", 137, "error: rank 1 was killed by SIGKILL\n"),
        ({0: 143, 1: 1, 2: -9, 3: -15}, "1", 137, "error: rank 2 was killed by SIGKILL\n"),
        ({1: 1}, "", 1, "error: rank 1 ended with exit code 1; its traceback is above\n"),
        ({1: 1}, "1", 1, ""),
        ({0: 143, 1: 1}, "1", 1, ""),
        ({0: -15}, "1", 1, ""),
        ({1: 143}, "143", 143, ""),
        ({1: -15}, "", 143, "error: rank 1 was killed by SIGTERM\n"),
        ({0: 1}, "0", 1, "error: rank 0 ended with exit code 1; its traceback is above\n"),
        ({}, "0", 0, ""),
    ],
    ids=[
        "a mistake",
        "a hang",
        "killed",
        "killed, the others ended",
        "a bug before it can be said",
        "a bug",
        "a bug, and torchrun ended the other",
        "a bug, and torchrun saw only the other",
        "stopped",
        "stopped before it can be said",
        "a bug after the end",
        "success",
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed(
    failures: dict[int, int],
    recorded: str,
    expected: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def torchrun(arguments: list[str]) -> None:
        assert arguments == ["--standalone", "--nproc-per-node=2", "-m", "some.module", "--steps", "3"]
        assert os.environ["OMP_WAIT_POLICY"] == "active" and os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
        assert env.this_process().exit_files[-1].write_text(recorded) == len(recorded)
        found = {rank: ProcessFailure(rank, 1, code, "<N/A>") for rank, code in failures.items()}
        if found:
            raise ChildFailedError("some.module", found)

    # a copy, which the settings of the ranks may change; the user's own setting is kept
    monkeypatch.setattr("os.environ", {**os.environ, "OMP_WAIT_POLICY": "active"})
    monkeypatch.setattr("torch.distributed.run.main", torchrun)
    monkeypatch.setattr("logging.disable", lambda level: None)
    with pytest.raises(SystemExit) as stop:
        env.start(2, "some.module", ["--steps", "3"])
    assert stop.value.code == expected and capsys.readouterr().err == said


@pytest.mark.parametrize(("recorded", "expected"), [("", 143), ("143", 143), ("0", 0)], ids=["", "stopped", "finished"])
def test_nothing_follows_what_the_ranks_say_after_a_signal(
    recorded: str, expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def torchrun(_: list[str]) -> None:
        env.this_process().exit_files[-1].write_text(recorded)
        raise SignalException("stopped", signal.SIGTERM)

    monkeypatch.setattr("os.environ", {**os.environ})
    monkeypatch.setattr("torch.distributed.run.main", torchrun)
    monkeypatch.setattr("logging.disable", lambda level: None)
    with pytest.raises(SystemExit) as stop:
        env.start(2, "some.module", [])
    assert stop.value.code == expected and capsys.readouterr() == ("", "")


def test_ctrl_c_during_the_imports_prints_nothing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "equimoe.launch.train", "--help"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (None, "") and process.returncode == -signal.SIGINT


def test_configuration_is_checked_for_the_ranks_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The configuration must be checked before any rank is started."""
    import equimoe.launch.train as train

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(env, "start", lambda *_: pytest.fail("started"))
    with pytest.raises(SystemExit) as stop:
        train.main(["--processes", "3"])
    assert stop.value.code == env.CONFIG
    assert capsys.readouterr().err.startswith("error: data.global_batch=16: must be a multiple of data.micro_batch")


def test_the_quickstart_needs_no_option_on_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is smaller and the report has no figures, to save time; ``parallel`` is the recipe's own."""
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())
    texts = ["--data.path", str(small.write_texts(tmp_path / "texts")), "--data.seq_len", "16", "--steps", "1"]
    sizes = ["--moe.hidden_size", "48", "--model.num_layers", "1", "--log.eval_sequences", "1"]
    alone = launch([*texts, *sizes, "--log.trackers", "none", "--run-dir", "run"], cwd=tmp_path)
    assert alone.codes == [0], alone
    assert "1 rank, 2 micro-batches" in alone.out[0] and "held-out loss" in alone.out[0]
    two = launch([*texts, *sizes, "--dry-run"], 2, cwd=tmp_path)
    assert two.codes == [0, 0] and "2 ranks (ddp, dp_shard 2, ep 2)" in two.out[0], two


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        (env.Process(), "-m equimoe.launch.train --seed 3 --resume --steps 40"),
        (env.Process(0, 2, 0, 2), "-m equimoe.launch.train --processes 2 --seed 3 --resume --steps 40"),
        (env.Process(0, 4, 0, 2), "with the options --seed 3 --resume --steps 40"),
    ],
)
def test_how_to_go_on(process: env.Process, expected: str) -> None:
    from equimoe.launch.conclusion import command_to_continue

    given = ["--processes", "2", "--steps=20", "--resume", "--seed", "3", "--steps", "20", "--processes=2"]
    assert command_to_continue(given, process, 40).endswith(expected)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_torchrun_started_goes_on_as_the_last_line_says(base: list[str]) -> None:
    code, lines = terminal("-u", *TORCHRUN, *base)
    assert code == 0, lines
    words = shlex.split(next(line for line in lines if line.startswith("continue:")).split(maxsplit=1)[1])
    assert words[1:-3] == [*TORCHRUN, *base] and words[-3:] == ["--resume", "--steps", "2"]
    code, lines = terminal(*words[1:])
    assert code == 0 and any("step-00000002" in line for line in lines), lines


def test_the_terminal_says_how_much_is_trained_on_and_held_out(tmp_path: Path) -> None:
    """All of the user's text must be used, whatever the recipe's limit on the built-in text is."""
    (tmp_path / "texts").mkdir()
    for i in range(2):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"{i}" + "many words " * 3000)
    (tmp_path / "limit.yaml").write_text("data:\n  builtin_bytes_per_domain: 1000\n")
    out = launch(["--config", "limit.yaml", "--data.path", "texts", "--dry-run"], cwd=tmp_path).out[0]
    assert "text: texts\ntraining: 64.7k tokens (text 64.7k)\nheld out: 1.32k tokens, 2.0% (text 1.32k)\n" in out


COMMANDS = [
    path
    for folder in ("launch", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text()
]


@pytest.mark.parametrize("path", COMMANDS, ids=[path.relative_to(ROOT).as_posix() for path in COMMANDS])
def test_every_command_may_lose_its_reader(path: Path) -> None:
    assert re.search(r"^@(env\.)?command\ndef main\(", path.read_text(), flags=re.MULTILINE), "main needs @command"


@pytest.mark.faults
def test_a_command_whose_reader_has_gone_ends_quietly() -> None:
    """As after ``| head -3``; here the reader has gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "equimoe.launch.mesh", "--world", "4"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (env.UNREAD, "")


def test_another_broken_pipe_is_an_error() -> None:
    @env.command
    def main() -> None:
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        main()
