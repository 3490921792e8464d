"""Checks how the report shows balance, stragglers and domains, also for runs that did not record them."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equimoe.launch.page import PLOTS
from equimoe.launch.records import Run
from equimoe.launch.routing_figures import draw_divergence, draw_losses, draw_scores, draw_straggler
from equimoe.moe.observe import divergences, mean_divergence
from tests.helpers.runs import made_up_run, observed
from tests.moe.test_report import NEWER, report, write_run


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures, for tests of the text."""
    monkeypatch.setattr(sys.modules["equimoe.launch.page"], "PLOTS", ())


def test_an_older_run_is_told_what_it_has_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = tuple(plot for plot in PLOTS if plot.id in NEWER)
    monkeypatch.setattr(sys.modules["equimoe.launch.page"], "PLOTS", plots)
    words = " ".join(report(tmp_path, made_up_run(steps=20, every=10, eval_every=20)).words.split())
    assert "The individual balance losses were not recorded." in words
    assert "sequences over which the balance loss counted its load was not recorded." in words
    assert "The load of the expert-parallel ranks was not recorded." in words
    assert "The times of the ranks have not been measured, which takes at least two of them." in words
    assert "The probability of the chosen experts was not recorded." in words
    assert "bits of divergence" not in words and "time spent waiting" not in words


def lines(drawn: Any, panel: int) -> dict[str, np.ndarray]:
    """Return a panel's labelled lines."""
    assert not isinstance(drawn, str), drawn
    found = drawn.panels[panel].axes[0].lines
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in found if line.get_label()[0] != "_"}


def test_losses_are_drawn_by_name(tmp_path: Path) -> None:
    records = observed(made_up_run(steps=40, every=5))
    train = [record for record in records if record["kind"] == "train"]
    drawn = draw_losses(Run.read(write_run(tmp_path, records)))
    shown = lines(drawn, 0)
    assert set(shown) == {"global", "micro (not trained on)", "balanced"}
    assert shown["global"] == pytest.approx([np.mean([row["losses"]["global"] for row in r["layers"]]) for r in train])
    added = lines(drawn, 1)
    assert added["z"] == pytest.approx([0.0001 * sum(5.0 + n for n in range(4))] * len(train))
    assert "global 1." in drawn.text and "z" not in drawn.text.split(":")[0]


def test_waiting_is_drawn_in_percent(tmp_path: Path) -> None:
    records = observed(made_up_run(steps=40, every=5))
    drawn = draw_straggler(Run.read(write_run(tmp_path, records)))
    assert lines(drawn, 0)["this run"] == pytest.approx([1.25] * 8)  # layers of 1.1, 1.2, 1.3, 1.4
    assert lines(drawn, 0)["this run, worst micro-batch"] == pytest.approx([1.8] * 8)
    assert lines(drawn, 0)["2 ranks, projected"] == pytest.approx([1.3] * 8)
    assert lines(drawn, 1)["this run"] == pytest.approx([10.0] * 8)  # a tenth of (0.1 + 0.2 + 0.3 + 0.4)
    assert lines(drawn, 1)["2 ranks, projected"] == pytest.approx([12.0] * 8)


def test_scores_have_their_reference_line(tmp_path: Path) -> None:
    records = observed(made_up_run(steps=40, every=5, eval_every=20))
    drawn = draw_scores(Run.read(write_run(tmp_path, records)))
    for panel in (0, 1):
        assert set(lines(drawn, panel)["uniform (2/8)"]) == {0.25}
    assert lines(drawn, 1)[" code"] == pytest.approx([0.4, 0.45, 0.5, 0.55])
    assert lines(drawn, 0)["mean of the layers"][-1] == pytest.approx(0.34)


@pytest.mark.parametrize("newer", [True, False])
def test_divergence_of_old_and_new_runs(tmp_path: Path, newer: bool) -> None:
    records = made_up_run(steps=40, every=5, eval_every=20)
    records = observed(records) if newer else records
    evals = [record for record in records if record["kind"] == "eval"]
    drawn = draw_divergence(Run.read(write_run(tmp_path, records)))
    want = np.array([mean_divergence(divergences(record["routing"])) for record in evals])
    for layer in range(4):
        assert lines(drawn, 0)[f"MoE layer {layer}"] == pytest.approx(want[:, layer])
        most = [np.mean([max(freq[layer]) for freq in record["routing"].values()]) for record in evals]
        assert lines(drawn, 1)[f"MoE layer {layer}"] == pytest.approx(most)
    assert not isinstance(drawn, str)
    bits_DD = np.asarray(drawn.panels[2].axes[0].images[0].get_array())
    assert bits_DD[0, 2] == bits_DD[2, 0] == pytest.approx(divergences(evals[-1]["routing"])["code", "tests"].mean())
    assert bits_DD[1, 1] == 0.0


_TOUCHED = {*NEWER, "divergence"}


@pytest.mark.slow
def test_bad_values_do_not_break_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one record holds bad values, the other records must still be drawn."""
    records = observed(made_up_run(steps=60, every=5, eval_every=20))
    fields = ("losses", "scaled_losses", "balance_sequences", "estimator_error", "straggler", "straggler_max")
    fields += (
        "busy_s",
        "waiting",
        "projected_straggler",
        "projected_waiting",
        "score_sum",
        "max_frequency",
        "divergence",
    )
    train = [record for record in records if record["kind"] == "train"]
    for number, bad in enumerate((None, math.nan, "word", [], {}, {"global": None}, {"2": "word"}, [None])):
        for record in (train[number], train[number]["layers"][1]):
            record.update({name: bad for name in fields if name in record})
        for record in records:
            if record["kind"] == "eval" and record["step"] == 40:
                record.update(score_sum=bad, divergence=bad, max_frequency=bad)
        run = Run.read(write_run(tmp_path, records))
        for plot in PLOTS:
            if plot.id in _TOUCHED:
                assert not isinstance(plot.draw(run), str), (plot.id, bad)
    last = [record for record in records if record["kind"] == "eval"][-1]
    last["routing"]["code"][2] = [math.nan] * 8
    last.update(score_sum={"code": None, "docs": [math.nan, 0.5, "word", 0.4]}, divergence=[None] * 4)
    monkeypatch.setattr(sys.modules["equimoe.launch.page"], "PLOTS", tuple(p for p in PLOTS if p.id in _TOUCHED))
    page = report(tmp_path, records)
    assert set(page.figures) == _TOUCHED
    assert all(figure["panels"] for figure in page.figures.values())


def test_cards_of_balance(tmp_path: Path, no_plots: None) -> None:
    words = " ".join(report(tmp_path, observed(made_up_run(steps=40, every=5, eval_every=20))).words.split())
    assert "10sequences over which the load is counted" in words
    assert "1.25busiest rank / mean, in a micro-batch" in words
    assert "10.0% of a step's time spent waiting (estimate)" in words
    evals = [record for record in observed(made_up_run(steps=40, every=5, eval_every=20)) if record["kind"] == "eval"]
    assert f"{np.mean(evals[-1]['divergence']):.3f}bits of divergence between domains" in words
