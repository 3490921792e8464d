"""Compares every scope, alone and with others, with its definition, in one process.

E experts, D expert-parallel ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from equimoe.moe import BalanceConfig, CapacityConfig, ExtraLossConfig, MoE, MoEConfig, RouterConfig, counting_pass
from equimoe.moe.balance.losses import SCOPES as SCOPES_OF_LOSSES
from tests.helpers import oracle
from tests.helpers.placed import spread_experts

E, K, D = 8, 3, 4


def make(router: RouterConfig | None = None, **balance: Any) -> MoE:
    torch.manual_seed(0)
    config = BalanceConfig(**{"coefficient": 0.0, "micro_batches": 2, "estimator": "exact", **balance})
    moe = MoEConfig(6, 8, E, K, router=router or RouterConfig(), balance=config, init_std=0.7)
    layer = MoE(moe).double()
    spread_experts(layer, D)
    return layer


def inputs() -> tuple[list[Tensor], list[Tensor]]:
    """Return two micro-batches of three sequences of seven tokens, and masks that leave different numbers of them."""
    generator = torch.Generator().manual_seed(1)
    centre = torch.tensor([1.0, -1.0])[:, None, None, None]
    x = torch.randn(2, 3, 7, 6, generator=generator, dtype=torch.float64) + centre
    mask = torch.arange(7) < torch.tensor([[7, 3, 0], [5, 7, 6]])[..., None]
    return list(x), list(mask)


def train(layer: MoE) -> Tensor:
    layer.zero_grad()
    xs, masks = inputs()
    with counting_pass():
        for x, mask in zip(xs, masks, strict=True):
            layer(x, mask)
    for x, mask in zip(xs, masks, strict=True):
        (layer(x, mask) * 0).sum().backward()
    layer.balancer.step.end(applied=False)
    return layer.router.weight.grad.clone()


def defined(layer: MoE, scope: str) -> Tensor:
    """Return the step's loss as its paper defines it."""
    parts = [(x.flatten(0, 1), mask.flatten()) for x, mask in zip(*inputs(), strict=True)]
    whole = torch.cat([x for x, _ in parts]), torch.cat([mask for _, mask in parts])
    if scope == "global":
        return oracle.balance_loss(layer, *whole)
    if scope in ("micro", "data_parallel"):  # the same with one rank
        return sum(oracle.balance_loss(layer, *part) for part in parts) / 2
    if scope == "sequence":
        losses = []
        for x_BSD, mask_BS in zip(*inputs(), strict=True):
            each = [oracle.balance_loss(layer, x[m]) for x, m in zip(x_BSD, mask_BS, strict=True) if m.any()]
            losses.append(sum(each) / len(x_BSD))
        return sum(losses) / 2
    losses = []
    for x, mask in parts:
        _, probs_TE, ids_TK, _ = oracle.route(layer, x[mask])
        tokens, loss = len(ids_TK), torch.zeros(())
        for d in range(D):
            held = range(d * E // D, (d + 1) * E // D)
            prob = sum(probs_TE[:, e].mean() for e in held)
            if scope == "device":  # f_i = E / (K T) * choices
                f = sum(E / (K * tokens) * int((ids_TK == e).sum()) for e in held) / len(held)
            else:
                arrivals = sum(any(e in held for e in row) for row in ids_TK.tolist())
                f = D / min(K, layer.config.router.reach(D)) / tokens * arrivals
            loss = loss + f * prob
        losses.append(loss)
    return sum(losses) / 2


def gradient(layer: MoE, loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, layer.router.weight)[0]


SCOPES = ("global", "micro", "sequence", "data_parallel", "device", "communication")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("beside", [False, True])
def test_scope_is_its_definition(scope: str, beside: bool) -> None:
    """Each scope is tested as the main loss, and as an extra loss next to a main loss of weight 0."""
    if beside and scope != "global":
        layer = make(extra=ExtraLossConfig(**{scope: 0.3}))
    else:
        layer = make(scope=scope, coefficient=0.3)
    want = gradient(layer, 0.3 * defined(layer, scope))
    assert float(want.norm()) > 1e-4 and oracle.relative_error(train(layer), want) < 1e-12


@pytest.mark.parametrize("scope", ["global", "micro", "sequence", "data_parallel"])
def test_first_choices_alone_may_count(scope: str) -> None:
    """Losses are 1.0 when balanced, all choices are in the statistics, and a capacity drops after counting."""
    layer = make(scope=scope, coefficient=0.3, counts="first")
    want, both = gradient(layer, 0.3 * defined(layer, scope)), train(make(scope=scope, coefficient=0.3))
    got = train(layer)
    assert oracle.relative_error(got, want) < 1e-12 < 0.05 < oracle.relative_error(both, want)
    totals, (_, masks) = layer.balancer.previous_step, inputs()
    assert int(totals.counts_E.sum()) == int(totals.tokens) == sum(int(m.sum()) for m in masks)
    assert int(layer.stats.counts.sum()) == K * int(masks[1].sum())
    assert layer.stats.losses["micro"] == pytest.approx(oracle.balance_loss(layer, inputs()[0][1][masks[1]]).item())
    dropping = MoE(replace(layer.config, capacity=CapacityConfig(0.5))).double()
    dropping.load_state_dict(layer.state_dict())
    assert oracle.relative_error(train(dropping), got) < 1e-12


def test_communication_counts_a_token_once_per_rank_and_knows_the_reach() -> None:
    layer = make(RouterConfig(groups=D, kept_groups=2), scope="communication", coefficient=1.0)
    train(layer)
    arrivals = layer.balancer.previous_step.losses[0].loads.view(D, -1)
    assert torch.equal(arrivals[:, 0], arrivals[:, 1])
    assert float(arrivals[:, 0].mean()) == pytest.approx(1.0, abs=0.15)  # nearly all tokens reach both of their ranks


def test_several_losses_add_up_each_with_its_coefficient() -> None:
    weights = {"micro": 0.01, "sequence": 1e-4, "data_parallel": 0.2, "device": 0.05, "communication": 0.02}
    layer = make(coefficient=0.5, extra=ExtraLossConfig(**weights), router=RouterConfig(z_loss=1e-3))
    xs, masks = inputs()
    valid = torch.cat([x[mask] for x, mask in zip(xs, masks, strict=True)])
    z = oracle.route(layer, valid)[0].logsumexp(-1).square().mean()
    loss = 0.5 * defined(layer, "global") + 1e-3 * z + sum(w * defined(layer, s) for s, w in weights.items())
    assert oracle.relative_error(train(layer), gradient(layer, loss)) < 1e-12


@pytest.mark.parametrize("scope", SCOPES)
def test_z_loss_is_a_mean_over_the_step_under_every_scope(scope: str) -> None:
    """The z-loss is a mean over tokens, or over micro-batches if the main loss is a mean over micro-batches."""
    layer = make(RouterConfig(z_loss=0.1), scope=scope)
    valid = [x[mask] for x, mask in zip(*inputs(), strict=True)]
    parts = [torch.cat(valid)] if scope == "global" else valid
    z = sum(oracle.route(layer, part)[0].logsumexp(-1).square().mean() for part in parts) / len(parts)
    assert oracle.relative_error(train(layer), gradient(layer, 0.1 * z)) < 1e-12


def test_one_percent_of_micro_beside_the_global_loss() -> None:
    layer = make(coefficient=1.0, extra=ExtraLossConfig(micro=0.01))
    want = gradient(layer, defined(layer, "global") + 0.01 * defined(layer, "micro"))
    assert oracle.relative_error(train(layer), want) < 1e-12


def test_experts_on_one_rank_have_no_device_loss() -> None:
    layer = make(scope="device", coefficient=1.0)
    spread_experts(layer, 1)
    assert float(train(layer).abs().max()) < 1e-15


def test_every_scope_can_be_chosen_as_the_main_loss_and_as_an_extra_one() -> None:
    choices = get_args(get_type_hints(BalanceConfig)["scope"])
    assert set(SCOPES) == set(SCOPES_OF_LOSSES) == set(choices) == {"global", *vars(ExtraLossConfig())}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"extra": {"micro": -1.0}}, "balance.extra.micro=-1.0: must not be negative; 0 switches it off"),
        ({"estimator": "last"}, "balance.estimator='last': use one of rolling, carry, adaptive, exact"),
        ({"scale_convention": "x"}, "balance.scale_convention='x': use one of exact, megatron"),
        ({"bias_rule": "x"}, "balance.bias_rule='x': use one of sign, proportional"),
        ({"bias_update_rate": -1.0}, "balance.bias_update_rate=-1.0: must not be negative"),
    ],
)
def test_mistakes(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        if "extra" in wrong:
            wrong = {"extra": ExtraLossConfig(**wrong["extra"])}
        BalanceConfig(**wrong)
    assert message in str(error.value)
