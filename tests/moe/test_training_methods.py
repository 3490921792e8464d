"""Frozen weights, NormHead, and random routing in the first steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from equimoe.moe import MoE, MoEConfig, RouterConfig
from equimoe.moe.model.head import NormHead
from equimoe.moe.train.build import freeze
from equimoe.moe.train.config import OptimConfig, TrainConfig
from tests.helpers import small
from tests.helpers.trained import make
from tests.moe.test_train import trainer_of


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return small.on(small.write_texts(tmp_path / "texts"), steps=4)


def test_frozen_routers_stay_and_all_else_is_trained(config: TrainConfig) -> None:
    trainer = trainer_of(replace(config, optim=OptimConfig(frozen="router, embedding")))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train_step()
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]) == ("router" in name or "embedding" in name), name


def test_frozen_parts_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="optim.frozen=roter: no weight's name contains 'roter'; one is head.weight"):
        freeze(make(), "roter")
    with pytest.raises(ValueError, match="optim.frozen=e,r: freezes every weight"):
        freeze(make(), "e,r")
    with pytest.raises(ValueError, match="optim.frozen='router,': has an empty part"):
        OptimConfig(frozen="router,")


def test_a_norm_head_ignores_the_lengths_of_its_rows() -> None:
    torch.manual_seed(0)
    head, x = NormHead(5, 7).double(), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    cosines = F.cosine_similarity(x[:, None], head.weight[None], dim=-1)
    want = cosines * x.norm(dim=1, keepdim=True)
    got = head(x)
    torch.testing.assert_close(got, want)
    inputs = [x, head.weight]
    for mine, theirs in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (got, want)), strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        head.weight *= torch.rand(7, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(head(x), got)


def test_a_run_has_a_norm_head_if_asked(config: TrainConfig) -> None:
    trainer = trainer_of(replace(config, model=replace(config.model, norm_head=True)))
    assert isinstance(trainer.model.head, NormHead)
    assert bool(trainer.train_step().isfinite())


def test_routing_is_uniform_at_first_and_the_routers_own_at_last() -> None:
    """For a router that sends every token to the same two experts. Evaluation never sees the noise."""
    torch.manual_seed(0)
    layer = MoE(MoEConfig(8, 4, 8, 2, router=RouterConfig(random_steps=10)))
    x = torch.randn(4096, 8).abs()
    with torch.no_grad():
        layer.router.weight.copy_(torch.arange(8.0)[:, None].expand(8, 8))
    shares = []
    for step in (0, 5, 10, 99):
        layer.router.begin_step(step)
        layer(x)
        shares.append(layer.stats.counts.double() / 8192)
        layer.eval()
        assert set(layer.router(x).ids_TK.flatten().tolist()) == {6, 7}
        layer.train()
    deviation = (1 / 8 * 7 / 8 / 8192) ** 0.5
    assert float((shares[0] - 1 / 8).abs().max()) < 5 * deviation
    assert 1 / 8 < float(shares[1][7]) <= 0.5 and float(shares[1][:6].sum()) > 0.01
    assert shares[2].tolist() == shares[3].tolist() == [0] * 6 + [0.5, 0.5]


def test_padding_has_no_part_in_the_random_routing() -> None:
    """The noise has the mean and deviation of the valid tokens' logits only."""
    router = MoE(MoEConfig(8, 4, 8, 2, router=RouterConfig(random_steps=10))).router
    router.begin_step(5)
    x, mask = torch.randn(12, 8), torch.arange(12) % 3 > 0

    def weights(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return router(x, mask).weights_TK[mask]

    assert torch.equal(weights(x), weights(torch.where(mask[:, None], x, 1e4)))
    assert not torch.equal(weights(x), router(x).weights_TK[mask])


def test_a_run_lowers_the_randomness(config: TrainConfig) -> None:
    router = replace(config.moe.router, random_steps=4)
    trainer = trainer_of(replace(config, moe=replace(config.moe, router=router)))
    for step in range(3):
        trainer.train_step()
        assert {layer.router.randomness for layer in trainer.layers.values()} == {1 - step / 4}
