"""The benchmark of upcycling: its arms start from the right weights, and its table shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import upcycling
from benchmarks.upcycling import ARMS, Size, markdown, run, run_dense

TINY = Size(
    dense_steps=4, steps=4, layers=1, hidden=16, width=16, experts=4, batch=8, heldout=2, bytes_per_domain=20_000
)


def test_every_arm_starts_from_its_weights(tmp_path: Path) -> None:
    run_dense(TINY, 0, tmp_path)
    end = json.loads((tmp_path / "dense.json").read_text())[-1]
    found = {name: run(name, TINY, 0, tmp_path)["evaluations"] for name in ("sparse", "drop")}
    start = {name: evaluations[0]["loss"] for name, evaluations in found.items()}
    assert start["sparse"] == pytest.approx(end["loss"], rel=1e-6) and start["drop"] != start["sparse"]
    for name, evaluations in found.items():
        assert [one["step"] for one in evaluations] == [0, 1, 2, 3, 4] and evaluations[-1]["loss"] != start[name]
        assert json.loads((tmp_path / f"{name}.result.json").read_text())["evaluations"] == evaluations


def test_arms_see_the_same_sequences_and_other_ones_than_the_dense_model() -> None:
    after = [upcycling.configure(TINY, seed, 4, dense, 1) for seed in (0, 1) for dense in (True, False)]
    before = [upcycling.configure(TINY, seed, 4, True, 0) for seed in (0, 1)]
    assert after[0].seed == after[1].seed and after[2].seed == after[3].seed
    assert len({config.seed for config in (*after, *before)}) == 4


def test_the_table_shows_means_and_differences_by_seed() -> None:
    losses = {"drop": ([3.0, 2.0, 1.5, 1.2, 1.0], [3.0, 2.0, 1.5, 1.2, 1.4]), "sparse": ([2.0] * 5, [1.2] * 5)}
    runs = [
        {"arm": arm, "seed": seed, "evaluations": [{"loss": loss, "divergence": 0.5} for loss in of_seed]}
        for arm, seeds in losses.items()
        for seed, of_seed in enumerate(seeds)
    ]
    facts = {"cpu": "a", "versions": {"torch": "2"}}
    rest = {"command": "c", "seconds": 1, "cpu_seconds": 1, "load_before": 1, "load_after": 1}
    text = markdown(
        {"runs": runs, "settings": {"dense_steps": 3, "steps": 4, "batch": 2, "seq_len": 5}, "facts": facts} | rest
    )
    (row,) = [line for line in text.splitlines() if line.startswith(f"| drop: {ARMS['drop'].label}")]
    assert row.split(" | ")[5] == "1.2000 \u00b1 0.2828" and row.endswith("0.500 \u00b1 0.000 |")
    (row,) = [line for line in text.splitlines() if line.startswith("| drop - sparse")]
    assert row.endswith("| -0.4000 \u00b1 0.8485 | 1 of 2 |")  # -1.0 and +0.2
    assert "scratch:" not in text and "30 tokens (bytes)" in text and "40 other tokens" in text


def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["--arms", "drop,wrong"], "--arms=wrong: choose from dense"),
        (["--steps", "3"], "--steps=3: give at least 4"),
    ):
        with pytest.raises(SystemExit):
            upcycling.main(argv)
        assert message in capsys.readouterr().err
