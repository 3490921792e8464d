"""Checks that MoGE exchanges rows without asking for sizes.  T tokens, D hidden, E experts, K top-k, P ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from equimoe.moe import DispatchConfig, MoE, MoEConfig, RouterConfig
from equimoe.moe.collectives import no_gradient, record_traffic, world_axis
from equimoe.moe.dispatch import chooses_evenly
from equimoe.moe.placement import Owners, Placement
from equimoe.moe.types import DispatchPlan
from tests.helpers import oracle
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but

T, D, E, K = 13, 6, 16, 4
EVEN = DispatchConfig(equal_tokens=True)
CONFIG = MoEConfig(D, 4, E, K, RouterConfig(select="each_group", groups=4), dispatch=EVEN, init_std=0.5)


def forward(config: MoEConfig, owners: Owners, masked: bool, adversarial: bool) -> tuple[list[Tensor], list[str], int]:
    """Return output and gradients on this rank, the exchanges of the forward, and the rows that its experts got."""
    axis = world_axis()
    torch.manual_seed(0)
    layer = MoE(config).double()
    with torch.no_grad():
        if adversarial:  # all mass in one expert of the first group
            layer.router.weight[1] += 100.0
        for name, weight in list(layer.experts.named_parameters()):
            own = weight[owners.experts_of(axis.rank)].clone()
            setattr(layer.experts, name, torch.nn.Parameter(own))
    layer.place(Placement(tokens=axis, ep=axis, owners=owners))
    x_TD = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(axis.rank)).abs()
    mask_T = torch.arange(T) % 3 != axis.rank if masked else None
    rows: list[int] = []
    compute = layer.experts.compute

    def counted(rows_SD: Tensor, plan: DispatchPlan, *weights: Tensor) -> Tensor:
        rows.append(len(rows_SD))
        return compute(rows_SD, plan, *weights)

    layer.experts.compute = counted
    x_TD.requires_grad_()
    with record_traffic() as entries:
        y_TD = layer(x_TD, mask_T)
    y_TD.square().sum().backward()
    verbs = [entry.verb for entry in entries if entry.verb != "sum_over"]  # the load of the step, after the rows
    return [y_TD.detach(), x_TD.grad, *(p.grad for p in layer.parameters())], verbs, sum(rows)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("ranks", slow_but([2], [2, 4]))
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_no_rank_asks_for_sizes(ranks: int, chunks: int, masked: bool) -> None:
    """The host reads nothing, every rank gets T K rows for any logits, and the result is that with sizes."""
    dispatch = replace(EVEN, name="overlapped", chunks=chunks) if chunks > 1 else EVEN

    def refused(*_: Any) -> Any:
        raise AssertionError("the host asked for sizes")

    def even(rank: int, world: int) -> list[Any]:
        with patch.object(no_gradient, "on_host", refused):
            return [
                forward(replace(CONFIG, dispatch=dispatch), owners_of(world), masked, adversarial)
                for adversarial in (False, True)
            ]

    def asking(rank: int, world: int) -> list[Any]:
        plain = replace(CONFIG, dispatch=replace(dispatch, equal_tokens=False))
        return [forward(plain, owners_of(world), masked, adversarial) for adversarial in (False, True)]

    for found, wanted in zip(run_ranks(even, ranks), run_ranks(asking, ranks), strict=True):
        for (got, verbs, rows), (want, others, _) in zip(found, wanted, strict=True):
            assert max(oracle.relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-12
            assert verbs == ["exchange_slots", *["exchange_rows"] * 2 * chunks]
            assert others[0] == "exchange_counts"
            assert rows == ranks * chunks * -(-T * K // ranks // chunks)


def owners_of(world: int) -> Owners:
    """Give the first groups to the last ranks."""
    return Owners.of_ranks(world, [world - 1 - e * world // E for e in range(E)])


def test_only_whole_groups_on_every_rank_are_even() -> None:
    pairs = [e // 2 % 2 for e in range(E)]
    assert chooses_evenly(CONFIG, Owners.consecutive(E, 4)) and chooses_evenly(CONFIG, owners_of(2))
    assert not chooses_evenly(CONFIG, Owners.of_ranks(2, pairs))
    assert not chooses_evenly(CONFIG, Owners.of_ranks(2, [0] * 12 + [1] * 4))
    assert not chooses_evenly(CONFIG, Owners.consecutive(E, 8))
    assert not chooses_evenly(replace(CONFIG, dispatch=DispatchConfig()), Owners.consecutive(E, 4))
    assert not chooses_evenly(replace(CONFIG, router=RouterConfig(groups=4, kept_groups=4)), Owners.consecutive(E, 4))
