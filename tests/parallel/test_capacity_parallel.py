"""Checks that capacity over ranks equals one process that holds all tokens, and that padding changes no number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from equimoe.moe import CapacityConfig, DispatchConfig, MoE, MoEConfig, Placement, Routing
from equimoe.moe.collectives import record_traffic, world_axis
from equimoe.moe.dispatch import build_capacity, build_dispatcher
from equimoe.moe.dispatch.capacity import DROP_POLICIES
from equimoe.moe.types import Decision
from tests.helpers import oracle
from tests.helpers.fork import run_ranks
from tests.moe.test_capacity import CONFIG, keep, random_routing


def part(whole: Routing, tokens: Tensor, sequences: int) -> Routing:
    """Return the routing of some of the tokens."""
    chosen_TK, ids_TK = (t[tokens] for t in whole.decision)
    valid_T = (ids_TK >= 0).any(1)
    return replace(
        whole,
        decision=Decision(chosen_TK, ids_TK),
        weights_TK=whole.weights_TK[tokens],
        counts_BE=torch.zeros(sequences, 8).long(),
        tokens_B=valid_T.view(sequences, -1).sum(1),
    )


@pytest.mark.parametrize("drop", DROP_POLICIES)
@pytest.mark.parametrize("level", ["expert", "device"])
@pytest.mark.parametrize("kind", ["plain", "ties", "masked"])
def test_global_scope(drop: Any, level: Any, kind: str) -> None:
    """Ranks have different numbers of tokens, and one has none; kept choices equal one process with tokens in rank
    order.
    """
    lengths = (9, 0, 4, 11)
    whole = random_routing(sum(lengths), 7, ties=kind == "ties", masked=kind == "masked")
    capacity = CapacityConfig(0.6, drop, scope="global", level=level)

    def script(rank: int, world: int) -> list[list[int]]:
        start = sum(lengths[:rank])
        mine = part(whole, torch.arange(start, start + lengths[rank]), 1)
        limit = build_capacity(replace(CONFIG, capacity=capacity), Placement(tokens=world_axis(), ep=world_axis()))
        return limit(mine).ids_TK.tolist()

    bins = 8 if level == "expert" else 4
    valid = int(whole.tokens_B.sum())
    want = keep(whole.ids_TK.tolist(), whole.weights_TK.tolist(), valid, capacity, bins)
    assert [row for rows in run_ranks(script, 4) for row in rows] == want


@pytest.mark.parametrize("drop", DROP_POLICIES)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("balanced", [False, True])
def test_sequence_scope(drop: Any, world: int, balanced: bool) -> None:
    """Each rank holds a part of three sequences (consecutive, or from both ends); the result equals whole sequences."""
    sequences, length = 3, 8
    whole = random_routing(sequences * length, 11, sequences, ties=True)
    capacity = CapacityConfig(0.6, drop, scope="sequence")
    held_RS = torch.arange(length).view(world, -1)
    if balanced:
        chunks = torch.arange(length).chunk(2 * world)
        held_RS = torch.stack([torch.cat((chunks[r], chunks[-1 - r])) for r in range(world)])
    places = torch.arange(sequences)[:, None, None] * length + held_RS

    def script(rank: int, world: int) -> list[list[int]]:
        mine = part(whole, places[:, rank].flatten(), sequences)
        placement = Placement(sequence=world_axis(), positions_S=held_RS[rank] if balanced else None)
        limit = build_capacity(replace(CONFIG, capacity=capacity), placement)
        return limit(mine).ids_TK.tolist()

    got = torch.empty(sequences * length, 3, dtype=torch.int64)
    for rank, ids in enumerate(run_ranks(script, world)):
        got[places[:, rank].flatten()] = torch.tensor(ids)
    want = keep(whole.ids_TK.tolist(), whole.weights_TK.tolist(), sequences * length, capacity, 8)
    assert got.tolist() == want


def test_local_scope_asks_nobody() -> None:
    def script(rank: int, world: int) -> tuple[int, list[list[int]]]:
        limit = build_capacity(
            replace(CONFIG, capacity=CapacityConfig(0.6)),
            Placement(sequence=world_axis(), tokens=world_axis(), ep=world_axis()),
        )
        with record_traffic() as traffic:
            ids = limit(random_routing(9, rank)).ids_TK.tolist()
        return len(traffic), ids

    for rank, (count, ids) in enumerate(run_ranks(script, 2)):
        routing = random_routing(9, rank)
        assert count == 0
        assert ids == keep(routing.ids_TK.tolist(), routing.weights_TK.tolist(), 9, CapacityConfig(0.6), 8)


# ---- padded exchange ----------------------------------------------------------------------------------------------


def layer_on(rank: int, config: MoEConfig) -> MoE:
    torch.manual_seed(0)
    layer, axis = MoE(config).double(), world_axis()
    for name, weight in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, nn.Parameter(weight.detach().chunk(axis.size)[rank].clone()))
    layer.dispatcher = build_dispatcher(config, Placement(ep=axis))
    return layer


def step(layer: MoE, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x, mask)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("dispatch", [DispatchConfig(), DispatchConfig("overlapped", chunks=4)], ids=["one", "chunks"])
@pytest.mark.parametrize("factor", [0.4, 1.0, 8.0])
@pytest.mark.usefixtures("poison")
def test_padding_changes_no_number(dispatch: DispatchConfig, factor: float) -> None:
    """Output and all gradients, with the balance gradient, must equal those of the same drop without padding."""
    lengths = (6, 0, 9, 3)

    def script(rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
        x = torch.randn(lengths[rank], 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        mask = torch.arange(lengths[rank]) != 2
        plain = replace(CONFIG, capacity=CapacityConfig(factor), dispatch=dispatch)
        padded = replace(plain, capacity=CapacityConfig(factor, pad=True, max_tokens=9))
        exact, layer = layer_on(rank, plain), layer_on(rank, padded)
        return step(layer, x, mask), step(exact, x, mask), layer.stats.dropped_fraction

    for rank, (got, want, dropped) in enumerate(run_ranks(script, 4)):
        for name, value in want.items():
            assert oracle.relative_error(got[name], value) < 1e-12, name
        assert factor > 0.4 or rank != 2 or dropped > 0.2


def test_padded_sizes_are_the_same_for_every_routing_and_need_no_answer() -> None:
    """The ranks exchange no counts, and the host reads nothing from the device, whatever the routing."""

    def script(rank: int, world: int) -> list[tuple[str, int]]:
        config = replace(CONFIG, capacity=CapacityConfig(1.0, pad=True))
        layer = layer_on(rank, config)
        sizes: list[tuple[str, int]] = []
        real = dist.all_to_all_single

        def spy(out: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> Any:
            sizes.append((str(out.dtype), len(sent)))
            return real(out, sent, *args, **kwargs)

        dist.all_to_all_single = spy
        for seed in range(2):
            with torch.no_grad():
                layer.router.weight.copy_(torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)))
            layer(torch.randn(10, 6, dtype=torch.float64))
        return sizes

    rows = 8 * 4  # ceil(1.0 * 3 * 10 / 8) for each of eight experts
    for sizes in run_ranks(script, 2):
        assert len(sizes) == 4 and all(size[1] == rows and size[0] != "torch.int64" for size in sizes)


def test_more_tokens_than_the_exchange_is_made_for() -> None:
    def script(rank: int, world: int) -> str:
        layer = layer_on(rank, replace(CONFIG, capacity=CapacityConfig(pad=True, max_tokens=4)))
        try:
            layer(torch.zeros(5, 6, dtype=torch.float64))
        except ValueError as error:
            return str(error)
        return ""

    want = "capacity.max_tokens=4: this forward has 5 tokens; set it to the maximum"
    assert run_ranks(script, 2) == [want, want]
