"""Checks loss-free balancing in one process: when the bias moves, how far, and what it must not change.  E experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from equimoe.moe import BalanceConfig, CapacityConfig, MoE, MoEConfig, RouterConfig, counting_pass
from equimoe.moe.balance.bias import proportional, sign

E, K, RATE = 6, 2, 0.01
DEEPSEEK = RouterConfig(score="sigmoid", weight_scale=2.5, groups=3, kept_groups=2)


def make(capacity: CapacityConfig | None = None, **balance: Any) -> MoE:
    torch.manual_seed(0)
    config = BalanceConfig(**{"coefficient": 0.0, "bias_update_rate": RATE, **balance})
    return MoE(MoEConfig(8, 8, E, K, router=DEEPSEEK, balance=config, capacity=capacity, init_std=0.7))


def tokens(number: int, count: int = 9) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(number)) + torch.linspace(-1, 1, 8)


def steps_of(layer: MoE, steps: int, micro_batches: int, optimizer: torch.optim.Optimizer) -> None:
    for step in range(steps):
        for m in range(micro_batches):
            layer(tokens(100 * step + m)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def frozen(layer: MoE) -> torch.optim.Optimizer:
    return torch.optim.SGD(layer.parameters(), lr=0.0)


def counts(layer: MoE, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return sum(layer.router(x).counts_BE.sum(0) for x in inputs)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_moves_once_per_step_by_exactly_the_rate(micro_batches: int) -> None:
    layer = make()
    inputs = [tokens(m) for m in range(micro_batches)]
    load_E = counts(layer, *inputs)
    steps_of(layer, 1, micro_batches, frozen(layer))
    want_E = RATE * (load_E.double().mean() - load_E).sign()
    assert torch.equal(layer.router.bias_E, want_E.float()) and bool(layer.router.bias_E.any())
    steps_of(layer, 3, micro_batches, frozen(layer))
    moves_E = layer.router.bias_E / RATE
    assert torch.allclose(moves_E, moves_E.round(), atol=1e-5) and float(moves_E.abs().max()) <= 4


def test_an_expert_at_the_mean_stays() -> None:
    assert sign(torch.tensor([3, 1, 2])).tolist() == [-1, 1, 0]
    assert sign(torch.tensor([2**60, 2**60 - 1, 2**60 - 2])).tolist() == [-1, 0, 1]  # fp64 would see no difference
    assert proportional(torch.tensor([3, 1, 2])).tolist() == [-0.5, 0.5, 0.0]
    assert proportional(torch.zeros(3, dtype=torch.int64)).tolist() == [0.0, 0.0, 0.0]


def test_proportional_rule() -> None:
    layer = make(bias_rule="proportional")
    load_E = counts(layer, tokens(0), tokens(1)).double()
    steps_of(layer, 1, 2, frozen(layer))
    assert torch.allclose(layer.router.bias_E.double(), RATE * (1 - load_E / load_E.mean()), rtol=1e-6)


def test_it_balances_without_a_loss() -> None:
    layer = make(bias_update_rate=0.02)
    before = layer_max_over_mean(layer)
    steps_of(layer, 60, 2, frozen(layer))
    assert layer_max_over_mean(layer) < 1 + 0.5 * (before - 1)


def layer_max_over_mean(layer: MoE) -> float:
    load_E = counts(layer, *(tokens(n, 50) for n in range(900, 910))).double()
    return float(load_E.max() / load_E.mean())


def test_chooses_and_never_weighs_and_has_no_gradient() -> None:
    layer, x = make(), tokens(1)
    layer.router.bias_E.copy_(torch.randn(E, generator=torch.Generator().manual_seed(3)) * 0.1)
    y = layer(x)
    y.square().sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    assert layer.router.bias_E.grad is None and not layer.router.bias_E.requires_grad
    assert "router.bias_E" not in dict(layer.named_parameters())
    layer.zero_grad()
    layer.router.bias_E.add_(0.25)  # a constant changes nothing
    again = layer(x)
    again.square().sum().backward()
    assert torch.equal(again, y)
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), gradients, strict=True))


def test_evaluation_recomputation_and_counting_ahead_do_not_move_it() -> None:
    plain, other = make(), make()
    optimizer = frozen(other)
    other.eval()
    other(tokens(5))
    other.train()
    with torch.no_grad():
        other(tokens(6))
    optimizer.step()  # a step without a micro-batch
    assert not other.router.bias_E.any()
    with counting_pass():
        for m in range(2):
            other(tokens(m))
    for m in range(2):
        checkpoint(other, tokens(m).requires_grad_(), use_reentrant=False).square().sum().backward()
    other.eval()
    other(tokens(7))
    other.train()
    optimizer.step()
    steps_of(plain, 1, 2, frozen(plain))
    assert torch.equal(other.router.bias_E, plain.router.bias_E)
    optimizer.step()  # again one without a micro-batch
    assert torch.equal(other.router.bias_E, plain.router.bias_E)


def test_reentrant_recomputation() -> None:
    plain, other = make(), make()
    optimizer = frozen(other)
    for m in range(2):
        checkpoint(other, tokens(m).requires_grad_(), use_reentrant=True).square().sum().backward()
    optimizer.step()
    steps_of(plain, 1, 2, frozen(plain))
    assert torch.equal(other.router.bias_E, plain.router.bias_E) and bool(plain.router.bias_E.any())


@pytest.mark.parametrize("given", [None, 2])
def test_skipped_step_does_not_move_it(given: int | None) -> None:
    """On overflow, a gradient scaler does not call the optimizer's step."""
    plain, other = make(micro_batches=given), make(micro_batches=given)
    optimizer = frozen(other)
    for m in range(2):
        other(tokens(50 + m)).square().sum().backward()
    optimizer.zero_grad()  # skipped
    for m in range(2):
        other(tokens(m)).square().sum().backward()
    assert not other.router.bias_E.any()
    optimizer.step()
    steps_of(plain, 1, 2, frozen(plain))
    assert torch.equal(other.router.bias_E, plain.router.bias_E)


def test_counts_are_those_before_a_drop() -> None:
    tight, free = make(CapacityConfig(0.5)), make()
    for layer in (tight, free):
        steps_of(layer, 1, 2, frozen(layer))
    assert tight.stats.dropped_fraction > 0.1
    assert torch.equal(tight.router.bias_E, free.router.bias_E)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_stays_fp32_whatever_the_layer_becomes(cast: torch.dtype) -> None:
    layer = make(bias_update_rate=1e-3).to(cast)
    assert layer.router.weight.dtype == cast and layer.router.bias_E.dtype == torch.float32
    optimizer = frozen(layer)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast == torch.bfloat16):
            y = layer(tokens(step).to(cast))
        y.float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert layer.router.bias_E.dtype == torch.float32
    moves_E = layer.router.bias_E.double() / 1e-3
    assert torch.allclose(moves_E, moves_E.round(), atol=1e-4) and bool(moves_E.any())


def test_state_dict_and_copies() -> None:
    layer = make()
    steps_of(layer, 2, 2, frozen(layer))
    assert "router.bias_E" not in make(bias_update_rate=0.0).state_dict()
    restored = make()
    restored.load_state_dict(layer.state_dict())
    assert torch.equal(restored.router.bias_E, layer.router.bias_E) and bool(layer.router.bias_E.any())
    twin, before_E = copy.deepcopy(layer), layer.router.bias_E.clone()
    steps_of(twin, 1, 2, frozen(twin))
    assert torch.equal(layer.router.bias_E, before_E) and not torch.equal(twin.router.bias_E, before_E)


def test_with_the_sequence_loss_of_deepseek_v3() -> None:
    """The bias moves by the whole step's load, whatever the scope of the loss."""
    layer = make(scope="sequence", coefficient=1e-4)
    load_E = counts(layer, tokens(0), tokens(1))
    steps_of(layer, 1, 2, frozen(layer))
    assert torch.equal(layer.router.bias_E, (RATE * sign(load_E).double()).float())


@pytest.mark.parametrize(
    ("router", "chosen"),
    [
        (RouterConfig(groups=2, group_worth="best"), [0, 1]),
        (RouterConfig(select="each_group", groups=2), [0, 2]),
        (RouterConfig(select="top_p", top_p=0.9), [0, 2]),
    ],
    ids=["best group", "each group", "top-p"],
)
def test_the_bias_chooses_in_fp64_too(router: RouterConfig, chosen: list[int]) -> None:
    """The bias itself stays fp32; -inf excludes an expert."""
    layer = MoE(MoEConfig(2, 4, 4, 2, router=router, balance=BalanceConfig(bias_update_rate=0.1))).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[2.0], [1.0], [0.9], [0.8]]).expand(4, 2))
    layer.router.bias_E.copy_(torch.tensor([0.0, -torch.inf, 0.1, 0.0]))
    routing = layer.router(torch.ones(1, 2, dtype=torch.float64))
    assert sorted(routing.ids_TK[0].tolist()) == chosen
