"""Checks which tensors a checkpoint holds, and that they are restored, on any mesh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from equimoe.moe import checkpoint
from equimoe.moe.checkpoint import CheckpointError, restore_optimizer, training_state
from equimoe.moe.checkpoint.tensors import DTYPES
from tests.helpers.checkpoints import load_all, save_old
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but


class Run:
    """Two layers trained by AdamW, which may or may not hold frozen weights."""

    def __init__(self, seed: int, frozen: tuple[str, ...] = (), knows: bool = True) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.parameters = dict(self.model.named_parameters())
        for name in frozen:
            self.parameters[name].requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.parameters.values() if knows or p.requires_grad], fused=True
        )

    def train(self, steps: int) -> None:
        for step in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.arange(6.0).view(2, 3) * 0.1 + step).square().sum().backward()
            self.optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        return training_state(self.parameters, self.optimizer, {})

    def save(self, root: Path) -> Path:
        return checkpoint.save(root, 1, self.state(), {}, keep_last=1)

    def resume(self, path: Path) -> None:
        state = self.state()
        checkpoint.load(path, state, checkpoint.read_manifest(path))
        restore_optimizer(self.parameters, self.optimizer, state)


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_reading_the_state_changes_nothing() -> None:
    run = Run(0)
    before, generator = {n: p.clone() for n, p in run.parameters.items()}, torch.get_rng_state()
    state = run.state()
    assert not run.optimizer.state
    assert all(state[f"optimizer.{name}.exp_avg"].count_nonzero() == 0 for name in run.parameters)
    state["optimizer.0.weight.exp_avg"].fill_(1)
    run.train(1)
    moments = {name: {k: v.clone() for k, v in run.optimizer.state[p].items()} for name, p in run.parameters.items()}
    run.state()
    assert all(
        torch.equal(v, run.optimizer.state[run.parameters[n]][k]) for n, of in moments.items() for k, v in of.items()
    )
    assert torch.equal(generator, torch.get_rng_state())
    fresh = Run(0)
    assert equal(before, fresh.parameters)
    fresh.train(1)
    assert equal(run.state(), fresh.state())


@pytest.mark.parametrize("before", [0, 2])
def test_resume_before_and_after_the_first_step(tmp_path: Path, before: int) -> None:
    straight, first, second = Run(0), Run(0), Run(1)
    straight.train(before)
    first.train(before)
    second.resume(first.save(tmp_path))
    straight.train(2)
    second.train(2)
    assert equal(straight.state(), second.state())


@pytest.mark.parametrize("knows", [False, True], ids=["trained weights optimized", "all weights optimized"])
@pytest.mark.parametrize("old", [False, True], ids=["new format", "old format"])
def test_frozen_weights_are_saved_and_restored_without_moments(tmp_path: Path, old: bool, knows: bool) -> None:
    """Equimoe 0.1 saved moments of frozen weights too; they are skipped."""
    frozen = ("0.weight", "1.bias")
    straight, first, second = (Run(seed, frozen, knows) for seed in (0, 0, 1))
    straight.train(4)
    first.train(2)
    state = first.state()
    assert {name for name in state if name[:5] == "model"} == {f"model.{name}" for name in first.parameters}
    assert not any(name.startswith(f"optimizer.{weight}.") for name in state for weight in frozen)
    if old:
        for name in frozen:
            moment = torch.zeros_like(first.parameters[name])
            moments = {"step": torch.zeros(()), "exp_avg": moment, "exp_avg_sq": moment}
            state |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
        path = save_old(tmp_path, {name: value.detach() for name, value in state.items()})
    else:
        path = first.save(tmp_path)
    second.resume(path)
    assert second.optimizer.state.keys() == {p for n, p in second.parameters.items() if n not in frozen}
    for step in range(2):
        second.optimizer.zero_grad()
        second.model(torch.arange(6.0).view(2, 3) * 0.1 + step + 2).square().sum().backward()
        second.optimizer.step()
    assert equal(straight.state(), second.state())


def test_weights_that_train_only_now_start_with_new_moments(tmp_path: Path) -> None:
    first, second = Run(0, ("0.weight",)), Run(1)
    first.train(2)
    second.resume(first.save(tmp_path))
    state = second.state()
    assert state["optimizer.0.weight.step"] == 0 and state["optimizer.1.weight.step"] == 2
    assert torch.equal(state["model.0.weight"], first.parameters["0.weight"])


def test_a_weight_that_lacks_some_of_its_moments_is_refused(tmp_path: Path) -> None:
    state = Run(0).state()
    del state["optimizer.0.weight.exp_avg"]
    path = checkpoint.save(tmp_path, 1, state, {}, keep_last=1)
    with pytest.raises(CheckpointError, match="optimizer.0.weight.exp_avg: this run wants .* the checkpoint has None"):
        Run(0).resume(path)


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {}, {"foreach": True}], ids=str)
def test_the_step_is_where_the_optimizer_counts_it(options: dict[str, Any]) -> None:
    """Fused updates on a GPU read the step count there. A meta tensor stands in for the GPU."""
    weight = nn.Parameter(torch.ones(3, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    optimizer.param_groups[0].update(options)
    expected = "cpu" if not options or "foreach" in options else "meta"
    state = training_state({"w": weight}, optimizer, {})
    assert state["optimizer.w.step"].device.type == expected
    restore_optimizer({"w": weight}, optimizer, state)
    assert optimizer.state[weight]["step"].device.type == expected
    assert training_state({"w": weight}, optimizer, {})["optimizer.w.step"].device.type == expected


def test_all_dtypes_and_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with many tensors writes several files."""
    monkeypatch.setattr("equimoe.moe.checkpoint.writer.FILE_BYTES", 100)
    shared = torch.arange(6.0).view(2, 3)
    state = {str(dtype): (torch.arange(-3, 9).view(3, 4) % 2).to(dtype) for dtype in DTYPES}
    state |= {"scalar": torch.tensor(2.5), "step": torch.tensor(7), "empty": torch.zeros(0, 3), "large": torch.ones(99)}
    state |= {
        "shared": shared,
        "transposed": shared.t(),
        "part": shared[1, 1:],
        "generator.cpu.0": torch.get_rng_state(),
    }
    path = checkpoint.save(tmp_path, 1, state, {}, keep_last=1)
    assert len(list(path.glob("rank00000-*.safetensors"))) > 3
    found = load_all(path)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name].double(), value.double()), name


def test_one_process_writes_plain_safetensors(tmp_path: Path) -> None:
    """Any tool can read the weights by their names."""
    path = checkpoint.save(tmp_path, 1, {"model.w": torch.arange(6.0).view(2, 3)}, {}, keep_last=1)
    assert torch.equal(load_file(path / "rank00000-000.safetensors")["model.w"], torch.arange(6.0).view(2, 3))


def test_a_dtype_that_files_do_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model.w: a checkpoint cannot hold torch.complex64; convert it first"):
        checkpoint.save(tmp_path, 1, {"model.w": torch.ones(1, dtype=torch.complex64)}, {}, keep_last=1)
    assert not list(tmp_path.iterdir())


def logical(name: str) -> torch.Tensor:
    shape = {"odd": (5, 3), "few": (1, 7), "cube": (4, 6, 2), "scalar": ()}[name]
    return torch.arange(float(torch.Size(shape).numel())).view(shape) + len(name)


MESHES: dict[str, tuple[tuple[int, ...], dict[str, tuple[Any, ...]]]] = {
    "rows": ((4,), {"odd": (Shard(0),), "few": (Shard(0),), "cube": (Shard(0),), "scalar": (Replicate(),)}),
    "columns": ((2,), {"odd": (Shard(1),), "few": (Shard(1),), "cube": (Shard(2),), "scalar": (Replicate(),)}),
    "grid": (
        (2, 2),
        {
            "odd": (Shard(1), Shard(0)),
            "few": (Replicate(), Shard(1)),
            "cube": (Shard(0), Shard(1)),
            "scalar": (Replicate(), Replicate()),
        },
    ),
    "nested": (
        (2, 2),
        {
            "odd": (Replicate(), Shard(0)),
            "few": (Shard(0), Replicate()),
            "cube": (Shard(0), Shard(0)),
            "scalar": (Replicate(), Replicate()),
        },
    ),
}


@pytest.mark.parametrize("mesh", slow_but(["rows", "nested"], MESHES))
def test_any_mesh_writes_and_any_mesh_reads(tmp_path: Path, mesh: str) -> None:
    """Some shards are uneven or empty, and some names exist on only one rank."""

    def state(mesh: str, rank: int, fill: bool) -> dict[str, torch.Tensor]:
        sizes, placements = MESHES[mesh]
        devices = init_device_mesh("cpu", sizes)
        whole = {name: logical(name) if fill else torch.full_like(logical(name), -1) for name in placements}
        own = {name: distribute_tensor(whole[name], devices, placements[name]) for name in placements}
        stage = {f"stage{rank % 2}": torch.full((2,), float(rank % 2 if fill else -1))}
        return own | stage | {f"generator.{rank}": torch.full((3,), rank if fill else 99, dtype=torch.uint8)}

    def write(rank: int, world: int) -> None:
        checkpoint.save(tmp_path, 1, state(mesh, rank, True), {}, keep_last=1)

    def read(rank: int, world: int, other: str) -> None:
        path = checkpoint.newest(tmp_path)
        found = state(other, rank, False)
        checkpoint.load(path, found, checkpoint.read_manifest(path))
        for name, value in found.items():
            if isinstance(value, DTensor):
                assert torch.equal(value.full_tensor(), logical(name)), name
        assert found[f"stage{rank % 2}"].tolist() == [rank % 2] * 2
        assert found[f"generator.{rank}"].tolist() == [rank if rank < written else 99] * 3
        dist.barrier()

    written = torch.Size(MESHES[mesh][0]).numel()
    run_ranks(write, written)
    path = checkpoint.newest(tmp_path)
    alone = load_all(path)
    assert all(torch.equal(alone[name], logical(name)) for name in MESHES[mesh][1])
    for other, (sizes, _) in MESHES.items():
        run_ranks(read, torch.Size(sizes).numel(), other)


def test_a_rank_that_cannot_read_stops_all(tmp_path: Path) -> None:
    """All ranks must raise the same error, instead of waiting for the one that failed."""
    path = checkpoint.save(tmp_path, 1, {"w": torch.ones(2)}, {}, keep_last=1)
    manifest = checkpoint.read_manifest(path)

    def script(rank: int, world: int) -> str:
        seen = manifest if rank == 0 else manifest | {"files": {}}
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path, {"w": torch.zeros(2)}, seen)
        return str(caught.value)

    assert run_ranks(script, 2, timeout=20) == [f"{path}/tensors.json: missing from the manifest; {REMEDY}"] * 2


REMEDY = "restore it or delete this checkpoint"


def test_the_description_is_small_and_readable(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"model.w": torch.ones(2, 3)}, {}, keep_last=1)
    chunk = ["rank00000-000.safetensors", [0, 0], [2, 3]]
    assert json.loads((path / "tensors.json").read_text()) == {
        "model.w": {"dtype": "float32", "shape": [2, 3], "chunks": [chunk]}
    }
