"""Compares experts on any rank, in any slot, in unequal numbers, with one process, for every dispatcher and loss.

T tokens, D hidden, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equimoe.moe import (
    BalanceConfig,
    CapacityConfig,
    DispatchConfig,
    ExtraLossConfig,
    MoE,
    MoEConfig,
    Owners,
    Placement,
)
from equimoe.moe.collectives import world_axis
from equimoe.moe.placement import Replicas
from tests.helpers import oracle
from tests.helpers.fork import run_ranks
from tests.helpers.placed import spread_experts

E, D, WORLD = 8, 6, 4
LOSSES = BalanceConfig(coefficient=0.5, extra=ExtraLossConfig(device=0.3, communication=0.2))
CONFIG = MoEConfig(D, 8, E, 3, balance=LOSSES, init_std=0.7)
#: rank of each expert
OWNERS = {
    "in order": (0, 0, 1, 1, 2, 2, 3, 3),
    "mixed": (2, 0, 3, 1, 0, 2, 1, 3),
    "unequal": (1, 1, 1, 0, 2, 2, 0, 3),
    "none on a rank": (1, 1, 1, 0, 2, 2, 0, 0),
}


def owners(name: str) -> Owners:
    """Number the slots of each rank downwards, so that slots differ from the order of the experts."""
    rank_of_E = OWNERS[name]
    slot_of_E = [rank_of_E[e + 1 :].count(rank) for e, rank in enumerate(rank_of_E)]
    if name == "in order":
        return Owners.consecutive(E, WORLD)
    return Owners(WORLD, rank_of_E, slot_of_E)


def make(**changes: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(replace(CONFIG, **changes)).double()


def tokens(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn((9, 4, 0, 7)[rank], D, dtype=torch.float64, generator=generator)


def backward(layer: MoE, x_TD: Tensor) -> dict[str, Tensor]:
    x_TD = x_TD.clone().requires_grad_()
    y_TD = layer(x_TD)
    y_TD.square().sum().backward()
    return {"y": y_TD.detach(), "x": x_TD.grad} | {name: p.grad for name, p in layer.named_parameters()}


def replicas_of(held: Owners) -> Replicas:
    """Return a replica on every other rank for one expert, on one rank for some, and none for others."""
    ranks = range(WORLD)
    on = [[r for r in ranks if r != own and (e == 2 or (e + r) % 4 == 0)] for e, own in enumerate(held.rank_of_E)]
    return Replicas(held, on, node_size=2)


def on_ranks(rank: int, world: int, name: str, replicated: bool) -> dict[str, dict[str, Tensor]]:
    return {variant: on_rank(rank, name, changes, replicated) for variant, changes in VARIANTS.items()}


def on_rank(rank: int, name: str, changes: dict[str, Any], replicated: bool) -> dict[str, Tensor]:
    layer, held, axis = make(**changes), owners(name), world_axis()
    for weight_name, weight in list(layer.experts.named_parameters()):
        setattr(layer.experts, weight_name, nn.Parameter(weight.detach()[held.experts_of(rank)]))
    layer.place(Placement(tokens=axis, ep=axis, owners=held))
    if replicated:
        layer.hold(replicas_of(held))
    return backward(layer, tokens(rank))


VARIANTS: dict[str, dict[str, Any]] = {
    "all_to_all": {},
    "overlapped": {"dispatch": DispatchConfig("overlapped", chunks=3)},
    "hierarchical": {"dispatch": DispatchConfig("hierarchical", node_size=2)},
    "all_gather": {"dispatch": DispatchConfig("all_gather")},
    "padded": {"capacity": CapacityConfig(8.0, pad=True, max_tokens=9)},
    "device capacity": {"capacity": CapacityConfig(0.6, scope="global", level="device")},
}


@pytest.mark.parametrize("name", OWNERS)
@pytest.mark.parametrize("replicated", [False, True], ids=["owned", "replicated"])
@pytest.mark.usefixtures("poison")
def test_equals_one_process(replicated: bool, name: str) -> None:
    found = run_ranks(on_ranks, WORLD, name, replicated)
    for variant, changes in VARIANTS.items():
        check(variant, owners(name), changes, [results[variant] for results in found])


def check(variant: str, held: Owners, changes: dict[str, Any], results: list[dict[str, Tensor]]) -> None:
    alone = make(**changes)
    # the balancer and the capacity limit get the owners, but experts do not move
    spread_experts(alone, WORLD)
    alone.balancer.place(replace(alone.balancer.placement, owners=held))
    alone.capacity = type(alone.capacity)(*of_capacity(changes, held)) if changes.get("capacity") else alone.capacity
    want = backward(alone, torch.cat([tokens(rank) for rank in range(WORLD)]))
    for part in ("y", "x"):
        assert oracle.relative_error(torch.cat([r[part] for r in results]), want[part]) < 1e-12, (variant, part)
    assert oracle.relative_error(sum(r["router.weight"] for r in results), want["router.weight"]) < 1e-12, variant
    for part in ("experts.gate_up_proj", "experts.down_proj"):
        for rank, result in enumerate(results):
            experts = held.experts_of(rank)
            assert oracle.relative_error(result[part], want[part][experts]) < 1e-12, (variant, part, rank)


def of_capacity(changes: dict[str, Any], held: Owners) -> tuple[Any, ...]:
    return (changes["capacity"], held)


def test_owners() -> None:
    held = owners("unequal")
    assert [held.experts_of(rank) for rank in range(WORLD)] == [[6, 3], [2, 1, 0], [5, 4], [7]]
    assert held.slots == 3 and not held.in_order and Owners.consecutive(8, 4).in_order
    assert held.to_slots(torch.tensor([[6, 3, 2], [0, 7, -1]])).tolist() == [[0, 1, 3], [5, 9, -1]]
    assert held.rank_of(torch.tensor([0, 3, 7, -1])).tolist() == [1, 0, 3, -1]
    assert held.by_rank(torch.arange(8)).tolist() == [9, 3, 9, 7]
    assert held.mean_by_rank(torch.arange(8.0)).tolist() == [4.5, 1.0, 4.5, 7.0]
    assert held.to_experts(torch.tensor([1.0, 2, 3, 4])).tolist() == [2, 2, 2, 1, 3, 3, 1, 4]
    assert held == owners("unequal") and hash(held) == hash(owners("unequal")) and held != owners("mixed")


@pytest.mark.parametrize(
    ("rank_of_E", "slot_of_E", "message"),
    [
        ((0, 0, 2), (0, 1, 0), r"rank_of_E\[2\]=2: must be at least 0 and less than ranks=2"),
        ((0, 0, 1), (0, 2, 0), r"slot_of_E: rank 0 has slots \[0, 2\]; number them from 0, each once"),
        ((0, 0, 1), (0, 0, 0), r"slot_of_E: rank 0 has slots \[0, 0\]"),
        ((0, 0, 1), (0, 1), r"slot_of_E: has length 2; give one slot for each expert, 3 in all"),
    ],
)
def test_mistakes(rank_of_E: tuple[int, ...], slot_of_E: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Owners(2, rank_of_E, slot_of_E)


def test_owners_that_do_not_fit_the_layer() -> None:
    with pytest.raises(ValueError, match=r"placement.owners: is for num_experts=3 and ranks=1; this layer has num_e"):
        make().place(Placement(owners=Owners.consecutive(3, 1)))
