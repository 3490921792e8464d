"""A small run on forked ranks, with faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from equimoe.launch.options import to_yaml
from equimoe.moe.train.config import CheckpointConfig
from tests.faults.inject import injected
from tests.helpers import small
from tests.helpers.command import Ended, Within, launch

Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the small run with faults, in ``folder`` of the test's folder."""
    monkeypatch.setattr("equimoe.launch.report.PLOTS", ())
    config = small.on(small.write_texts(tmp_path / "texts"), ep=2, steps=8, checkpoint=CheckpointConfig(4, 9))
    config = replace(config, parallel=replace(config.parallel, timeout_s=3.0))
    (tmp_path / "small.yaml").write_text(to_yaml(config))

    def command(
        *options: str, faults: str = "", folder: str = "run", world: int = 2, within: Within = nullcontext
    ) -> Ended:
        @contextmanager
        def both() -> Iterator[None]:
            with injected(faults, tmp_path / folder), within():
                yield

        base = ["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / folder)]
        base += [] if world > 1 else ["--parallel.ep", "1"]
        return launch([*base, *options], world, cwd=tmp_path, within=both)

    return command


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the options of a run of twelve steps on two ranks, which saves every five."""
    monkeypatch.setattr("equimoe.launch.report.PLOTS", ())
    config = small.on(small.write_texts(tmp_path / "texts"), ep=2, steps=12, checkpoint=CheckpointConfig(5, 9))
    config = replace(config, parallel=replace(config.parallel, timeout_s=20.0))
    (tmp_path / "small.yaml").write_text(to_yaml(config))
    return ["--config", str(tmp_path / "small.yaml")]
