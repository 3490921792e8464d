"""LAMB and Muon on any mesh: steps of whole weights and whole experts, as in one process; and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equimoe.moe import checkpoint
from equimoe.moe.engines import build_engine
from equimoe.moe.engines.torch import TorchEngine
from equimoe.moe.parallel import Mesh, ParallelConfig, build_mesh
from equimoe.moe.train.config import OptimConfig
from equimoe.moe.train.optim import build_optimizer
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but
from tests.helpers.trained import LENGTH, MICRO_BATCHES, SEQUENCES, batches, make, whole, worst

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "ep 2": (2, {"ep": 2}),
    "fsdp 2": (2, {"data_parallel": "fsdp"}),
    "tp 2, etp 2": (2, {"tp": 2, "etp": 2}),
    "fssdp 2": (2, {"ep": 2, "experts": "fssdp"}),
    "fsdp 4, ep 2": (4, {"data_parallel": "fsdp", "ep": 2}),
    "fsdp 2, tp 2, etp 2": (4, {"data_parallel": "fsdp", "tp": 2, "etp": 2}),
    "hsdp 4": (4, {"data_parallel": "fsdp", "dp_replicate": 2}),
    "fsdp 4, etp 2, ep 2": (4, {"data_parallel": "fsdp", "etp": 2, "ep": 2}),
    "pp 2, ep 2": (4, {"pp": 2, "ep": 2}),
    "fssdp 4, etp 2": (4, {"ep": 2, "etp": 2, "experts": "fssdp"}),
}
FAST = ("ep 2", "fsdp 2", "tp 2, etp 2", "fsdp 4, ep 2")
NAMES = ("lamb", "muon")


def engine_of(name: str, mesh: Mesh | None) -> TorchEngine:
    config = OptimConfig(name=name, weight_decay=0.5)  # type: ignore[arg-type]

    def optimizer(trainable: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return build_optimizer(trainable, config)

    dp = 1 if mesh is None else mesh["dp"].size
    shape = (SEQUENCES // dp // MICRO_BATCHES, LENGTH)
    return build_engine(make(), mesh, optimizer, micro_batches=MICRO_BATCHES, shape=shape, max_norm=0.5)


def mesh_of(world: int, degrees: dict[str, Any]) -> Mesh | None:
    return build_mesh(ParallelConfig(**degrees)) if world > 1 else None


def trained(rank: int, world: int, name: str, degrees: dict[str, Any]) -> dict[str, Tensor]:
    mesh = mesh_of(world, degrees)
    engine = engine_of(name, mesh)
    for step in range(3):
        assert engine.step(batches(mesh, step), lr=0.05).applied
    return whole(engine)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mesh", slow_but(FAST, MESHES))
def test_steps_equal_those_of_one_process(mesh: str, name: str) -> None:
    world, degrees = MESHES[mesh]
    want = trained(0, 1, name, {})
    for got in run_ranks(trained, world, name, degrees):
        assert worst(got, want)[0] < 1e-8


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_resumes_under_another_mesh(name: str, tmp_path: Path) -> None:
    def first(rank: int, world: int) -> None:
        mesh = mesh_of(world, {"data_parallel": "fsdp"})
        engine = engine_of(name, mesh)
        for step in range(2):
            engine.step(batches(mesh, step), lr=0.05)
        checkpoint.save(tmp_path, 2, engine.state(), {}, keep_last=1)

    def second(rank: int, world: int) -> dict[str, Tensor]:
        mesh = mesh_of(world, {"ep": 2})
        engine, path = engine_of(name, mesh), checkpoint.newest(tmp_path)
        assert path is not None
        state = engine.state()
        checkpoint.load(path, state, checkpoint.read_manifest(path))
        engine.restore(state)
        engine.step(batches(mesh, 2), lr=0.05)
        return whole(engine)

    run_ranks(first, 2)
    want = trained(0, 1, name, {})
    for got in run_ranks(second, 2):
        assert worst(got, want)[0] < 1e-8
