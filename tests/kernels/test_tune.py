"""The measurement that writes the table of "auto", on tiny inputs under the interpreter, with times that are given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.kernels import tune
from benchmarks.shared.shapes import Shape
from equimoe.kernels import auto

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="takes the place of a GPU by the CPU")


def test_without_a_gpu_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--out", str(tmp_path / "auto.json")]) == 1
    assert "no GPU" in capsys.readouterr().out and not (tmp_path / "auto.json").exists()


@pytest.fixture(name="out")
def _out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    out = tmp_path / "auto.json"
    out.write_text(json.dumps({"sm_80": {"kept": "torch"}}))
    monkeypatch.setattr(tune, "SHAPES", (Shape("few", 8, 16, 24, 4, 2),))
    monkeypatch.setattr(tune, "FLOATS", (torch.bfloat16,))
    monkeypatch.setattr(tune, "OPS", {op: (dtypes[:1], others) for op, (dtypes, others) in tune.OPS.items()})
    monkeypatch.setattr(tune, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(auto, "_works", lambda op, backend, dtype, device: op != "permute")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "device", lambda *_: CPU)
    return out


def test_the_fastest_right_backend_of_each_case_is_written(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def seconds(run, backend: str, timer: object) -> float:  # noqa: ANN001
        run(backend)
        ran.append(backend)
        return {"torch": 2.0, "hybrid": 1.0, "triton": 3.0 if len(ran) % 2 else 1.5}[backend]

    monkeypatch.setattr(tune, "seconds", seconds)
    assert tune.main(["--out", str(out)]) == 0
    table = json.loads(out.read_text())
    assert table["sm_80"] == {"kept": "torch"} and set(ran) == {"torch", "hybrid", "triton"}
    assert table["sm_90"]["permute bfloat16 few"] == "torch" and table["sm_90"]["expert_mlp bfloat16 few"] == "hybrid"
    assert set(table["sm_90"]) == {auto.key(op, dtypes[0], False) for op, (dtypes, _) in tune.OPS.items()}


def test_what_fails_or_ends_early_costs_only_itself(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [auto.key(op, dtypes[0], False) for op, (dtypes, _) in tune.OPS.items()]

    def seconds(run, backend: str, timer: object) -> float:  # noqa: ANN001
        if backend == "hybrid":
            raise torch.OutOfMemoryError("no memory")
        if cases[4] in capsys.readouterr().out:
            raise KeyboardInterrupt
        return {"torch": 2.0, "triton": 1.0}[backend]

    monkeypatch.setattr(tune, "seconds", seconds)
    monkeypatch.setattr(tune, "call", lambda op, *_: print(auto.key(op, tune.OPS[op][0][0], False)))
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--out", str(out)])
    assert json.loads(out.read_text())["sm_90"] == dict.fromkeys(cases[:4], "triton") | {cases[1]: "torch"}
    assert [file.name for file in out.parent.iterdir()] == [out.name]


CPU = torch.device("cpu")
