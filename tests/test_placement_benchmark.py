"""The benchmark of placement: its arms differ only in what they compare, and its table shows what was measured."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from benchmarks import placement
from benchmarks.placement import ARMS, BALANCE, QUICK, draw, markdown, measured, options
from equimoe.launch.options import parse

ENDED = {"facts": {"cpu": "a", "versions": {"torch": "2"}}, "command": "c", "seconds": 1, "cpu_seconds": 1}
RESULT = ENDED | {"load_before": 1, "load_after": 1, "settings": dict(vars(QUICK))}


def test_arms_differ_in_balance_and_placement_alone() -> None:
    configs = {name: parse([*options(QUICK, 3), *arm]).config for name, arm in ARMS.items()}
    for balance, how in product(BALANCE, ("-fssdp", "-fssdp-moved")):
        plain, replicated = configs[balance], configs[balance + how]
        assert plain.moe == replicated.moe and plain.data == replicated.data and plain.optim == replicated.optim
        assert (plain.parallel.experts, replicated.parallel.experts) == ("ep", "fssdp")
    assert {config.seed for config in configs.values()} == {3}
    assert len({str(config.moe.balance) for config in configs.values()}) == len(BALANCE)


def test_the_second_half_of_a_run_is_measured(tmp_path: Path) -> None:
    records = [
        {"kind": "train", "step": step, "straggler": 1.0 + step, "replicated_straggler": 1.0, "copied_bytes": 8}
        for step in (2, 4, 6, 8, 10, 12)
    ]
    records.append({"kind": "eval", "step": 12, "loss": 2.5, "divergence": [0.1, 0.3]})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    found = measured(tmp_path, QUICK)
    assert found["straggler"] == 11.0 and found["loss"] == 2.5 and found["divergence"] == pytest.approx(0.2)
    assert found["replicated_straggler"] == 1.0 and found["copied_bytes"] == 8 and "forecast_error" not in found
    assert [point[0] for point in found["curve"]] == [2, 4, 6, 8, 10, 12]


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    rest = {"divergence": 0.1, "straggler": 2.0, "curve": [[1, 2.0, 1.5], [2, 2.0, 1.25]]}
    runs = [
        {"arm": arm, "seed": seed, "loss": loss + seed, **rest, **more}
        for seed in (0, 1)
        for arm, loss, more in (("global", 1.0, {}), ("global-fssdp", 1.0001, {"replicated_straggler": 1.3}))
    ]
    text = markdown(RESULT | {"runs": runs})
    assert "| global | 1.5000 \u00b1 0.7071 |" in text and "| global-fssdp | +0.0001 | +0.0001 |" in text
    assert "1.300 \u00b1 0.000" in text and "micro-fssdp" not in text
    draw({"runs": runs}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_loads_that_flip_need_calibration() -> None:
    found = {name: sum(curve) / len(curve) for name, curve in placement.flipping().items()}
    assert found["FSSDP"] > 0.9 * found["expert parallel"] and found["FSSDP, calibrated"] < 1.2


def test_a_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARMS, "wrong", ["--moe.top_k=99"])
    with pytest.raises(RuntimeError, match="wrong, seed 0: exit code 64(.|\n)*moe.top_k=99"):
        placement.run("wrong", QUICK, 0, tmp_path)


def test_an_unknown_arm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        placement.main(["--arms", "nothing"])
    assert "--arms=nothing: choose from micro" in capsys.readouterr().err
