"""A small run on forked ranks, with faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from equimoe.launch.options import to_yaml
from equimoe.moe.train.config import CheckpointConfig
from tests.faults.agents import losses
from tests.faults.inject import injected
from tests.helpers import small
from tests.helpers.command import Ended, Within, launch

Run = Callable[..., Ended]


def write_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout_s: float = 60.0, **how: Any) -> list[str]:
    """Write the small run's configuration, changed by ``how``; return the option that names it."""
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())
    config = small.on(small.write_texts(tmp_path / "texts"), **how)
    config = replace(config, parallel=replace(config.parallel, timeout_s=timeout_s))
    (tmp_path / "small.yaml").write_text(to_yaml(config))
    return ["--config", str(tmp_path / "small.yaml")]


def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Run:
    """Return a function that runs the small run, changed by ``how``, in folder ``run`` of the test's folder."""
    base = [*write_config(tmp_path, monkeypatch, **how), "--run-dir", str(tmp_path / "run")]

    def run(*options: str, world: int = 1, within: Within = nullcontext) -> Ended:
        return launch([*base, *options], world, cwd=tmp_path, within=within)

    return run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the small run with faults, in ``folder`` of the test's folder."""
    config = write_config(tmp_path, monkeypatch, 20.0, ep=2, steps=8, checkpoint=CheckpointConfig(4, 9))

    def command(
        *options: str, faults: str = "", folder: str = "run", world: int = 2, within: Within = nullcontext
    ) -> Ended:
        @contextmanager
        def both() -> Iterator[None]:
            with injected(faults, tmp_path / folder), within():
                yield

        base = [*config, "--run-dir", str(tmp_path / folder)]
        base += [] if world > 1 else ["--parallel.ep", "1"]
        return launch([*base, *options], world, cwd=tmp_path, within=both)

    return command


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Return the options of a run of twelve steps on two ranks, which saves every five."""
    how: dict[str, Any] = {"ep": 2, "steps": 12, "checkpoint": CheckpointConfig(5, 9)}
    with pytest.MonkeyPatch.context() as patch:
        yield write_config(tmp_path_factory.mktemp("options"), patch, 20.0, **how)


@pytest.fixture(scope="module")
def straight(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Return the losses of the run with these options that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    assert launch([*options, "--run-dir", str(run_dir)], 2, timeout=300).codes == [0, 0]
    return losses(run_dir)
