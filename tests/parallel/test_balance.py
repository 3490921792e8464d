"""Checks that the balance gradient over ranks equals that of one process that holds the whole batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from equimoe.moe import BalanceConfig, MoE, MoEConfig, RouterConfig
from tests.helpers import oracle
from tests.helpers.fork import run_ranks
from tests.helpers.placed import reduce_by

CONFIG = MoEConfig(
    hidden_size=8,
    intermediate_size=8,
    num_experts=8,
    top_k=2,
    balance=BalanceConfig(coefficient=0.7),
    init_std=0.6,
)


def make(config: MoEConfig = CONFIG) -> MoE:
    torch.manual_seed(0)
    return MoE(config).double()


def tokens(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens of which a different number is valid on each rank: 12, 5, 0, 9, ..."""
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(12, 8, dtype=torch.float64, generator=generator)
    return x, torch.arange(12) < (12, 5, 0, 9)[rank % 4]


def whole(world: int) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [tokens(rank) for rank in range(world)]
    return torch.cat([x for x, _ in parts]), torch.cat([mask for _, mask in parts])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_router_gradient_in_anybodys_ddp_script(world: int) -> None:
    """A user's script uses plain DDP around the layer, without mesh or engine; valid tokens differ, and one rank has
    none.
    """

    def script(rank: int, world: int) -> tuple[torch.Tensor, float]:
        layer = make(replace(CONFIG, router=RouterConfig(z_loss=0.01)))
        model = DistributedDataParallel(layer) if world > 1 else layer
        x, mask = tokens(rank)
        (model(x, mask) * 0).sum().backward()
        return layer.router.weight.grad, layer.stats.losses["global"]

    layer = make()
    x, mask = whole(world)
    logits_TE, *_ = oracle.route(layer, x[mask])
    loss = oracle.balance_loss(layer, x, mask)
    (0.7 * loss + 0.01 * logits_TE.logsumexp(-1).square().mean()).backward()
    for grad, _ in run_ranks(script, world):
        assert oracle.relative_error(grad, layer.router.weight.grad) < 1e-10


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_engines_that_take_the_mean_or_the_sum(reduction: str) -> None:
    def script(rank: int, world: int) -> torch.Tensor:
        layer = make()
        reduce_by(layer, reduction)
        x, mask = tokens(rank)
        (layer(x, mask) * 0).sum().backward()
        return layer.router.weight.grad

    layer = make()
    (0.7 * oracle.balance_loss(layer, *whole(4))).backward()
    joined = torch.stack(run_ranks(script, 4))
    joined = joined.mean(0) if reduction == "mean" else joined.sum(0)
    assert oracle.relative_error(joined, layer.router.weight.grad) < 1e-10


def test_scale_does_not_depend_on_the_number_of_ranks() -> None:
    """All ranks hold the same data; the gradient must be that of one rank, not 1/dp of it."""

    def script(rank: int, world: int, scope: str) -> torch.Tensor:
        layer = make(replace(CONFIG, balance=replace(CONFIG.balance, scope=scope)))
        model = DistributedDataParallel(layer) if world > 1 else layer
        (model(tokens(0)[0]) * 0).sum().backward()
        return layer.router.weight.grad

    alone = run_ranks(script, 1, "micro")[0]
    for world in (1, 2, 4):
        for scope in ("global", "micro", "sequence"):
            assert oracle.relative_error(run_ranks(script, world, scope)[0], alone) < 1e-10, (world, scope)


def domain(rank: int) -> torch.Tensor:
    """Return tokens that choose only experts 2r and 2r+1; over the ranks, all pairs are equally probable."""
    x = torch.zeros(10, 8, dtype=torch.float64)
    x[:, 2 * rank : 2 * rank + 2] = 1.0
    return x


def test_disjoint_domains_are_balanced_globally_and_not_locally() -> None:
    """Tokens of four ranks go to disjoint experts: the global loss is 1 and has no gradient."""

    def script(rank: int, world: int, scope: str) -> tuple[torch.Tensor, dict[str, float]]:
        layer = make(replace(CONFIG, balance=replace(CONFIG.balance, scope=scope)))
        with torch.no_grad():
            layer.router.weight.copy_(3 * torch.eye(8))
        model = DistributedDataParallel(layer)
        (model(domain(rank)) * 0).sum().backward()
        return layer.router.weight.grad, layer.stats.losses

    for grad, losses in run_ranks(script, 4, "global"):
        assert float(grad.abs().max()) < 1e-15
        assert losses["global"] == pytest.approx(1.0, abs=1e-12) and losses["micro"] > 3
    for grad, _ in run_ranks(script, 4, "micro"):
        assert float(grad.norm()) > 1e-2


def test_rank_without_tokens_and_rank_that_recomputes() -> None:
    from torch.utils.checkpoint import checkpoint

    def script(rank: int, world: int, kind: str) -> tuple[torch.Tensor, list[int]]:
        layer = make()
        layer.router.register_forward_hook(lambda *_: None)
        x = tokens(rank)[0][: (12, 0, 3, 5)[rank]].clone().requires_grad_()
        y = layer(x) if kind == "plain" else checkpoint(layer, x, use_reentrant=kind == "reentrant")
        (y * 0).sum().backward()
        return layer.router.weight.grad, layer.balancer.step.layers[0].totals(layer.balancer.visits[0]).tolist()

    plain = run_ranks(script, 4, "plain")
    assert all(total == plain[0][1] and total[-1] == 20 for _, total in plain)
    for kind in ("reentrant", "non-reentrant"):
        for (grad, total), (want, want_total) in zip(run_ranks(script, 4, kind), plain, strict=True):
            assert total == want_total and torch.equal(grad, want), kind
