"""Tests that benchmarks detect planted faults, measure their own checkout, and refuse wrong arguments."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import planted, run
from benchmarks.balance import scenarios
from benchmarks.parallel import parity
from benchmarks.shared import options
from tests.helpers.command import Ended, launch
from tests.helpers.slow import slow_but

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(
    path.relative_to(BENCHMARKS).as_posix()
    for path in BENCHMARKS.rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
FAST = [
    ("kernels", "expert_mlp", "output NaN"),
    ("kernels", "expert_mlp", "gradient zero"),
    ("kernels", "expert_mlp", "doubled when timed"),
    ("kernels", "permute", "every third doubled"),
    ("kernels", "permute", "zeroes its input"),
    ("kernels", "combine", "another dtype"),
    ("kernels", "grouped_gemm", "gradient zero"),
    ("kernels", "router_logits", "gradient zero"),
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


def script(name: str, *arguments: str, first: Path) -> Ended:
    """Run a script in the folder ``first``, which also comes first on the import path, in a fork with torch."""

    def main(argv: list[str]) -> None:
        ours = ("equimoe", "benchmarks", "tests", "checkout")
        for module in [module for module in sys.modules if module.partition(".")[0] in ours]:
            del sys.modules[module]
        there = BENCHMARKS / name
        sys.argv = [str(there), *argv]
        sys.path[:] = [str(there.parent), str(first), *(path for path in sys.path if path not in ("", str(ROOT)))]
        runpy.run_path(str(there), run_name="__main__")

    return launch(list(arguments), cwd=first, main=main)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Install packages of the same names, whose import makes a script fail."""
    for name in ("equimoe/moe", "equimoe/kernels", "equimoe/launch", "benchmarks", "tests"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('an installed package is imported')")
    return tmp_path


def test_all_scripts_are_found() -> None:
    assert {"run.py", "planted.py", "kernels/compile_gate.py", "balance/scenarios.py", "parallel/parity.py"} < {
        *SCRIPTS
    }


@pytest.mark.parametrize("name", slow_but(["layer/bench_layer.py", "parallel/parity.py"], SCRIPTS))
def test_a_script_measures_its_own_checkout(name: str, installed: Path) -> None:
    if name in ("planted.py", "kernels/compile_gate.py"):
        pytest.importorskip("triton")
    ended = script(name, "--help", first=installed)
    assert ended.codes == [0] and "usage:" in ended.out[0], ended


def test_another_equimoe_that_is_imported_already_is_refused(installed: Path) -> None:
    code = f"import sys, types; m = types.ModuleType('equimoe'); m.__path__ = [{str(installed)!r}]; "
    code += f"sys.modules['equimoe'] = m; sys.path.insert(0, {str(BENCHMARKS)!r}); import checkout"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
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


@pytest.mark.parametrize(
    ("main", "arguments"),
    [(parity.main, ["no-such"]), (scenarios.main, ["no-such"]), (planted.main, ["--only", "no-such"])],
)
def test_a_choice_of_nothing_is_refused(
    main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "no-such" in line


def test_a_checkout_to_compare_with_must_be_one(tmp_path: Path) -> None:
    assert f"--against={tmp_path}" in refused("--against", str(tmp_path))


def test_the_hint_for_triton_on_a_cpu_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The next test runs the command in this hint."""
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
