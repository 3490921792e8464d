"""Checks which ranks form which group, against a literal reading of the definition."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch

from equimoe.moe.parallel import ParallelConfig, build_mesh
from equimoe.moe.parallel.mesh import AXES, groups_of
from tests.helpers.fork import run_ranks

DEGREES = [
    ParallelConfig(),
    ParallelConfig(pp=2, cp=2, tp=2, ep=4, etp=2),
    ParallelConfig(dp_replicate=2, tp=2, ep=4),
    ParallelConfig(pp=2, tp=4, ep=8),
    ParallelConfig(pp=2, dp_replicate=2, ep=2),
    ParallelConfig(dp_shard=2, cp=-1, edp=2, ep=-1),
]


@pytest.mark.parametrize("config", DEGREES, ids=str)
def test_groups_are_those_that_differ_in_the_axis_alone(config: ParallelConfig) -> None:
    """Two ranks share a group exactly if all their coordinates except the axis's own are equal."""
    world = 16
    degrees = config.resolve(world)
    shared = {a: {frozenset(row) for row in groups_of(a, degrees).tolist()} for a in AXES}
    dense = list(
        itertools.product(*(range(getattr(degrees, d)) for d in ("pp", "dp_replicate", "dp_shard", "cp", "tp")))
    )
    replicas = degrees.edp
    expert = list(itertools.product(*(range(n) for n in (degrees.pp, replicas, degrees.ep, degrees.etp))))
    own = {
        **{"pp": (dense, (0,)), "dp": (dense, (1, 2)), "cp": (dense, (3,)), "tp": (dense, (4,))},
        **{"sequence": (dense, (3, 4)), "dense": (dense, (1, 2, 3)), "fsdp": (dense, (2, 3))},
        **{"stage": (dense, (1, 2, 3, 4)), "edp": (expert, (1,)), "ep": (expert, (2,)), "etp": (expert, (3,))},
    }
    for axis, (places, along) in own.items():
        want: dict[tuple[int, ...], set[int]] = {}
        for rank, place in enumerate(places):
            want.setdefault(tuple(c for i, c in enumerate(place) if i not in along), set()).add(rank)
        assert shared[axis] == {frozenset(ranks) for ranks in want.values()}, axis


def test_stages_are_the_same_for_dense_and_experts() -> None:
    """Stages must agree also if cp * tp is not ep * etp: 128 ranks, tp 2, ep 8, pp 8."""
    degrees = ParallelConfig(pp=8, tp=2, ep=8).resolve(128)
    stage = {frozenset(row) for row in groups_of("stage", degrees).tolist()}
    for axis in ("tp", "ep", "edp", "dense"):
        assert all(any(set(row) <= ranks for ranks in stage) for row in groups_of(axis, degrees).tolist()), axis
    assert all(row == list(range(row[0], row[0] + 8)) for row in groups_of("ep", degrees).tolist())


def test_experts_copies_follow_the_dense_ones() -> None:
    degrees = ParallelConfig(dp_replicate=2, dp_shard=4, ep=2).resolve(8)
    assert groups_of("edp_replicate", degrees).tolist() == groups_of("dp_replicate", degrees).tolist()
    assert groups_of("edp_shard", degrees).tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (ParallelConfig(tp=3), "parallel.tp=3: must divide the number of processes, which is 8"),
        (ParallelConfig(dp_shard=2, tp=2), "parallel.dp_shard=2 * parallel.tp=2: must equal (or divide,"),
        (
            ParallelConfig(pp=2, ep=8),
            "parallel.ep=8: must divide the number of processes of a pipeline stage, which is 4",
        ),
    ],
)
def test_degrees_that_do_not_fit(config: ParallelConfig, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}[^\n]*$"):
        config.resolve(8)


@pytest.mark.parametrize(
    ("world", "config", "experts", "expected"),
    [
        (1, ParallelConfig(ep=-1), 8, (1, 1)),
        (2, ParallelConfig(ep=-1), 8, (2, 1)),
        (16, ParallelConfig(ep=-1), 8, (8, 2)),
        (6, ParallelConfig(ep=-1), 8, (2, 3)),
        (16, ParallelConfig(ep=-1, pp=2, etp=2), 8, (4, 1)),
        (16, ParallelConfig(ep=-1, edp=4), 8, (4, 4)),
        (16, ParallelConfig(ep=4), 8, (4, 4)),
        (16, ParallelConfig(ep=-1), 0, (16, 1)),
    ],
)
def test_experts_over_as_many_ranks_as_divide_them(
    world: int, config: ParallelConfig, experts: int, expected: tuple[int, int]
) -> None:
    degrees = config.resolve(world, experts)
    assert (degrees.ep, degrees.edp) == expected
    assert degrees.pp * degrees.edp * degrees.ep * degrees.etp == world
    assert degrees.resolve(world) == degrees


def test_a_remedy_that_fits_dense_part_and_experts() -> None:
    config = ParallelConfig(pp=2, tp=3, ep=4)
    with pytest.raises(ValueError, match="make the number of processes a multiple of 24, or change the degrees$"):
        config.resolve(1)
    assert config.resolve(24).dp_shard == 4


def test_values_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="parallel.tp=0: must be at least 1, or -1 for the rest"):
        ParallelConfig(tp=0)
    with pytest.raises(ValueError, match="only one of these can be -1; set the others"):
        ParallelConfig(cp=-1)


@pytest.mark.parametrize("config", DEGREES[1:3], ids=str)
def test_groups_that_are_made(config: ParallelConfig) -> None:
    """Each rank's group must sum over exactly the ranks of the table, and have the timeout."""
    config = replace(config, pp=1, timeout_s=47)

    def script(rank: int, world: int) -> dict[str, tuple[float, int, float]]:
        mesh = build_mesh(config)
        found = {}
        for name, axis in mesh.axes.items():
            bits = torch.tensor(float(1 << rank), dtype=torch.float64)
            if axis.size > 1:
                torch.distributed.all_reduce(bits, group=axis.group)
                timeout = axis.group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
                found[name] = (float(bits), axis.rank, timeout)
        return found

    degrees = config.resolve(8)
    for rank, found in enumerate(run_ranks(script, 8)):
        for name, (bits, place, timeout) in found.items():
            row = next(row for row in groups_of(name, degrees).tolist() if rank in row)
            assert bits == sum(1 << r for r in row) and row[place] == rank and timeout == 47, name
