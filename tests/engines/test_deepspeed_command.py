"""``python -m equimoe.launch.train --engine deepspeed``: the same run as with the engine of this package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="needs DeepSpeed, which `make engines` installs")
pytestmark = pytest.mark.engines

from equimoe.launch import env  # noqa: E402
from equimoe.launch.options import to_yaml  # noqa: E402
from equimoe.launch.recipes import RECIPES  # noqa: E402
from equimoe.moe.engines.deepspeed.config import check_degrees  # noqa: E402
from equimoe.moe.observe.metrics import read_records  # noqa: E402
from tests.helpers import small  # noqa: E402
from tests.helpers.command import Ended, Within, launch  # noqa: E402

Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())
    (tmp_path / "small.yaml").write_text(to_yaml(small.on(small.write_texts(tmp_path / "texts"), steps=4, ep=2)))

    (tmp_path / "whole.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')

    def command(folder: str, *options: str, world: int = 2, within: Within = nullcontext) -> Ended:
        base = ["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / folder)]
        return launch([*base, *options], world, cwd=tmp_path, timeout=100, within=within)

    return command


def losses(folder: Path) -> list[tuple[int, float, float]]:
    records = read_records(folder / "metrics.jsonl")
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if r["kind"] == "train"]


def test_one_process_needs_no_launcher(run: Run, tmp_path: Path) -> None:
    @contextmanager
    def alone() -> Iterator[None]:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        yield

    for folder, engine in (("torch", "torch"), ("alone", "deepspeed")):
        options = ["--engine", engine, "--parallel.ep", "1"]
        assert (ended := run(folder, *options, world=1, within=alone)).codes == [0], "\n".join(ended.err)
    for ours, theirs in zip(losses(tmp_path / "torch"), losses(tmp_path / "alone"), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_run_under_both_engines_and_on_from_one_to_the_other(run: Run, tmp_path: Path, dtype: str) -> None:
    for folder, options in (
        ("torch", []),
        ("zero 2", ["--engine", "deepspeed", "--deepspeed.zero_stage", "2"]),
        ("zero 3", ["--engine", "deepspeed", "--deepspeed.zero_stage", "3", "--deepspeed.config", "whole.json"]),
    ):
        assert (ended := run(folder, "--dtype", dtype, *options)).codes == [0, 0], "\n".join(ended.err)
    assert (ended := run("both", "--dtype", dtype, "--engine", "deepspeed", "--steps", "2")).codes == [0, 0], "\n".join(
        ended.err
    )
    assert (ended := run("both", "--dtype", dtype, "--resume")).codes == [0, 0], "\n".join(ended.err)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    expected = losses(tmp_path / "torch")
    assert [step for step, *_ in expected] == [1, 2, 3, 4]
    for folder in ("zero 2", "zero 3", "both"):
        for found, right in zip(losses(tmp_path / folder), expected, strict=True):
            if folder != "both" or dtype == "float32":
                assert found == pytest.approx(right, rel=tolerance), folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parallel.tp", "2"], "parallel.tp=2: the DeepSpeed engine splits data and experts only"),
        (["--deepspeed.zero_stage", "4"], "deepspeed.zero_stage=4: use 0, 1, 2 or 3"),
        (["--deepspeed.config", "none.json"], "deepspeed.config=none.json: cannot be read"),
        (["--parallel.ep", "3"], "parallel.ep=3"),
    ],
)
def test_what_cannot_be_is_one_line(run: Run, options: list[str], message: str) -> None:
    ended = run("run", "--engine", "deepspeed", *options)
    assert ended.codes == [env.CONFIG] * 2
    assert [line for line in ended.errors if line.startswith("error: ")] == [
        next(line for line in ended.errors if message in line)
    ]


def test_which_recipes_the_engine_holds() -> None:
    """The page of engines names them."""
    held = set()
    for name, recipe in RECIPES.items():
        with suppress(ValueError):
            check_degrees(recipe().degrees(1024 if name in ("deepseek_v3", "qwen3_235b") else 8))
            held.add(name)
    page = (Path(__file__).resolve().parents[2] / "docs" / "engines.md").read_text()
    (named,) = re.findall(r"whose mesh has data and expert parallelism only \(([^)]*)\)", page)
    assert held == set(re.findall(r"`(\w+)`", named))


@pytest.mark.timeout(220)
def test_deepspeeds_launcher_starts_our_command(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(to_yaml(small.on(small.write_texts(tmp_path / "texts"), steps=2, ep=2)))
    command = ["equimoe.launch.train", "--config", "small.yaml", "--run-dir", "run", "--engine", "deepspeed"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "DS_ACCELERATOR": "cpu"}
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank", "--module"]
    done = subprocess.run([sys.executable, *launcher, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2]
