"""Benchmarks that cannot lie: planted faults, the code that is measured, and arguments that cannot work."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import options
import planted
import run

from tests.helpers.slow import slow_but

ROOT = Path(__file__).resolve().parents[1]
#: those that record the commit of their checkout
SCRIPTS = ("run", "bench_layer", "compile_gate", "estimators", "global_balance")
FAST = [
    ("kernels", "expert_mlp", "output NaN"),
    ("kernels", "expert_mlp", "gradient zero"),
    ("kernels", "expert_mlp", "doubled when timed"),
    ("kernels", "permute", "every third doubled"),
    ("kernels", "permute", "zeroes its input"),
    ("kernels", "combine", "another dtype"),
    ("kernels", "grouped_gemm", "gradient zero"),
    ("kernels", "topk_gate", "one row wrong"),
    ("kernels", "sort_by_expert", "output doubled"),
    ("kernels", "sort_by_expert", "raises when timed"),
    ("layer", "expert_mlp", "no gradient when timed"),
    ("layer", "expert_mlp", "every third doubled"),
    ("layer", "expert_mlp", "negates its input"),
]


@pytest.mark.parametrize(("suite", "op", "fault"), slow_but(FAST, list(planted.cases())))
def test_a_planted_fault_is_seen_and_has_no_figure(suite: str, op: str, fault: str) -> None:
    seen, line = planted.seen_by_run(suite, op, planted.FAULTS[fault])
    assert seen, line
    assert fault == "raises when timed" or "backend=torch, shape=tiny-b" in line


def test_without_a_fault_there_are_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([*planted.ARGUMENTS, "--suite", "kernels", "--out", str(tmp_path)]) == 0
    assert "| expert_mlp backward |" in capsys.readouterr().out


def script(name: str, *arguments: str, first: Path) -> subprocess.CompletedProcess[str]:
    """A script run from another folder, with ``first`` on the import path in front of everything."""
    environment = {**os.environ, "PYTHONPATH": str(first), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    return subprocess.run(command, cwd=first, env=environment, capture_output=True, text=True, timeout=100)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Another equimoe, whose import fails the script."""
    package = tmp_path / "equimoe"
    for name in ("moe", "kernels", "launch"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text("raise SystemExit('the installed equimoe is measured')")
    return tmp_path


@pytest.mark.parametrize("name", slow_but(["bench_layer"], list(SCRIPTS)))
def test_a_script_measures_its_own_checkout(name: str, installed: Path) -> None:
    if name == "compile_gate":
        pytest.importorskip("triton")
    done = script(name, "--help", first=installed)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stdout + done.stderr


def test_another_equimoe_that_is_imported_already_is_refused(installed: Path) -> None:
    code = f"import sys, types; m = types.ModuleType('equimoe'); m.__path__ = [{str(installed)!r}]; "
    code += f"sys.modules['equimoe'] = m; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import checkout"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1 and str(installed) in line and str(ROOT) in line


def refused(*arguments: str) -> str:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        run.main(["--device", "cpu", *arguments])
    (line,) = err.getvalue().strip().splitlines()
    assert stop.value.code == 2
    return line


@pytest.mark.parametrize("count", ["0", "-1", "many", str(options.CORES + 1)])
def test_a_number_of_threads_that_cannot_be_is_refused(count: str) -> None:
    assert "--threads" in refused("--threads", count)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        assert f"--out: {path}" in refused("--out", str(path))
    assert "--out: ''" in refused("--out", "")


def test_a_checkout_to_compare_with_must_be_one(tmp_path: Path) -> None:
    assert f"--against={tmp_path}" in refused("--against", str(tmp_path))


def test_the_hint_for_triton_on_a_cpu_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In bf16; what it names is run by the test below."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    line = refused("--backend", "triton", "--out", str(tmp_path))
    assert line.endswith("TRITON_INTERPRET=1 python benchmarks/run.py " + " ".join(HINT))


HINT = ["--device", "cpu", "--backend", "triton", "--suite", "kernels", "--shapes", "tiny-b"]


@pytest.mark.slow  # 10 seconds of interpreted kernels
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
def test_what_the_hint_says_works(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run.main([*HINT, "--threads", "1", "--out", str(tmp_path)]) == 0


def test_the_interpreter_rounds_to_bfloat16_as_torch_does() -> None:
    pytest.importorskip("triton")
    from equimoe.kernels._interpreter import round_to_bfloat16

    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-40, 1 + 2**-8, 1 + 3 * 2**-8]
    values = torch.cat([torch.tensor(special), torch.randn(10_000) * 10 ** torch.linspace(-40, 38, 10_000)])
    found = torch.from_numpy(round_to_bfloat16(values.numpy()).astype(np.int32)).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(found.isnan(), values.isnan())
    assert torch.equal(found[~values.isnan()], values.bfloat16()[~values.isnan()])
