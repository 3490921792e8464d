"""Checks how `make gpu` runs its parts: what each prints is kept, and none of them can harm the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import parts, run
from benchmarks.gpu.run import Part
from equimoe.kernels.matmul_tiles import MatmulTile
from tests.helpers.fork import PATIENCE

CHILD = "import subprocess, sys, time; print('begun', flush=True); subprocess.run([sys.executable, '-c', '{}'])"


def part(code: str, seconds: int = 20) -> Part:
    return Part(("-c", "raise SystemExit('only with a GPU')"), ("-c", code), seconds, (("MARK", "set"),))


PARTS = {
    "right": part("import os; print('MARK is', os.environ['MARK'])"),
    "wrong": part("print('a | FAIL | 3'); raise SystemExit(1)"),
    "crashes": part("import os; os.abort()"),
    "hangs": part(CHILD.format("import time; time.sleep(100)"), seconds=2),
    "for a GPU alone": Part(("-c", ""), (), 1),
}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STAGES", {"gate": PARTS, "why": {"right": PARTS["right"]}})
    monkeypatch.setattr(run, "REHEARSAL", 1)
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("stages")
def test_a_part_that_fails_costs_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--out", str(tmp_path)]) == 1
    lines = [line.rpartition(" (")[0] or line for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "torch finds no GPU on this machine; the parts are rehearsed on its CPU, and their times say nothing",
        "gate: right: passed",
        "gate: wrong: FAILED with exit code 1: a | FAIL | 3",
        "gate: crashes: FAILED with exit code -6: it printed nothing",
        "gate: hangs: ran longer than the 2 s that it had: begun",
        "gate: for a GPU alone: cannot be rehearsed without a GPU",
        "why: right: passed",
        f"3 parts have failed; what they printed is in {tmp_path}",
    ]
    assert (tmp_path / "gate_right.txt").read_text() == "MARK is set\n"
    assert (tmp_path / "gate_hangs.txt").read_text() == "begun\n"


@pytest.mark.usefixtures("stages")
def test_stages_are_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["why", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"no parts have failed; what they printed is in {tmp_path}"
    assert [file.name for file in tmp_path.iterdir()] == ["why_right.txt"]
    with pytest.raises(SystemExit, match="2"):
        run.main(["speeds"])
    assert "STAGE=speeds: unknown; use gate, why" in capsys.readouterr().err


@pytest.mark.usefixtures("stages")
def test_a_stage_ends_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "STAGE_SECONDS", 0)
    assert run.main(["why", "--out", str(tmp_path)]) == 1
    assert "why: right: ran longer than the 0 s that it had" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_part_ends_with_the_command(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "benchmarks/gpu/run.py", "gate", "--out", str(tmp_path)]
    environment, printed = {**os.environ, "PYTHONPATH": str(run.ROOT)}, tmp_path / "gate_facts.txt"
    with subprocess.Popen(command, cwd=run.ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            while not (printed.exists() and printed.read_text()):
                assert process.poll() is None
                time.sleep(0.05)
            child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
            process.send_signal(number)
            assert process.wait(20 * PATIENCE) != 0
        finally:
            process.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_the_best_tiles_are_a_change_of_the_table() -> None:
    tiles = {"gemm": MatmulTile(1, 2, 3, 4, 5), "wgrad": MatmulTile(6, 7, 8, 9, 10)}
    before = parts.TABLE.read_text()
    lines = zip(before.splitlines(), parts.with_tiles(before, "sm_90", tiles).splitlines(), strict=True)
    changed = [new.strip() for old, new in lines if new != old]
    assert changed == ['"gemm": MatmulTile(1, 2, 3, 4, 5),', '"wgrad": MatmulTile(6, 7, 8, 9, 10),']


def test_the_best_tile_is_right_on_all_shapes() -> None:
    a, b, c = (MatmulTile(*numbers) for numbers in parts.CANDIDATES["gemm"][:3])
    assert parts.fastest([{a: 1.0, b: 3.0}, {a: 5.0, b: 1.0}]) == b
    assert parts.fastest([{a: 1.0, b: 2.0}, {b: 2.0, c: 1.0}]) == b
    assert parts.fastest([{a: 1.0}, {}]) is None


def test_wrong_tiles_are_no_change_of_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    found = iter([torch.ones(2)])  # then NaN
    monkeypatch.setattr(parts, "SHAPES", parts.SHAPES[:1])
    monkeypatch.setattr(parts, "expert_path", lambda shape: lambda: (next(found, torch.full((2,), torch.nan)),))
    monkeypatch.setattr(parts, "seconds", lambda *_: 1.0)
    parts.sweep()
    printed = capsys.readouterr().out
    assert "gemm | WRONG" in printed and "best, gemm | none is right on all shapes" in printed
    assert "MatmulTile" not in printed


def test_the_parts_run_files_that_exist() -> None:
    for stage in run.STAGES.values():
        for one in stage.values():
            files = [word for word in (*one.arguments, *one.rehearsal) if word.endswith(".py")]
            assert files and all((run.ROOT / file).is_file() for file in files)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_rehearsal_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "REHEARSAL", run.REHEARSAL * PATIENCE)
    assert run.main(["gate", "why", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
