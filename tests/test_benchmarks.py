"""Tests run.py from end to end on tiny shapes, and that it shows no measurements of a wrong kernel."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run, train_step
from benchmarks.layer import bench_layer, host_time, peers
from benchmarks.shared import agreement, report, shapes

ROOT = Path(__file__).resolve().parents[1]

TINY = ["--device", "cpu", "--shapes", "tiny-b", "--threads", "1", "--compiled", "0", "--only", "loop,grouped_mm,dense"]
#: runs the command after one op has been replaced by a wrong one
BROKEN = """
import sys
import torch
import equimoe.kernels.expert_mlp as op
right = op._BACKENDS["torch"]
def wrong(*args, **kwargs):
    y = right(*args, **kwargs)
    return torch.cat([-y[:1], y[1:]])
op._BACKENDS["torch"] = wrong
from benchmarks import run
sys.exit(run.main({arguments!r}))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # the launches of interpreted kernels are not recorded
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_command_measures_and_writes_everything(tmp_path: Path) -> None:
    done = python("benchmarks/run.py", *TINY, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    text = path.with_suffix(".md").read_text()
    assert text in done.stdout
    result = json.loads(path.read_text())
    assert result["facts"]["versions"]["torch"] == version("torch") and result["facts"]["device"]
    assert {"commit", "threads", "cpu"} <= result["facts"].keys() and result["arguments"]["shapes"] == "tiny-b"
    assert all(rates["matmul_tflops"] > 0 and rates["copy_tbs"] > 0 for rates in result["yardstick"].values())
    assert result["aims"] == [] and "Aims" not in text and result["left_out"] == {}
    shape = result["shapes"]["tiny-b"]
    check_layer(shape["layer"])
    check_kernels(shape["kernels"])
    errors = [pair for routing in ("uniform", "zipf") for pair in shape["gate"]["layer"][routing].values()]
    assert len(errors) == 2 * len(agreement.NAMES) and all(0 <= norm < 1e-2 for norm, _ in errors)
    assert 0 < shape["gate"]["layer"]["layer"]["layer router.weight"][0] < 1e-5


def check_layer(layer: dict) -> None:
    contestants = {"equimoe", "loop", "grouped_mm"}
    assert layer["uniform"].keys() == contestants | {"dense", "equimoe with router"}
    assert layer["zipf"].keys() == contestants
    shape = shapes.BY_NAME["tiny-b"]
    for figures in layer["uniform"].values():
        forward = figures["forward"]
        assert forward["median_us"] > 0 and forward["iqr_us"] >= 0 and forward["runs"] >= 3
        assert forward["tflops"] == pytest.approx(shape.forward_flops / forward["median_us"] / 1e6)
        assert figures["peak_step_bytes"] is None and figures["kept_bytes"] > 0
    ours, floor = layer["uniform"]["equimoe"], layer["floor"]
    assert layer["kept_formula_bytes"] < ours["kept_bytes"] < 2.5 * layer["kept_formula_bytes"]
    assert 0 < floor["path_forward_us"] < floor["layer_forward_us"] < ours["forward"]["median_us"]
    assert ours["kept_bytes"] < layer["uniform"]["grouped_mm"]["kept_bytes"]


def check_kernels(kernels: dict) -> None:
    from benchmarks.kernels import cost

    assert kernels["failed"] == {} and list(kernels["ops"]) == list(cost.ops(shapes.BY_NAME["tiny-b"]))
    for row in kernels["ops"].values():
        assert row["median_us"] > 0 and row["fraction"] == pytest.approx(row["floor_us"] / row["median_us"])
        if importlib.util.find_spec("triton"):
            assert 1 <= row["triton_bytes"] / row["floor_bytes"] < 3


@pytest.mark.slow
def test_a_wrong_kernel_gets_no_figures(tmp_path: Path) -> None:
    """One row of many is wrong; tests/test_honest_benchmarks.py plants other faults in every op, in this process."""
    arguments = [*TINY, "--suite", "layer", "--out", str(tmp_path)]
    done = python("-c", BROKEN.format(arguments=arguments))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WRONG" in done.stderr and "no measurements" in done.stderr
    assert "TFLOP/s" not in done.stdout + done.stderr and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_wrong_peer_is_not_timed(tmp_path: Path) -> None:
    peer = tmp_path / "peer.py"
    peer.write_text(
        "import torch\n"
        "def build(shape, gate_up, down):\n"
        "    return lambda x, w, ids: x * (gate_up.mean() + down.mean() + w.mean())\n"
    )
    given = ["--suite", "layer", "--peer", f"mine={peer}", "--out", str(tmp_path / "out")]
    done = python("benchmarks/run.py", *TINY[:-1], "mine,loop", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "absent: mine: disagrees: mine, " in done.stdout
        and "output error" in done.stdout
        and "| mine |" not in done.stdout
    )


@pytest.mark.parametrize(
    ("option", "word"), [("--shapes", "tiny-x"), ("--peer", "liger=/nowhere"), ("--only", "nobody")]
)
def test_an_unknown_shape_and_peer_are_refused(option: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["--device", "cpu", option, word])
    assert stop.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.parametrize("routing", shapes.ROUTINGS)
def test_a_route_has_different_experts_and_its_skew(routing: str) -> None:
    torch.manual_seed(0)
    shape = shapes.Shape("s", 2048, 8, 8, 16, 2)
    ids_TK = shapes.route(shape, routing, torch.device("cpu"))
    assert ids_TK.dtype == torch.int64 and bool((ids_TK[:, 0] != ids_TK[:, 1]).all())
    most = ids_TK.reshape(-1).bincount(minlength=16).max() / (shape.rows / 16)
    assert (most < 1.3) if routing == "uniform" else (most > 3)


@pytest.mark.parametrize("build", [peers.build_loop, peers.build_grouped])
def test_peers_pass_the_gate_and_one_wrong_row_does_not(build) -> None:
    device, shape = torch.device("cpu"), shapes.Shape("s", 64, 16, 24, 6, 2)
    gate_up, down = shapes.expert_weights(shape, torch.float32, device)
    batch = shapes.make_batch(shape, "zipf", torch.float32, device)
    expected = agreement.reference(batch, gate_up, down)
    found = list(build(shape, gate_up, down).step(batch))
    agreement.compare(found, expected, agreement.NAMES, torch.float32)
    for index, name in enumerate(agreement.NAMES):
        wrong = [t.clone() for t in found]
        row = expected[index].reshape(-1, expected[index].shape[-1]).norm(dim=1).argmax()
        wrong[index].view(-1, wrong[index].shape[-1])[row] *= 1.01
        with pytest.raises(agreement.WrongResult, match=f"^{name} "):
            agreement.compare(wrong, expected, agreement.NAMES, torch.float32)
    found[0][0, 0] = float("nan")
    with pytest.raises(agreement.WrongResult):
        agreement.compare(found, expected, agreement.NAMES, torch.float32)


def figures(us: float, tflops: float, kept: int = 100) -> dict:
    part = {"median_us": us, "iqr_us": 0.0, "runs": 9, "tflops": tflops}
    return {"forward": part, "backward": part, "total": {**part, "median_us": 2 * us}, "kept_bytes": kept}


def gpu_result(ours: float = 100.0, combine: float = 0.9, kept: int = 105) -> dict:
    routed = {"equimoe": figures(ours, 530, kept), "loop": figures(200, 100), "grouped_mm": figures(110, 300)}
    floor = dict.fromkeys(("path_forward_us", "path_backward_us", "layer_forward_us", "layer_backward_us"), 50.0)
    layer = {"uniform": routed, "zipf": routed, "floor": floor, "kept_formula_bytes": 100, "absent": {}}
    row = {"iqr_us": 0.0, "floor_us": 5.0, "bound": "memory", "flops": 0, "timing": "graph"}
    row |= dict.fromkeys(("floor_bytes", "triton_bytes"), 1000)
    ops = {"combine": {**row, "median_us": 9.0, "fraction": combine}}
    ops["sort_by_expert"] = {**row, "median_us": 35.0, "fraction": 0.1}
    size = dict(zip("TDFEK", (32768, 4096, 512, 128, 8), strict=True))
    shape = {**size, "published": {"T": 32768, "E": 128}, "rows": 262144, "layer": layer}
    shape["kernels"] = {"ops": ops, "failed": {}}
    return {"arguments": {"device": "cuda"}, "shapes": {"30B-b": shape}}


def test_aims_are_for_gpus_and_can_be_missed() -> None:
    reached = report.aims(gpu_result())
    assert len(reached) == 7 and all(aim.reached for aim in reached)
    missed = {aim.name for aim in report.aims(gpu_result(ours=120, combine=0.8, kept=120)) if not aim.reached}
    assert missed == {
        "combine, of the copy rate",
        "time over loop and grouped_mm",
        "saved activations: relative deviation from 2TD + 4TKF",
    }
    assert report.aims({**gpu_result(), "arguments": {"device": "cpu"}}) == []


LAYER = ["--rounds", "2", "--threads", "1", "-T", "64", "-D", "16", "-F", "16", "-E", "4"]


def test_a_layer_is_compared_with_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_layer.main([*LAYER, "--json", str(tmp_path / "layer.json")]) == 0
    result = json.loads((tmp_path / "layer.json").read_text())
    assert capsys.readouterr().out.rstrip().endswith(result["summary"])
    for dtype, limit in (("fp32", 1e-5), ("bf16", 1e-2)):
        errors, seconds = result["figures"][dtype]["errors"], result["figures"][dtype]["seconds"]
        assert errors.keys() == {"output", "x", "router", "gate_up", "down"}
        assert all(0 < norm < limit for norm, _ in errors.values())
        assert {"equimoe", "dense", "dense, fused gate_up"} <= seconds.keys()
        assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())
        assert result["ratios"][dtype]["equimoe"] == 1


def test_a_wrong_peer_is_left_out_and_a_wrong_layer_stops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def doubled(build: Callable[..., peers.Contestant]) -> Callable[..., peers.Contestant]:
        def wrong(*given: Any) -> peers.Contestant:
            one = build(*given)
            return replace(one, run=lambda *inputs: 2 * one.run(*inputs))

        return wrong

    monkeypatch.setitem(bench_layer.BUILDERS, "dense", doubled(bench_layer.build_dense))
    assert bench_layer.main(LAYER) == 0
    shown = capsys.readouterr().out
    assert "disagrees: dense, " in shown and "output error 1.0e+00" in shown
    monkeypatch.setattr(bench_layer, "build_ours", doubled(bench_layer.build_ours))
    assert bench_layer.main(LAYER) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("WRONG: equimoe, ") and "GFLOP/s" not in shown.out


def test_the_host_time_of_a_tiny_layer_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert host_time.main(["--rounds", "1", "--out", str(tmp_path)]) == 0, "one round is raised to two, for quartiles"
    (path,) = tmp_path.glob("*.json")
    assert path.with_suffix(".md").read_text() in capsys.readouterr().out
    for figures in json.loads(path.read_text())["figures"].values():
        for parts in figures["microseconds"].values():
            assert all(0 < low <= middle <= high for low, middle, high in parts.values())
        assert figures["microseconds"].keys() == {"equimoe", *figures["ratios"]}
        assert figures["ratios"].keys() | figures["missing"].keys() == host_time.PEERS.keys()


@pytest.mark.parametrize("script", [bench_layer, host_time])
def test_more_experts_per_token_than_experts_are_one_line(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        script.main(["-E", "2", "-K", "3"])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("error: -K=3: give at most the number of experts, -E=2\n")


STEPS = ["--rounds", "2", "--threads", "1", "--sizes", "tiny"]


@pytest.mark.peers
def test_whole_steps_are_compared_with_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert train_step.main([*STEPS, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.with_suffix(".md").read_text() in capsys.readouterr().out
    result = json.loads(path.read_text())
    others = {f"transformers, {way}" for way in train_step.WAYS}
    for name in ("tiny, fp32", "tiny, bf16"):
        figures = result["figures"][name]
        assert figures["ratios"].keys() == others and figures["missing"] == {}
        assert figures["losses"]["equimoe"][-1] < figures["losses"]["equimoe"][0], "the batches come again"
        assert result["least"][name] == min(middle for _, middle, _ in figures["ratios"].values()) > 0


@pytest.mark.peers
@pytest.mark.slow
def test_a_model_with_another_loss_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    right = train_step._theirs

    def wrong(*given: Any) -> train_step.Train:
        train = right(*given)
        return lambda ids_BS: 1.02 * train(ids_BS)

    monkeypatch.setattr(train_step, "_theirs", wrong)
    assert train_step.main([*STEPS, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "tiny, fp32: transformers, eager: disagrees: losses" in shown and "faster transformers: none" in shown


def test_an_unknown_size_of_a_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train_step.main(["--sizes", "tiny,huge"])
    assert stop.value.code == 2 and "--sizes=huge: choose from quickstart" in capsys.readouterr().err
