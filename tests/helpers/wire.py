"""Measures what every dispatcher sends for a known routing, and pairs it with the closed formula and the exchanges."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from equimoe.moe import CapacityConfig, DispatchConfig, MoEConfig, Routing
from equimoe.moe.collectives import record_traffic, split_axis, world_axis
from equimoe.moe.dispatch import build_dispatcher
from equimoe.moe.placement import Placement
from equimoe.moe.plan import traffic_formulas as traffic
from equimoe.moe.plan.traffic_formulas import Bytes, RoutedTokens
from equimoe.moe.types import Decision, DispatchPlan

T, D, K, E = 16, 6, 2, 8
CONFIG = MoEConfig(hidden_size=D, intermediate_size=4, num_experts=E, top_k=K, init_std=0.5)

#: name -> (expert ids of token t, nodes of two ranks that a token reaches, ranks that it reaches)
SPREADS = {
    "nodes": (lambda t: (t % E, (t + 4) % E), 2, 2),
    "ranks": (lambda t: (t % E, t % E // 4 * 4 + (t + 2) % 4), 1, 2),
    "one rank": (lambda t: (t % E, t % E ^ 1), 1, 1),
}


class Passed(NamedTuple):
    """What a rank sends in one pass through a layer."""

    exchanges: int
    sent: int


def routing(spread: str, dtype: torch.dtype) -> Routing:
    ids_TK = torch.tensor([SPREADS[spread][0](t) for t in range(T)])
    weights = torch.full((T, K), 0.5, dtype=dtype, requires_grad=True)
    counts = torch.bincount(ids_TK.flatten(), minlength=E)[None]
    return Routing(Decision(ids_TK, ids_TK), weights, counts, torch.tensor([T]), torch.zeros(1, E), torch.zeros(()))


def measure(
    rank: int, world: int, dispatch: DispatchConfig, capacity: CapacityConfig | None, etp: int, spread: str
) -> list[Passed]:
    """Return what this rank sends in a forward and in a backward, without counts."""
    axis, etp_axis = split_axis(world_axis(), etp)
    dispatcher = build_dispatcher(
        replace(CONFIG, dispatch=dispatch, capacity=capacity), Placement(ep=axis, etp=etp_axis)
    )
    x_TD = torch.randn(T, D, requires_grad=True)

    def experts(rows_SD: Tensor, plan: DispatchPlan) -> Tensor:
        return rows_SD * plan.weights_SK.sum(1, keepdim=True)

    with record_traffic() as forward:
        y_TD = dispatcher.finish(dispatcher.send(x_TD, routing(spread, torch.float32)), experts)
    with record_traffic() as backward:
        y_TD.sum().backward()
    assert {entry.size for entry in forward + backward} <= {2, 4}
    rows = [[entry.sent for entry in entries if entry.verb != "exchange_counts"] for entries in (forward, backward)]
    return [Passed(len(sent), sum(sent)) for sent in rows]


#: dispatcher, capacity, ranks that split each expert, exchanges of a forward and also of its backward, formula
Case = tuple[DispatchConfig, CapacityConfig | None, int, int, Bytes]


def cases(wire: str, spread: str) -> list[Case]:
    """Return every dispatcher with its formula, for 4 ranks of 2 nodes."""
    load = RoutedTokens(T, D, K, value=4, weight=4, wire=wire)
    _, nodes_each, ranks_each = SPREADS[spread]
    capacity = CapacityConfig(factor=1.0, pad=True)
    found: list[Case] = [
        (DispatchConfig(), None, 1, 2, traffic.all_to_all(load, 4)),
        (DispatchConfig(), None, 2, 4, traffic.all_to_all(load, 2, 2)),
        (DispatchConfig(), None, 4, 2, traffic.local(load, 4)),
        (DispatchConfig(), capacity, 1, 2, traffic.padded(load, 4, T * K // E, E)),
        (DispatchConfig("overlapped", chunks=2), None, 1, 4, traffic.all_to_all(load, 4)),
        (DispatchConfig("all_gather"), None, 1, 2, traffic.all_gather(load, 4)),
        (DispatchConfig("all_gather", equal_tokens=True), None, 2, 4, traffic.all_gather(load, 2, 2)),
        (
            DispatchConfig("hierarchical", node_size=2),
            None,
            1,
            4,
            traffic.hierarchical(load, 2, 2, nodes_each, ranks_each),
        ),
    ]
    return [(replace(dispatch, wire=wire), *rest) for dispatch, *rest in found]  # type: ignore[misc]
