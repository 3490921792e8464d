"""A decoder whose head has rows of length 1 trains the same on every mesh."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from equimoe.moe.parallel import ParallelConfig, build_mesh
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but
from tests.helpers.trained import batches, engine_of, make, whole, worst

MESHES: list[tuple[int, dict[str, Any]]] = [
    (2, {"tp": 2}),
    (2, {"data_parallel": "fsdp"}),
    (2, {"pp": 2}),
    (4, {"tp": 2, "data_parallel": "fsdp"}),
]


def trained(rank: int, world: int, degrees: dict[str, Any]) -> dict[str, Tensor]:
    mesh = build_mesh(ParallelConfig(**degrees)) if world > 1 else None
    engine = engine_of(make(norm_head=True), mesh)
    for step in range(2):
        engine.step(batches(mesh, step), lr=0.1)
    return whole(engine)


@pytest.mark.parametrize(("world", "degrees"), slow_but(MESHES[:1], MESHES), ids=str)
def test_steps_equal_those_of_one_process(world: int, degrees: dict[str, Any]) -> None:
    want = trained(0, 1, {})
    for got in run_ranks(trained, world, degrees):
        assert worst(got, want)[0] < 1e-8
