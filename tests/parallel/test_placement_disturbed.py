"""Checks that replicas and moves of experts survive what may come between steps, and unusual models."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch

from equimoe.moe.config import PlacementConfig
from equimoe.moe.engines import Batch, build_engine
from equimoe.moe.parallel import build_mesh
from equimoe.moe.train.config import OptimConfig
from equimoe.moe.train.optim import build_optimizer
from tests.helpers import oracle, parity
from tests.helpers.fork import run_ranks
from tests.helpers.parity import LENGTH, SEQUENCES, Composition, batch
from tests.helpers.slow import slow_but
from tests.parallel.test_expert_placement import EP, FSSDP, at_random, engine_of, random_owners, saved, train

MOVING = PlacementConfig(overlap=2, window=2, reshard_every=1)


def disturbed(rank: int, world: int, how: str) -> list[float]:
    """Train with evaluations, or steps that fail in the middle, between steps; return the norms."""
    mesh = build_mesh(FSSDP)
    engine, norms = engine_of(mesh, MOVING), []
    part = Batch(*(t.chunk(world)[rank] for t in batch(7, Composition(world)).values()))
    last = engine.parts[0].moe_layers()[-1]
    for step in range(4):
        norms += train(engine, mesh, range(step, step + 1))
        if how == "evaluated":
            engine.evaluate([part, part])
        elif how == "failed":
            with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="in the middle"):
                patch.setattr(last.dispatcher.__class__, "finish", fail)
                engine.step([part], lr=1e-3)
    return norms


def fail(*_: object) -> None:
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("how", slow_but(["failed"], ["evaluated", "failed"]))
def test_nothing_between_steps_changes_them(how: str) -> None:
    want = run_ranks(disturbed, 2, "")
    assert run_ranks(disturbed, 2, how) == want


def few(rank: int, world: int) -> list[float]:
    mesh = None if world == 1 else build_mesh(FSSDP)
    of = Composition(world, experts=3)
    adamw = lambda named: build_optimizer(named, OptimConfig())  # noqa: E731
    engine = build_engine(parity.make(of, 1).double(), mesh, adamw, max_norm=1.0, placement=MOVING)
    part = [Batch(*(t.chunk(world)[rank] for t in batch(step, Composition(world)).values())) for step in range(4)]
    return [float(engine.step([each], lr=1e-3).norm) for each in part]


def test_fewer_experts_than_ranks_with_owners_that_change() -> None:
    assert run_ranks(few, 4)[0] == pytest.approx(run_ranks(few, 1)[0], rel=1e-9)


def other(
    rank: int, world: int, root: Path, how: str, name: str, dtype: torch.dtype
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train with another optimizer or dtype; return the norms and the state."""
    mesh = build_mesh(EP if how == "ep" else FSSDP)
    engine = build_engine(
        parity.make(Composition(world), 1).to(dtype),
        mesh,
        lambda named: build_optimizer(named, OptimConfig(name=name)),
        max_norm=1.0,
        shape=(SEQUENCES // world, LENGTH),
    )
    draw, norms = random.Random(1), []
    if how != "ep":
        engine.experts.plan = partial(at_random, draw)
    for begin in range(0, 6, 2):
        norms += train(engine, mesh, range(begin, begin + 2))
        if how != "ep":
            engine.experts.move(random_owners(draw, engine), engine.optimizer)
    return norms, saved(engine, root / how, 6)


ROWS = [("muon", torch.float64, 1e-12), ("lamb", torch.float64, 1e-12), ("adamw", torch.bfloat16, 2e-2)]


@pytest.mark.parametrize(("name", "dtype", "limit"), slow_but(ROWS[:1], ROWS))
def test_optimizers_and_weights_of_16_bits(name: str, dtype: torch.dtype, limit: float, tmp_path: Path) -> None:
    """Muon and LAMB look at whole experts, whose owners change."""
    want, state = run_ranks(other, 2, tmp_path, "ep", name, dtype)[0]
    norms, found = run_ranks(other, 2, tmp_path, "moved", name, dtype)[0]
    assert norms == pytest.approx(want, rel=limit)
    for key, value in state.items():
        if not key.startswith("optimizer.") or dtype == torch.float64:
            assert oracle.relative_error(found[key], value) < limit, key
