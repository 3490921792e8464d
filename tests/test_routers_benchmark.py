"""The benchmark of routers: its arms have equal sizes, a run can be repeated, and its table shows what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import routers
from benchmarks.routers import ARMS, FULL, QUICK, configure, heldout_load, markdown
from equimoe.moe.plan import sizes

ENDED = {"facts": {"cpu": "a", "versions": {"torch": "2"}}, "command": "c", "seconds": 1, "cpu_seconds": 1}
RESULT = ENDED | {"load_before": 1, "load_after": 1, "settings": dict(vars(QUICK))}


@pytest.mark.parametrize("size", [FULL, QUICK])
def test_arms_have_equal_sizes(size: routers.Size) -> None:
    """Routers differ by a few rows; everything else is the same, as are the experts of a token, all together."""
    whole = {name: sizes(configure(arm, size, 1), 257) for name, arm in ARMS.items()}
    plain = whole["top-2"]
    for name, found in whole.items():
        assert found.total == pytest.approx(plain.total, rel=0.05), name
        assert name == "top-p" or found.active == pytest.approx(plain.active, rel=0.05), name
    configs = [configure(arm, size, 1) for arm in ARMS.values()]
    assert len({str((c.data, c.optim, c.steps, c.seed)) for c in configs}) == 1
    assert len({str((c.moe.router, c.moe.balance, c.moe.top_k, c.moe.capacity)) for c in configs}) == len(ARMS)


def test_a_run_is_measured_and_not_repeated(tmp_path: Path) -> None:
    size = replace(QUICK, steps=2, layers=1, heldout=1, bytes_per_domain=20_000)
    torch.set_num_threads(1)
    found = routers.run("base", size, 0, tmp_path)
    assert 5.0 < found["loss"] < 6.0 and found["load"] == 1.0 and found["step_ms"] > 0
    assert found["heldout_load"] >= 1.0 and found["divergence"] >= 0.0
    file = tmp_path / "base-0.json"
    file.write_text(json.dumps(found | {"loss": 7.0}))
    assert routers.run("base", size, 0, tmp_path)["loss"] == 7.0


def test_the_busiest_expert_is_that_of_all_domains() -> None:
    routing = {"a": [[0.5, 0.5, 0.0, 0.0]], "b": [[0.5, 0.0, 0.5, 0.0]]}
    assert heldout_load({"routing": routing}) == pytest.approx(2.0)


def test_the_table() -> None:
    rest = {"load": 1.5, "heldout_load": 1.25, "divergence": 0.1, "step_ms": 12.0}
    runs = [
        {"arm": arm, "seed": seed, "loss": 2.0 + seed, **rest} for seed in (0, 1) for arm in ("top-2", "expert-choice")
    ]
    text = markdown(RESULT | {"runs": runs})
    assert "| `top-2`: softmax, two experts, global-batch loss | 2.5000 \u00b1 0.7071 | 1.50 \u00b1 0.00 | 1.25" in text
    assert "| `expert-choice`: expert choice * | 2.5000" in text and "`hash`" not in text


def test_an_unknown_arm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        routers.main(["--arms", "nothing"])
    assert "--arms=nothing: choose from top-2" in capsys.readouterr().err
