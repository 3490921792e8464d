"""Compares the choices that a capacity keeps with a literal loop over choices and bins."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.moe import BalanceConfig, CapacityConfig, DispatchConfig, MoE, MoEConfig, Placement, Routing
from equimoe.moe.collectives import Axis
from equimoe.moe.dispatch import build_capacity
from equimoe.moe.dispatch.capacity import DROP_POLICIES
from equimoe.moe.dispatch.exchange_plan import rows_per_expert
from equimoe.moe.types import Decision
from tests.helpers import oracle

CONFIG = MoEConfig(
    hidden_size=6, intermediate_size=4, num_experts=8, top_k=3, balance=BalanceConfig(coefficient=0.3), init_std=0.5
)


def random_routing(tokens: int, seed: int, sequences: int = 1, ties: bool = False, masked: bool = False) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    # experts 0 and 1 are chosen most
    scores_TE = torch.rand(tokens, 8, generator=generator) + torch.tensor([0.6, 0.3, 0, 0, 0, 0, 0, 0])
    chosen_TK = scores_TE.argsort(1, descending=True)[:, :3]
    weights_TK = torch.rand(tokens, 3, generator=generator)
    if ties:
        weights_TK = (weights_TK * 3).round() / 3
    mask_T = torch.arange(tokens) % 4 != 1 if masked else torch.ones(tokens, dtype=torch.bool)
    ids_TK = chosen_TK.masked_fill(~mask_T[:, None], -1)
    tokens_B = mask_T.view(sequences, -1).sum(1)
    return Routing(
        Decision(chosen_TK, ids_TK),
        weights_TK,
        torch.zeros(sequences, 8).long(),
        tokens_B,
        torch.zeros(1),
        torch.zeros(1),
    )


def keep(
    ids: list[list[int]], weights: list[list[float]], valid: int, capacity: CapacityConfig, bins: int
) -> list[list[int]]:
    """Return the ids of tokens in order of position, with -1 for dropped choices."""
    limit = math.ceil(capacity.factor * 3 * valid / bins)
    kept = [[-1] * 3 for _ in ids]
    for full in range(bins):
        asking = [(t, k) for t, row in enumerate(ids) for k, e in enumerate(row) if e >= 0 and e // (8 // bins) == full]
        if capacity.drop == "probability":
            asking.sort(key=lambda place: -weights[place[0]][place[1]])
        if capacity.drop == "choice":
            asking.sort(key=lambda place: place[1])
        for t, k in asking[:limit]:
            kept[t][k] = ids[t][k]
    return kept


def on(devices: int) -> Placement:
    """Return the owners of the experts on this number of ranks."""
    return Placement(ep=Axis("ep", size=devices))


@pytest.mark.parametrize("drop", DROP_POLICIES)
@pytest.mark.parametrize(("level", "devices"), [("expert", 1), ("device", 1), ("device", 2), ("device", 4)])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.1, 4.0])
@pytest.mark.parametrize("kind", ["plain", "ties", "masked"])
def test_against_a_loop(drop: Any, level: Any, devices: int, factor: float, kind: str) -> None:
    capacity = CapacityConfig(factor, drop, level=level)
    routing = random_routing(23, seed=1, ties=kind == "ties", masked=kind == "masked")
    got = build_capacity(replace(CONFIG, capacity=capacity), on(devices))(routing)
    bins = 8 if level == "expert" else devices
    valid = int(routing.tokens_B.sum())
    want = keep(routing.ids_TK.tolist(), routing.weights_TK.tolist(), valid, capacity, bins)
    assert got.ids_TK.tolist() == want
    assert got.decision.chosen_TK is routing.decision.chosen_TK and got.counts_BE is routing.counts_BE


def test_a_device_keeps_the_highest_weights_of_all_its_experts() -> None:
    """With two devices of four experts and three rows each, dropped choices must weigh less than kept ones."""
    routing = random_routing(12, seed=3)
    capacity = CapacityConfig(0.5, level="device")
    ids_TK = build_capacity(replace(CONFIG, capacity=capacity), on(2))(routing).ids_TK
    for device in range(2):
        here = routing.ids_TK // 4 == device
        kept = here & (ids_TK >= 0)
        assert int(kept.sum()) == min(int(here.sum()), 9)
        dropped = routing.weights_TK[here & ~kept]
        assert dropped.numel() == 0 or routing.weights_TK[kept].min() >= dropped.max()


def test_first_choices_are_kept_before_any_second_choice() -> None:
    """With one place per expert, and tokens that choose (0, 1) and (1, 0), by token order one first choice is lost."""
    chosen_TK = torch.tensor([[0, 1], [1, 0]])
    zeros = torch.zeros(1, 2).long()
    routing = Routing(Decision(chosen_TK, chosen_TK), torch.ones(2, 2), zeros, torch.tensor([2]), zeros, zeros)
    for drop, kept in (("choice", [[0, -1], [1, -1]]), ("position", [[0, 1], [-1, -1]])):
        config = replace(CONFIG, num_experts=2, top_k=2, capacity=CapacityConfig(0.5, drop))  # type: ignore[arg-type]
        capacity = build_capacity(config, Placement())
        assert capacity is not None and capacity(routing).ids_TK.tolist() == kept


@pytest.mark.parametrize("drop", DROP_POLICIES)
def test_dropping_twice_drops_nothing_more(drop: Any) -> None:
    """A recomputation applies the capacity to a decision that has been limited already."""
    capacity = build_capacity(replace(CONFIG, capacity=CapacityConfig(0.5, drop)), Placement())
    once = capacity(random_routing(23, seed=5, ties=True))
    assert torch.equal(capacity(once).ids_TK, once.ids_TK) and int((once.ids_TK < 0).sum()) > 10


@pytest.mark.parametrize("drop", DROP_POLICIES)
def test_layer_drops_and_balances_before_the_drop(drop: Any) -> None:
    x = torch.randn(19, 6, dtype=torch.float64)

    def router_gradient(capacity: CapacityConfig | None) -> tuple[Tensor, MoE, Tensor]:
        torch.manual_seed(0)
        layer = MoE(replace(CONFIG, capacity=capacity)).double()
        y = layer(x)
        (y * 0).sum().backward()
        return layer.router.weight.grad, layer, y.detach()

    dropless, layer, y_all = router_gradient(None)
    dropped, limited, y = router_gradient(CapacityConfig(0.5, drop))
    assert torch.equal(dropped, dropless) and float(dropless.norm()) > 1e-4
    assert limited.stats.counts.tolist() == layer.stats.counts.tolist() and limited.stats.dropped_fraction > 0.2
    _, _, ids_TK, weights_TK = oracle.route(layer, x)
    kept = torch.tensor(keep(ids_TK.tolist(), weights_TK.tolist(), 19, CapacityConfig(0.5, drop), 8)) >= 0
    assert oracle.relative_error(y, oracle.forward(layer, x, kept)) < 1e-12 < oracle.relative_error(y, y_all)


def test_rows_of_a_padded_exchange() -> None:
    """There are ceil(factor K T / E) rows, rounded exactly as the limit is, so that every kept choice has one."""
    assert rows_per_expert(CapacityConfig(1.25, pad=True), 1000, 2, 8) == 313
    assert rows_per_expert(CapacityConfig(1.25, pad=True, max_tokens=2000), 1000, 2, 8) == 625
    for factor in (0.1, 0.7, 1.1, 1.3, 3.3):
        for tokens in (*range(1, 60), 2100):  # fp32 would round 2100 * 3.3 / 7 to one less
            capacity = build_capacity(replace(CONFIG, num_experts=7, capacity=CapacityConfig(factor)), Placement())
            routing = random_routing(tokens, 0)
            crowded = torch.zeros_like(routing.ids_TK)
            routing = replace(routing, decision=Decision(crowded, crowded), counts_BE=torch.zeros(1, 7).long())
            kept = int((capacity(routing).ids_TK == 0).sum())
            assert kept == min(rows_per_expert(CapacityConfig(factor, pad=True), tokens, 3, 7), 3 * tokens)
    with pytest.raises(ValueError, match="capacity.max_tokens=5: this forward has 6 tokens"):
        rows_per_expert(CapacityConfig(pad=True, max_tokens=5), 6, 2, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scope": "node"}, "capacity.scope='node': use one of local, sequence, global"),
        ({"level": "rank"}, "capacity.level='rank': use one of expert, device"),
        ({"pad": True, "scope": "global"}, "capacity.pad=True: needs scope='local' and level='expert'"),
        ({"pad": True, "level": "device"}, "capacity.pad=True: needs scope='local' and level='expert'"),
        ({"max_tokens": 5}, "capacity.max_tokens=5: must be at least 1 and needs capacity.pad=True"),
        ({"pad": True, "max_tokens": 0}, "capacity.max_tokens=0"),
    ],
)
def test_config_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CapacityConfig(**fields)


def test_a_dispatcher_that_cannot_pad_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity.pad=True: dispatch.name='all_gather' cannot pad"):
        replace(CONFIG, capacity=CapacityConfig(pad=True), dispatch=DispatchConfig("all_gather"))
