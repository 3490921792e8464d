"""Checks the report of a run: one file, with a picture or a sentence for every figure."""

from __future__ import annotations

import base64
import errno
import io
import os
import re
import runpy
import sys
import warnings
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from equimoe.launch.figures import draw_load, draw_loss
from equimoe.launch.page import PLOTS
from equimoe.launch.panels import RC, Drawn
from equimoe.launch.records import Run
from equimoe.launch.report import main, write_report
from equimoe.launch.text import counted
from equimoe.moe.observe import step_record
from equimoe.moe.observe.metrics import to_line
from tests.helpers.runs import made_up_run, observed
from tests.helpers.slow import slow_but

IDS = ["loss", "domain-loss", "speed", "balance", "evenness", "losses", "estimator", "straggler", "ranks", "load"]
IDS += ["routing", "divergence", "scores", "optimizer"]
#: figures that need records which older runs do not have
NEWER = {"losses", "estimator", "straggler", "ranks", "scores"}
VOID = ("meta", "img", "link")


class Page(HTMLParser):
    """The parsed page: drawings, words and text of each figure, why figures are left out, and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.figures: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        self.current = self.item = ""
        self.addresses: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == [], "tags that are never closed"

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.note(tag, dict(attributes))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.note(tag, dict(attributes))

    def note(self, tag: str, values: dict[str, str | None]) -> None:
        self.addresses += [values[name] or "" for name in ("src", "srcset", "href", "xlink:href") if name in values]
        if tag == "figure":
            self.current = values["id"] or ""
            self.figures[self.current] = {"panels": 0, "marks": 0, "alt": "", "text": "", "images": []}
        figure = self.figures.get(self.current)
        if tag == "li":
            self.item = values["id"] or ""
            self.left_out[self.item] = ""
        if figure is not None:
            figure["panels"] += tag == "svg"
            figure["marks"] += tag in ("path", "use", "text")
            figure["alt"] = values.get("aria-label") or figure["alt"]
            figure["images"] += [values["xlink:href"]] if tag == "image" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "figure":
            self.current = ""
        if tag == "li":
            self.item = ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.words += data
        if self.current:
            self.figures[self.current]["text"] += data
        if self.item:
            self.left_out[self.item] += data


def decode(address: str) -> np.ndarray:
    head, _, data = address.partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=False)))
    image.load()
    return np.asarray(image.convert("RGBA"))


def write_run(run_dir: Path, records: list[dict[str, Any]], tail: bytes = b"") -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_bytes(b"".join(map(to_line, records)) + tail)
    return run_dir


def report(run_dir: Path, records: list[dict[str, Any]], tail: bytes = b"") -> Page:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_report(write_run(run_dir, records, tail))
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def draw_all(run: Run, names: Sequence[str] = IDS) -> dict[str, str | Drawn]:
    """Return the figures, or the sentences in their place, as the page shows them. Faster than writing a page."""
    found: dict[str, str | Drawn] = {}
    with warnings.catch_warnings(), matplotlib.rc_context(RC | {"savefig.dpi": 30}):
        warnings.simplefilter("error")
        for plot in (plot for plot in PLOTS if plot.id in names):
            found[plot.id] = drawn = plot.draw(run)
            for panel in [] if isinstance(drawn, str) else drawn.panels:
                panel.savefig(io.BytesIO())
    return found


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures, for tests of the text."""
    monkeypatch.setattr(sys.modules["equimoe.launch.page"], "PLOTS", ())


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("report") / "my-run"
    report(run_dir, observed(made_up_run(steps=300, every=10)))
    return run_dir / "report.html"


@pytest.fixture(scope="module")
def page(page_file: Path) -> Page:
    return Page(page_file.read_text(encoding="utf-8"))


def test_every_figure_is_there_with_words(page: Page) -> None:
    assert list(page.figures) == IDS == [plot.id for plot in PLOTS]
    for plot in PLOTS:
        figure = page.figures[plot.id]
        assert plot.title in figure["text"]
        assert plot.caption[:40] in figure["text"]
        assert len(figure["alt"]) > 30
        assert figure["panels"] >= 1 and figure["marks"] > 25 * figure["panels"]


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "loss": ("training", "held-out text", "bigram table (2.45)", "loss (nats per token)"),
        "domain-loss": (" code", " docs", " tests"),
        "speed": ("tokens per second and device", "% of the dense bf16 peak", "GiB"),
        "balance": ("MoE layer 0", "MoE layer 3", "mean of the layers", "worst layer"),
        "evenness": ("coefficient of variation", "MoE layer 2", "experts without a token"),
        "estimator": ("balance batch size", "error of the loss's gradient", "MoE layer 1"),
        "divergence": ("MoE layer 3", "uniform use", "code"),
        "optimizer": ("gradient norm", "clipped at 1", "learning rate"),
    }.items(),
)
def test_words_of_figures_are_text(page: Page, name: str, words: Sequence[str]) -> None:
    assert [word for word in words if word not in page.figures[name]["text"]] == []


@pytest.mark.parametrize("name", ["load", "routing", "ranks"])
def test_heat_maps_have_colours(page: Page, name: str) -> None:
    images = [decode(address) for address in page.figures[name]["images"]]
    assert len(images) == (1 if name == "ranks" else 4)
    for pixels in images:
        shown = pixels[pixels[..., 3] > 200][:, :3].astype(int)
        assert len(shown) > 5000
        assert (shown.max(0) - shown.min(0)).max() > 60, "more than one colour"


def test_the_page_asks_for_nothing_outside(page: Page) -> None:
    assert all(address.startswith(("data:image/png", "#")) for address in page.addresses)


def test_a_page_is_small(page_file: Path) -> None:
    assert page_file.stat().st_size < 400_000


@pytest.mark.slow
def test_the_page_of_a_large_run_is_small(tmp_path: Path) -> None:
    domains = tuple(f"domain {i}" for i in range(12))
    records = made_up_run(steps=3000, every=10, experts=64, layers=48, eval_every=500, domains=domains)
    path = write_report(write_run(tmp_path, observed(records)))
    assert path.stat().st_size < 1_000_000


def test_colours_follow_the_screen(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    used = set(re.findall(r"var\(--(\w+)\)", text))
    light, dark = (re.search(mode + r"[^}]*?:root \{([^}]*)\}", text, re.DOTALL) for mode in ("", "scheme: dark"))
    assert light is not None and dark is not None
    for name in used:
        assert f"--{name}: " in light[1] and f"--{name}: " in dark[1]
    assert not re.search("#24292f|#8a929b|#e3e6ea", re.sub("<style>.*?</style>", "", text, count=1, flags=re.DOTALL))


def test_legends_stand_below_the_curves(tmp_path: Path) -> None:
    """In a run of two records, too, where a curve may be anywhere."""
    records = observed(made_up_run(steps=10, every=5, eval_every=10))
    found = draw_all(Run.read(write_run(tmp_path, records)))
    legends = 0
    for drawn in found.values():
        assert isinstance(drawn, Drawn), drawn
        for panel in drawn.panels:
            for legend in panel.legends:
                legends += 1
                assert legend.get_window_extent().y1 <= panel.axes[0].get_window_extent().y0
                assert legend.get_window_extent().x1 <= panel.bbox.x1 + 40
    assert legends > 12


def test_the_summary_says_the_numbers(tmp_path: Path, no_plots: None) -> None:
    records = made_up_run(steps=300, every=5)
    words = " ".join(report(tmp_path, records).words.split())
    last = [record for record in records if record["kind"] == "eval"][-1]
    train = [record for record in records if record["kind"] == "train"]
    assert f"{last['loss']:.3f}" in words
    assert f"{np.mean([record['loss'] for record in train[-3:]]):.3f}training loss at the end" in words
    assert f"{last['loss'] - 2.45:+.2f}nats relative to the bigram table" in words
    assert f"{np.median([record['tokens_per_s'] for record in train[1:]]):,.0f}tokens per second" in words
    assert "1 of 32dead experts at the end" in words
    assert f"code{last['domains']['code']['loss']:.3f}2.300" in words
    assert "step 300 of 300 | 1.23M tokens | 4m 06s | 2 processes" in words
    assert "num_experts 8" in words and "torch 2.13.0" in words and "parameters 5.3M" in words


MISSING: dict[str, tuple[list[dict[str, Any]], set[str]]] = {
    "an older run": (made_up_run(steps=40, eval_every=20), NEWER),
    "an older run, and its resume": (
        made_up_run(steps=40, eval_every=20) + observed(made_up_run(steps=80, eval_every=20)[12:]),
        set(),
    ),
    "no evaluation": (observed(made_up_run(steps=40, eval_every=0)), {"routing", "divergence"}),
    "one domain": (
        observed(made_up_run(steps=40, eval_every=20, domains=("all of it",))),
        {"divergence", "domain-loss"},
    ),
    "no MoE layer": (
        observed(made_up_run(steps=40, eval_every=20, layers=0)),
        {"balance", "evenness", "load", "routing", "divergence", *NEWER},
    ),
    "only the beginning": (made_up_run()[:1], set(IDS)),
    "one step": (observed(made_up_run(steps=5)), {"routing", "divergence"}),
    "no run record": (observed(made_up_run(steps=40, eval_every=20))[2:], set()),
    "only an evaluation": (
        observed(made_up_run(steps=5, eval_every=5))[-1:],
        {"balance", "evenness", "losses", "estimator", "straggler", "ranks", "load", "optimizer", "speed"},
    ),
}


#: each figure is missing for at least one of these runs
FAST = ("no MoE layer", "only the beginning")


@pytest.mark.parametrize("case", slow_but(FAST, MISSING))
def test_missing_parts_are_said_in_a_sentence(case: str, tmp_path: Path) -> None:
    records, missing = MISSING[case]
    found = draw_all(Run.read(write_run(tmp_path, records)))
    assert {name for name, drawn in found.items() if isinstance(drawn, str)} == missing
    assert all(re.fullmatch(r"[A-Z].{20,}[a-z]\.", drawn) for drawn in found.values() if isinstance(drawn, str))


def test_a_page_with_nothing_to_draw(tmp_path: Path) -> None:
    page = report(tmp_path, made_up_run()[:1])
    assert page.figures == {} and list(page.left_out) == IDS
    assert "no training step yet" in page.words
    assert "There is no evaluation yet." in page.words
    assert page.left_out["loss"] == "Loss: There is no loss yet: no training step has been recorded."


def test_figures_with_nothing_to_say_are_left_out(tmp_path: Path, no_plots: None) -> None:
    """A run of one micro-batch on one rank, with experts that all get tokens, and one domain."""
    records = observed(made_up_run(steps=40, every=5, eval_every=20, domains=("all of it",)))
    for record in records:
        for layer in record.get("layers") or []:
            exact = {"balance_sequences": 16.0, "estimator_error": 0.0, "gradient_error": 0.0, "dead": 0}
            layer.update(exact, straggler=1.0, straggler_max=1.0, projected_straggler={})
            layer["losses"] = dict.fromkeys(("global", "micro"), layer["balance"])
        if record.get("layers"):
            record.update(step_record(record["layers"], 0.1), projected_straggler={}, busy_s=[])
    run = Run.read(write_run(tmp_path, records))
    found = draw_all(run)
    assert {name for name, drawn in found.items() if isinstance(drawn, str)} == {
        "domain-loss", "estimator", "straggler", "ranks", "divergence",
    }  # fmt: skip
    assert "exact load of the whole step, 16 sequences" in str(found["estimator"])
    titles = {name: [panel.axes[0].get_title(loc="left") for panel in found[name].panels] for name in IDS
              if not isinstance(found[name], str)}  # type: ignore[union-attr]  # fmt: skip
    assert titles["evenness"] == ["coefficient of variation", "entropy"]
    shown = [line.get_label() for line in found["losses"].panels[0].axes[0].lines]  # type: ignore[union-attr]
    assert shown == ["global", "balanced"]
    words = " ".join(report(tmp_path, records).words.split())
    assert "busiest rank / mean" not in words and "time spent waiting" not in words


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path, no_plots: None) -> None:
    records = made_up_run(steps=400, every=5)
    train = [record for record in records if record["kind"] == "train"]
    for record in train[20:30]:
        lost = dict.fromkeys(record["domain_loss"], float("nan"))
        record.update(loss=float("nan"), grad_norm=float("inf"), domain_loss=lost)
    run = Run.read(write_run(tmp_path, records))
    found = draw_all(run, ["loss", "domain-loss", "optimizer"])
    assert not any(isinstance(drawn, str) for drawn in found.values())
    drawn = found["loss"]
    assert isinstance(drawn, Drawn)
    losses = np.asarray(drawn.panels[0].axes[0].lines[0].get_ydata(), float)
    assert list(np.flatnonzero(np.isnan(losses))) == list(range(20, 30))
    assert "10 records with numbers that are not finite" in report(tmp_path, records).words


def test_names_of_domains_cannot_break_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = tuple(plot for plot in PLOTS if plot.id in ("domain-loss", "routing"))
    monkeypatch.setattr(sys.modules["equimoe.launch.page"], "PLOTS", plots)
    domains = ("<b>&", "_hidden", "$x^{$", "\u65e5\u672c", 'a"quote', "x" * 90)
    page = report(tmp_path, made_up_run(steps=20, every=5, eval_every=10, domains=domains))
    for domain in domains:
        assert domain in page.words
        assert all(domain in figure["alt"] for figure in page.figures.values())


def test_a_half_written_last_line_is_no_matter(tmp_path: Path, no_plots: None) -> None:
    page = report(tmp_path, made_up_run(steps=20, eval_every=0), tail=b'{"kind": "train", "step": 25, "lo')
    assert "step 20 of 20" in page.words


def test_many_layers_and_experts_stay_readable(tmp_path: Path) -> None:
    records = made_up_run(steps=50, every=5, experts=64, layers=20, eval_every=50)
    run = Run.read(write_run(tmp_path, records))
    for name in ("load", "routing"):
        drawn = draw_all(run, [name])[name]
        assert isinstance(drawn, Drawn)
        titles = [panel.axes[0].get_title(loc="left") for panel in drawn.panels]
        assert titles == [f"MoE layer {i}" for i in (0, 3, 5, 8, 11, 14, 16, 19)]
        assert "8 of the 20 layers" in drawn.text
    named = draw_all(run, ["balance"])["balance"]
    assert isinstance(named, Drawn)
    assert [line.get_label() for line in named.panels[0].axes[0].lines][:2] == ["MoE layer 0", "MoE layer 3"]


def test_the_heat_map_shows_the_load(tmp_path: Path) -> None:
    records = made_up_run(steps=2000, every=5, layers=1, eval_every=0)  # 400 records: two for each column
    drawn = draw_load(Run.read(write_run(tmp_path, records)))
    assert not isinstance(drawn, str)
    mesh = drawn.panels[0].axes[0].collections[0]
    counts_NE = np.array([record["layers"][0]["counts"] for record in records[2:]], float)
    pairs_NE = counts_NE.reshape(200, 2, 8).sum(axis=1)
    ratio_NE = pairs_NE / pairs_NE.mean(axis=1, keepdims=True)
    expected = np.clip(np.log2(np.maximum(ratio_NE, 1e-9)), -2, 2)
    np.testing.assert_allclose(mesh.get_array().reshape(8, 200), expected.T)
    corners = mesh.get_coordinates()
    assert (corners[0, 0, 0], corners[0, 1, 0], corners[0, -1, 0]) == (0, 10, 2000)


def test_a_resumed_run_is_drawn_once(tmp_path: Path) -> None:
    records = made_up_run(steps=20, every=5, eval_every=0)
    again = [{**record, "loss": 9.0} for record in records if record.get("step") == 20]
    run = Run.read(write_run(tmp_path, records + again))
    drawn = draw_loss(run)
    assert not isinstance(drawn, str)
    steps, losses = drawn.panels[0].axes[0].lines[0].get_data()
    assert list(steps) == [5, 10, 15, 20]
    assert losses[-1] == 9.0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = write_run(tmp_path / "run", made_up_run()[:1])
    assert main([str(run_dir)]) == 0
    assert capsys.readouterr().out == f"report: {run_dir / 'report.html'}\n"
    for arguments, code in ((["--help"], 0), ([], 64), (["--quick"], 64), (["a", "--port", "x"], 64)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
    capsys.readouterr()
    assert main([str(tmp_path / "none")]) == 66
    error = capsys.readouterr().err
    assert error == (
        f"report: {tmp_path / 'none' / 'metrics.jsonl'}: cannot be read (No such file or directory); "
        "give the folder of a run\n"
    )
    assert main([str(write_run(tmp_path / "empty", []))]) == 66
    assert "has no records yet" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = write_run(tmp_path, made_up_run()[:1])
    (run_dir / "report.html").write_text("old")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert main([str(run_dir)]) == 73
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert (run_dir / "report.html").read_text() == "old"
    assert sorted(path.name for path in run_dir.iterdir()) == ["metrics.jsonl", "report.html"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_it_runs_as_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("equimoe.launch.report", run_name="__main__")
    assert stop.value.code == 66
    error = capsys.readouterr().err
    assert error.startswith("report: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (1, "rank", "1 rank"),
        (0, "rank", "0 ranks"),
        (1000, "process", "1,000 processes"),
        (2, "micro-batch", "2 micro-batches"),
    ],
)
def test_counts_with_nouns(count: int, noun: str, text: str) -> None:
    assert counted(count, noun) == text
