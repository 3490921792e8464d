"""Profiles steps of real runs, and reads the traces back."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from equimoe.launch.options import parse
from equimoe.moe import MoE, MoEConfig
from equimoe.moe.observe.profile import StepProfile, steps_of
from equimoe.moe.regions import region
from tests.helpers import small
from tests.helpers.command import launch

REGIONS = {"route", "dispatch", "experts", "combine", "balance"}


def spans(file: Path) -> list[dict[str, Any]]:
    """Return the named spans of a trace."""
    with gzip.open(file) as trace:
        events = json.load(trace)["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def run(folder: Path, *options: str, world: int = 1) -> Path:
    small.write_texts(folder / "texts")
    argv = ["--data.path", str(folder / "texts"), "--run-dir", str(folder / "run"), "--log.trackers", "none"]
    argv += ["--model.num_layers", "2", "--model.num_heads", "2", "--moe.hidden_size", "16"]
    argv += ["--moe.intermediate_size", "12", "--data.seq_len", "16", "--data.heldout_fraction", "0.1"]
    argv += ["--log.eval_sequences", "2", *options]
    ended = launch(argv, world)
    assert ended.codes == [0] * world, ended
    return folder / "run" / "profile"


def test_a_trace_shows_the_stages_of_every_layer(tmp_path: Path) -> None:
    folder = run(tmp_path, "--steps", "6", "--log.profile", "3:5")
    (file,) = folder.iterdir()
    assert file.name == "steps-3-4.trace.json.gz"
    found = spans(file)
    names = Counter(span["name"] for span in found)
    forwards = 2 * 2 * 2  # steps, micro-batches, layers
    assert {name: names[name] for name in REGIONS} == dict.fromkeys(REGIONS, forwards) | {"balance": 2 * forwards}
    combines, experts = ([s for s in found if s["name"] == name] for name in ("combine", "experts"))
    for inner in experts:  # the products are inside, and the backward is in the trace, too
        assert any(o["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= o["ts"] + o["dur"] for o in combines)
    assert any("Backward" in name for name in names)


def test_several_ranks_have_one_trace_with_their_exchange(tmp_path: Path) -> None:
    folder = run(tmp_path, "--steps", "3", "--log.profile", "2:3", "--parallel.ep", "2", world=2)
    (file,) = folder.iterdir()
    found = spans(file)
    assert {span["name"] for span in found} >= REGIONS
    assert any("all_to_all" in span["name"] or "alltoall" in span["name"] for span in found)


def test_a_run_that_ends_early_keeps_what_it_has_profiled(tmp_path: Path) -> None:
    profile = StepProfile(range(2, 100), tmp_path, torch.device("cpu"))
    layer = MoE(MoEConfig(8, 8, num_experts=4, top_k=2))
    for step in (1, 2, 3):
        profile.begin(step)
        layer(torch.randn(4, 8)).sum().backward()
        assert profile.end(step) == []
    (file,) = profile.end(3, last=True)
    assert file == tmp_path / "steps-2-3.trace.json.gz"
    assert Counter(span["name"] for span in spans(file))["route"] == 2
    assert profile.end(3, last=True) == []


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_gpus_memory_is_kept_as_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda file: Path(file).write_bytes(b"snapshot"))
    profile = StepProfile(range(1, 2), tmp_path, torch.device("cuda"))
    profile.begin(1)
    trace, memory = profile.end(1)
    assert memory == tmp_path / "steps-1-1.memory.pickle" and memory.read_bytes() == b"snapshot"
    assert trace.exists() and calls == [{"max_entries": 100_000}, {"enabled": None}]


def test_a_folder_that_cannot_be_written_does_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    profile = StepProfile(range(1, 9), tmp_path / "file" / "profile", torch.device("cpu"))
    profile.begin(1)
    with pytest.warns(RuntimeWarning, match="cannot profile .*Not a directory.*training continues"):
        assert profile.end(1, last=True) == []
    profile.begin(2)
    assert profile.end(2, last=True) == []


@pytest.mark.parametrize(("text", "steps"), [("10:13", range(10, 13)), (" 1:2 ", range(1, 2))])
def test_steps_by_name(text: str, steps: range) -> None:
    assert steps_of(text) == steps


@pytest.mark.parametrize("text", ["13:10", "5:5", "0:3", "10", "10:", "a:b", "1:2:3", "-1:4", "", "\u0661:\u0663"])
def test_ranges_that_name_no_steps(text: str) -> None:
    with pytest.raises(ValueError, match="^log.profile=.*: must be FIRST:END .* for the steps 10, 11 and 12$"):
        steps_of(text)


def test_bad_ranges_of_a_command_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^log.profile='13:10': must be FIRST:END"):
        parse(["--log.profile", "13:10"])
    with pytest.raises(ValueError, match=r"^log.profile='300:302': steps=300; profile earlier steps, or raise it$"):
        parse(["--log.profile", "300:302"])
    assert parse(["--log.profile", "300:301"]).config.log.profile == "300:301"
    (tmp_path / "run.yaml").write_text("log:\n  profile: 10:13\n  every: 0x10\nsteps: 1_000\noptim: {lr: 0.5}\n")
    config = parse(["--config", str(tmp_path / "run.yaml")]).config
    assert (config.log.profile, config.log.every, config.steps, config.optim.lr) == ("10:13", 16, 1000, 0.5)


def test_a_region_does_nothing_without_a_profiler_and_in_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        with region("route"):
            return x * 2

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
    with torch.profiler.profile() as profiler:
        assert compiled(torch.ones(2)).tolist() == work(torch.ones(2)).tolist()
    assert sum(event.name == "route" for event in profiler.events()) == 1

    def entered(name: str) -> AbstractContextManager[Any]:
        raise AssertionError("entered without a profiler")

    monkeypatch.setattr("equimoe.moe.regions.record_function", entered)
    assert work(torch.ones(2)).tolist() == [2.0, 2.0]
