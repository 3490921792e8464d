"""Checks that a layer whose experts are distributed equals one process that holds all tokens and all experts."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.moe import BalanceConfig, CapacityConfig, MoE, MoEConfig, recompute
from equimoe.moe.engines import Batch, build_engine
from equimoe.moe.parallel import ParallelConfig, build_mesh, clip_grad_norm_, parallelize
from tests.helpers import oracle
from tests.helpers.fork import run_ranks
from tests.helpers.recorded import Recorded
from tests.helpers.slow import slow_but

CONFIG = MoEConfig(
    hidden_size=8, intermediate_size=6, num_experts=4, top_k=2, balance=BalanceConfig(coefficient=0.2), init_std=0.5
)


def make(config: MoEConfig = CONFIG) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(MoE(config), torch.nn.Linear(8, 8), MoE(config)).double()


def tokens(rank: int, lengths: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(lengths[rank % len(lengths)], 8, dtype=torch.float64, generator=generator)


class Model(torch.nn.Sequential):
    """The model as the engine calls it: rows of one sequence; the layer may be recomputed."""

    again = False

    def forward(self, x: Tensor) -> Tensor:
        return recompute(super().forward, x) if self.again else super().forward(x)


def square(y: Tensor, _: Tensor) -> Tensor:
    return y.square().sum(-1)


def train(rank: int, world: int, ep: int, lengths: tuple[int, ...], config: MoEConfig, again: bool) -> dict[str, Any]:
    """Run three SGD steps; return the first's gradients and norm, and the final parameters."""
    model = Model(*make(config))
    model.again = again
    optimizer = Recorded()
    engine = build_engine(model, build_mesh(ParallelConfig(ep=ep)), optimizer, loss=square, max_norm=0.5)
    x_BSD = tokens(rank, lengths)[None]
    norms = [float(engine.step([Batch(x_BSD, x_BSD)], lr=0.1).norm) for _ in range(3)]
    return {"gradients": optimizer.gradients[0], "norm": norms[0], "parameters": optimizer.parameters}


def alone(world: int, lengths: tuple[int, ...], config: MoEConfig = CONFIG) -> dict[str, Any]:
    """Run the same steps in one process with the whole batch, the slow backend and torch's own norm."""
    model = make(replace(config, backend="reference"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.cat([tokens(rank, lengths) for rank in range(world)])
    result: dict[str, Any] = {}
    for step in range(3):
        (model(x).square().sum() / len(x)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if step == 0:
            result |= {"gradients": {name: p.grad.clone() for name, p in model.named_parameters()}, "norm": float(norm)}
        optimizer.step()
        optimizer.zero_grad()
    return result | {"parameters": {name: p.detach() for name, p in model.named_parameters()}}


@pytest.mark.parametrize("again", slow_but([False], [False, True]), ids=["plain", "recompute"])
@pytest.mark.parametrize("lengths", [(6,), (9, 1, 4, 2), (0, 7, 3, 0)], ids=["equal", "unequal", "zero"])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_equals_one_process(world: int, ep: int, lengths: tuple[int, ...], again: bool) -> None:
    if world == 1:
        lengths = (max(lengths),)
    want = alone(world, lengths)
    results = run_ranks(train, world, ep, lengths, CONFIG, again)
    for result in results:
        assert result["norm"] == pytest.approx(want["norm"], rel=1e-6)
        for kind in ("gradients", "parameters"):
            for name, value in want[kind].items():
                assert oracle.relative_error(result[kind][name], value) < 1e-10, (kind, name)


@pytest.mark.usefixtures("poison")
def test_every_token_on_one_experts_rank() -> None:
    """All choices go to the first rank's experts: other ranks get nothing and must still take part."""

    def script(rank: int, world: int) -> dict[str, Tensor]:
        mesh = build_mesh(ParallelConfig(ep=2))
        layer = collapsed()
        optimizer = Recorded()
        x_BSD = tokens(rank, (5, 3)).abs()[None]
        build_engine(layer, mesh, optimizer, loss=square).step([Batch(x_BSD, x_BSD)], lr=0.0)
        return optimizer.gradients[0]

    def collapsed() -> MoE:
        torch.manual_seed(0)
        layer = MoE(replace(CONFIG, balance=BalanceConfig(coefficient=0.0))).double()
        with torch.no_grad():
            layer.router.weight[:2] = 1.0
            layer.router.weight[2:] = -1.0
        return layer

    layer = collapsed()
    x = torch.cat([tokens(r, (5, 3)) for r in range(2)]).abs()
    (layer(x).square().sum() / len(x)).backward()
    for got in run_ranks(script, 2):
        for name, p in layer.named_parameters():
            assert oracle.relative_error(got[name], p.grad) < 1e-10, name
        assert float(got["experts.gate_up_proj"][2:].abs().max()) == 0.0


def test_capacity_counts_before_the_drop() -> None:
    """Capacity limits each rank's own choices; counts and the balance gradient must not change."""

    def script(rank: int, world: int, capacity: CapacityConfig | None) -> tuple[Tensor, float]:
        mesh = build_mesh(ParallelConfig(ep=2))
        torch.manual_seed(0)
        layer = MoE(replace(CONFIG, capacity=capacity)).double()
        parallelize(layer, mesh, reduced=True)
        (layer(tokens(rank, (8, 8))) * 0).sum().backward()
        return layer.router.weight.grad, layer.stats.dropped_fraction

    tight = run_ranks(script, 2, CapacityConfig(0.5))
    for (got, dropped), (want, _) in zip(tight, run_ranks(script, 2, None), strict=True):
        assert dropped > 0.2 and oracle.relative_error(got, want) < 1e-12


def test_split_that_does_not_fit_is_refused_before_the_exchange() -> None:
    def script(rank: int, world: int) -> str:
        from equimoe.moe.collectives import exchange_rows, world_axis

        try:
            exchange_rows(torch.zeros(3, 2), [1, 1], [1, 1], world_axis())
        except ValueError as error:
            return str(error)
        return ""

    assert all("sent=[1, 1], received=[1, 1]: do not fit rows.shape=(3, " in text for text in run_ranks(script, 2))


def test_same_collectives_on_every_rank() -> None:
    """torch's checker must find the same collectives on every rank, also on one without tokens."""

    def script(rank: int, world: int) -> bool:
        model = parallelize(make(), build_mesh(ParallelConfig(ep=2)), reduced=True)
        for _ in range(2):
            model(tokens(rank, (0, 5))).sum().backward()
        return bool(clip_grad_norm_(model.parameters(), 1.0).isfinite())

    assert run_ranks(script, 2, detail=True) == [True, True]


def test_norm_counts_split_gradients_once() -> None:
    """With all-ones gradients, the norm is the square root of the number of elements, whatever is sharded or
    replicated.
    """

    def script(rank: int, world: int, ep: int) -> tuple[float, float]:
        model = parallelize(make(), build_mesh(ParallelConfig(ep=ep)), reduced=True)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        norm = clip_grad_norm_(model.parameters(), 1.0)
        return float(norm), float(clip_grad_norm_(model.parameters(), 0.0))

    count = sum(p.numel() for p in make().parameters())
    for ep in (1, 2, 4):
        for norm, after in run_ranks(script, 4, ep):
            assert norm == pytest.approx(count**0.5, rel=1e-6) and after == pytest.approx(1.0, rel=1e-6)


def test_norm_that_is_not_finite_scales_nothing() -> None:
    model = make()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[1].bias.grad[0] = float("nan")
    before = copy.deepcopy([p.grad for p in model.parameters()])
    assert not clip_grad_norm_(model.parameters(), 1.0).isfinite()
    for p, grad in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad.nan_to_num(7.0), grad.nan_to_num(7.0))
