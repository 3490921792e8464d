"""Checks the replay of recorded loads on other ranks against cases that are known by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from equimoe.launch.placement import loads_of, main
from equimoe.moe.config import PlacementConfig
from equimoe.moe.placement import Owners, Replicas, read_owners
from equimoe.moe.plan.replay import METHODS, Layer, Machine, Outcome, Placed, cost_of, divided, replay

RANKS, EXPERTS = 8, 16
#: a copy takes as long as 10 rows
MACHINE = Machine(RANKS, 4, seconds_per_row=1e-6, expert_bytes=1000, bandwidth=1e9, latency=4e-6)
CONFIG = PlacementConfig(overlap=1, window=2, reshard_every=2)


def steady(hot: int = 3, steps: int = 6) -> torch.Tensor:
    """Return loads in which one expert gets half of all choices in every step."""
    counts_SLE = torch.full((steps, 1, EXPERTS), 800)
    counts_SLE[..., hot] = 800 * (EXPERTS - 1)
    return counts_SLE


def flipping(steps: int = 8) -> torch.Tensor:
    """Return loads whose hot expert changes in every step."""
    return torch.cat([steady(5 * (step % 2) + 3, 1) for step in range(steps)])


def outcomes(counts_SLE: torch.Tensor, config: PlacementConfig = CONFIG) -> dict[str, Outcome]:
    return {name: replay(counts_SLE, method, MACHINE, config) for name, method in METHODS.items()}


def test_choices_are_divided_evenly() -> None:
    counts_PE = divided(torch.tensor([7, 0, 16, 9]), 4)
    assert counts_PE.sum(0).tolist() == [7, 0, 16, 9]
    assert (counts_PE.amax(0) - counts_PE.amin(0)).max() <= 1


def test_a_steady_hot_expert() -> None:
    found = outcomes(steady(steps=20))
    plain = 8 * (15 + 1) / (15 + 15)
    assert found["expert parallel"].straggler == pytest.approx(plain)
    assert found["replicate to all (FasterMoE)"].straggler < 1.1
    # the first step has no forecast
    assert found["FSSDP"].straggler_max == pytest.approx(plain) and found["FSSDP"].straggler < 1.3
    assert found["exchange positions (SmartMoE)"].straggler > 0.9 * plain / (16 / 15), (
        "one expert is too much for a rank"
    )
    assert found["expert parallel"].copied_bytes == found["exchange positions (SmartMoE)"].copied_bytes == 0
    assert found["FSSDP"].copied_bytes == pytest.approx(2 * 7 * 1000 * 19 / 20)
    # its replicas make the load even, so only Hecate's rule moves experts
    assert found["replicate the busiest (Hecate)"].moved_bytes > 0 == found["FSSDP"].moved_bytes
    assert found["FSSDP"].replica_bytes == 1000


def test_owners_change_where_layers_wait() -> None:
    """Two busy experts of a layer have the same owner; which, differs from layer to layer."""
    counts_SLE = torch.full((12, 2, EXPERTS), 800)
    counts_SLE[:, 0, :2] = counts_SLE[:, 1, 6:8] = 1000
    found = outcomes(counts_SLE, replace(CONFIG, overlap=0))
    plain, moved = found["expert parallel"], found["FSSDP"]
    assert moved.curve[:2] == plain.curve[:2] and moved.curve[2] == pytest.approx(0.9 * plain.curve[2])
    assert moved.moved_bytes == pytest.approx(4 * 1000 * 2 / 12), "an exchange of two experts in each layer, once"


def test_loads_that_flip_need_calibration() -> None:
    found = outcomes(flipping(), replace(CONFIG, memory_mb=1, window=1))
    assert found["FSSDP"].straggler > 0.9 * found["expert parallel"].straggler
    assert found["FSSDP, calibrated"].straggler < 0.5 * found["FSSDP"].straggler
    assert found["FSSDP, calibrated"].seconds < found["FSSDP"].seconds


def test_methods_that_look_at_the_routing_are_never_slower_than_expert_parallelism() -> None:
    torch.manual_seed(0)
    for _ in range(5):
        counts_SLE = (torch.rand(4, 2, EXPERTS) ** 4 * 3000).long()
        found = outcomes(counts_SLE)
        for name in ("replicate to all (FasterMoE)", "least loaded (LLEP)"):
            assert found[name].seconds <= found["expert parallel"].seconds * (1 + 1e-12)


def test_the_time_of_copies() -> None:
    owners = Owners.consecutive(4, 4)
    machine = replace(MACHINE, ranks=4)
    counts_PE = torch.full((4, 4), 5)
    layer = Layer(owners, None, counts_PE, machine, CONFIG, room=2)
    assert cost_of(layer, Placed(Replicas(owners))) == pytest.approx(20e-6)
    on_all = Replicas(owners, [[1, 2, 3], [], [], []])
    # rank 0 sends three copies, of which one hides behind other work
    busiest = 20 + 5  # all tokens of its own expert, and its own tokens of expert 0
    assert cost_of(layer, Placed(on_all)) == pytest.approx((busiest + 2 * 10) * 1e-6)
    assert cost_of(layer, Placed(on_all, Replicas(owners))) == pytest.approx((busiest + 3 * 10) * 1e-6)


def metrics(folder: Path, records: list[object]) -> Path:
    file = folder / "metrics.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return file


RUN: dict[str, Any] = {
    "kind": "run",
    "config": {"moe": {"top_k": 2, "gated": True, "hidden_size": 64, "intermediate_size": 32}},
}


STEP = {"kind": "train", "layers": [{"counts": [1, 2]}]}


def changed(run: dict[str, Any], **moe: int) -> dict[str, Any]:
    return run | {"config": {"moe": run["config"]["moe"] | moe}}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loads_SLE = torch.arange(EXPERTS).expand(6, 1, EXPERTS) ** 2
    steps = [{"kind": "train", "layers": [{"counts": row.tolist()} for row in step]} for step in loads_SLE]
    metrics(tmp_path, [RUN, *steps])
    out, file = str(tmp_path / "out.json"), str(tmp_path / "owners.json")
    ranks = ["--ranks", "8", "--nodes", "2", "--reshard-every", "2", "--overlap", "0"]
    main(["--loads", str(tmp_path), *ranks, "--out", out, "--write-owners", file])
    printed = capsys.readouterr().out
    assert "6 recorded steps, 1 layer of 16 experts, replayed on 8 ranks, 4 per node" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    owners = read_owners(tmp_path / "owners.json", [EXPERTS], RANKS)
    assert owners != [Owners.spread(EXPERTS, RANKS)]
    assert found["methods"].keys() == METHODS.keys() and all(name in printed for name in METHODS)
    assert found["machine"]["expert_bytes"] == 2 * 3 * 64 * 32


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([RUN], [], "--loads=.*metrics.jsonl: has no loads of MoE layers; give the metrics of a run, or its folder"),
        (None, [], r"--loads=.*: cannot be read \(No such file or directory\); give a run's folder"),
        ([RUN], ["--nodes", "3"], "--nodes=3: must divide --ranks=8; use a divisor"),
        ([RUN], ["--ranks", "0"], "--ranks=0: must be greater than 0"),
        ([RUN], ["--bandwidth", "nan"], "--bandwidth=nan: must be greater than 0"),
        ([RUN], ["--latency", "nan"], "--latency=nan: must be at least 0, and finite"),
        ([RUN], ["--tflops", "inf"], "--tflops=inf: must be greater than 0, and finite"),
        ([RUN], ["--overlap", "-1"], "placement.overlap=-1: must be at least 0"),
        ([RUN, STEP], ["--tokens", f"{10**20}"], f"--tokens={10**20}: must be at most {2**53 // 16} on 8 ranks"),
        ([{"kind": "run"}, STEP], [], r"--loads=.*: its loads cannot be read \(KeyError: 'config'\)"),
        ([changed(RUN, hidden_size=0), STEP], [], r"--loads=.*: its loads cannot be read \(moe.hidden_size=0\)"),
        ([RUN, {"kind": "train", "layers": [3]}], [], r"--loads=.*: its loads cannot be read \(TypeError: .*"),
        *(
            (
                [RUN, {"kind": "train", "layers": [{"counts": counts}]}],
                [],
                r"--loads=.*: its loads cannot be read \(counts",
            )
            for counts in ([1, -1], [1, float("nan")], [2**62, 2**62], [])
        ),
    ],
)
def test_mistakes_are_one_line(
    records: list[object] | None, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if records is not None:
        metrics(tmp_path, records)
    with pytest.raises(SystemExit) as stopped:
        main(["--loads", str(tmp_path), "--ranks", "8", *options])
    assert stopped.value.code == 64
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    with pytest.raises(ValueError, match=f"^error: {message}"):
        raise ValueError(lines[0])


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics(tmp_path, [RUN, STEP])
    for option in ("--out", "--write-owners"):
        with pytest.raises(SystemExit) as stopped:
            main(["--loads", str(tmp_path), "--ranks", "8", option, str(tmp_path / "no" / "x")])
        assert stopped.value.code == 73
        assert capsys.readouterr().err == f"error: {tmp_path}/no/x: cannot be written (No such file or directory)\n"


def test_loads_of_unequal_layers_are_refused() -> None:
    ragged = {"kind": "train", "layers": [{"counts": [1, 2]}, {"counts": [1]}]}
    with pytest.raises(ValueError, match="its loads cannot be read"):
        loads_of([RUN, ragged], Path("x"))
