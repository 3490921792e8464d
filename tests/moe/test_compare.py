"""Checks the page that compares several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equimoe.launch.compare import PLOTS, read_runs
from equimoe.launch.panels import Drawn, draw
from equimoe.launch.report import main
from tests.helpers.runs import made_up_run, observed
from tests.moe.test_report import Page, write_run


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two runs with MoE layers, of which one has other settings, speed and steps, and an older one without layers."""
    first = observed(made_up_run(steps=100, every=5, eval_every=50))
    second = observed(made_up_run(steps=60, every=5, eval_every=20))
    for record in second:
        if record["kind"] == "run":
            record["config"]["optim"]["lr"] = 0.125
            record["config"]["data"]["seq_len"] = 512
        if record["kind"] == "train":
            record.update(tokens=record["tokens"] * 2, tokens_per_s=9000.0, mfu=0.5, loss=record["loss"] - 0.5)
    third = made_up_run(steps=100, every=10, layers=0)
    return [write_run(tmp_path / n, r) for n, r in (("one", first), ("two", second), ("<i>three", third))]


def drawn(folders: list[Path]) -> dict[str, Drawn]:
    runs = read_runs(folders)
    found: dict[str, Any] = {plot.id: draw(plot, runs) for plot in PLOTS}
    assert all(isinstance(each, Drawn) for each in found.values()), found
    return found


def lines(panel: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {line.get_label(): line.get_data() for line in panel.axes[0].lines if line.get_label()[0] != "_"}
    bars = {bar.get_label(): bar.lines[0].get_data() for bar in panel.axes[0].containers}
    return found | bars


def test_runs_share_panels(folders: list[Path]) -> None:
    found = drawn(folders)
    training, heldout = (lines(panel) for panel in found["loss"].panels)
    assert set(training) == {"one", "two", "<i>three"}
    tokens, losses = training["two"]
    run = read_runs(folders)[1]
    assert list(tokens) == [2 * 4096 * step for step in range(5, 61, 5)]
    assert list(losses) == [record["loss"] for record in run.train]
    assert set(heldout) == {"one", "two", "<i>three"}
    assert list(heldout["two"][0]) == [2 * 4096 * step for step in (20, 40, 60)]
    balance, busiest = (lines(panel) for panel in found["load"].panels)
    assert set(balance) == set(busiest) == {"one", "two"}
    titles = [panel.axes[0].get_title(loc="left") for panel in found["speed"].panels]
    assert titles == ["tokens per second", "TFLOP/s", "MFU", "memory"]
    assert set(lines(found["speed"].panels[0])["two"][1]) == {9000.0}
    assert "training loss: one " in found["loss"].text


def test_the_command_writes_one_page(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(folder) for folder in folders]) == 0
    assert capsys.readouterr().out == "report: comparison.html\n"
    page = Page(Path("comparison.html").read_text())
    assert list(page.figures) == ["loss", "load", "speed"] and not page.left_out
    assert "<i>three" in page.words and all("<i>three" in page.figures[name]["text"] for name in ("loss", "speed"))
    words = " ".join(page.words.split())
    settings = words[words.index("Settings that differ") :]
    assert "optim.lr0.0030.1250.003" in settings and "data.seq_len256512256" in settings
    assert "moe.top_k" not in settings, "equal settings are left out"
    assert "9,00050.0 %" in words[words.index("Results") : words.index("Settings that differ")]
    assert Path("comparison.html").stat().st_size < 300_000
    assert main([*map(str, folders[:2]), "--out", "pages.html"]) == 0
    assert Path("pages.html").exists()


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "run", made_up_run(steps=10)) for name in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_a_run_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_run(tmp_path / "good", made_up_run(steps=10))
    assert main([str(good), str(tmp_path / "none")]) == 66
    assert f"report: {tmp_path / 'none' / 'metrics.jsonl'}: cannot be read" in capsys.readouterr().err


def test_runs_with_nothing_to_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [write_run(tmp_path / name, made_up_run()[:1]) for name in ("a", "b")]
    assert main([str(folder) for folder in folders]) == 0
    page = Page(Path("comparison.html").read_text())
    assert set(page.left_out) == {"loss", "load", "speed"} and "All are the same." in page.words
