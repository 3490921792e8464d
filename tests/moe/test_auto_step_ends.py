"""Checks which optimizer, forward or backward ends a step that the loop does not drive."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from equimoe.moe import MoE
from tests.helpers.fork import run_ranks
from tests.helpers.one_layer import balance_only, batches, make, seen


@pytest.mark.parametrize("wrap", [None, DistributedDataParallel, fully_shard])
@pytest.mark.parametrize("given", [None, 2])
def test_another_models_optimizer_beside_a_frozen_layer(given: int | None, wrap: Any) -> None:
    """As adapters of the attention alone: the optimizer counts that trains what precedes the layer. A step may be
    skipped, or shorter than announced. FSDP2 keeps the gradient elsewhere, so that a skipped step shows only if its
    length is known."""

    def script(rank: int, world: int) -> None:
        model, other = nn.Sequential(nn.Linear(6, 6), make(micro_batches=given), nn.Linear(6, 6)), nn.Linear(6, 1)
        layer = model[1].requires_grad_(False)
        optimizer, foreign = torch.optim.SGD(model[::2].parameters(), lr=0.0), torch.optim.SGD(other.parameters())
        whole = model if wrap is None else wrap(model)
        if wrap is fully_shard:  # its parameters are new ones
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        for length, skipped in ((2, False), (2, True), (2, False), (1, False), (2, False)):
            for x in batches(length):
                whole(x).sum().backward()
                other(x).sum().backward()
                foreign.step()
            assert seen(layer) == [len(x) for x in batches(length)]
            if not skipped or (given is None and wrap is fully_shard):
                optimizer.step()
                assert layer.balancer.previous_step.micro_batches == length
            optimizer.zero_grad()

    warnings.simplefilter("ignore")
    script(0, 1) if wrap is None else run_ranks(script, 2)


def test_another_models_parameter_of_the_same_shape_ends_no_step_of_a_frozen_layer() -> None:
    model, other = nn.Sequential(nn.Linear(6, 6), make()), nn.Linear(6, 6)
    foreign = torch.optim.SGD(other.parameters())
    model[1].requires_grad_(False)
    loss = model(batches(1)[0]).sum()
    foreign.step()
    loss.backward()
    assert seen(model[1]) == [5]
    with pytest.raises(ValueError, match="SGD: it holds no weight of this MoE layer, but perhaps copies"):
        foreign.step()


@pytest.mark.parametrize("given", [1, 2])
def test_a_frozen_layer_behind_no_parameter_ends_with_the_announced_number(given: int) -> None:
    """The input is a leaf, as in a reentrant checkpoint, so the optimizer that trains what precedes it is unknown."""
    layer, other = make(micro_batches=given).requires_grad_(False), torch.optim.SGD(nn.Linear(6, 6).parameters())
    for x in batches(2):
        layer(x.requires_grad_()).sum().backward()
        other.step()
        assert seen(layer) == ([5] if given == 2 and len(x) == 5 else [])


def a_forward(layer: MoE) -> None:
    layer(torch.randn(9, 6))


def a_gradient_of_the_input(layer: MoE) -> None:
    x = torch.randn(9, 6).requires_grad_()
    torch.autograd.grad(layer(x).sum(), x)


@pytest.mark.parametrize("given", [None, 2])
@pytest.mark.parametrize("stray", [a_forward, a_gradient_of_the_input])
def test_nothing_trains_on_a_forward_before_the_update(stray: Callable[[MoE], None], given: int | None) -> None:
    """The step ends with the update, and not at the forward, so the bias moves."""
    layer, plain = make(micro_batches=given, bias_update_rate=0.1), make(micro_batches=given, bias_update_rate=0.1)
    for one in (layer, plain):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.0)
        for step in range(3):
            for x in batches(2, seed=step):
                balance_only(one, x)
                if one is layer:
                    stray(one)
            optimizer.step()
            assert one.balancer.previous_step.micro_batches == 2
            if step < 2:
                one.zero_grad()
    assert torch.equal(layer.router.weight.grad, plain.router.weight.grad)
    assert torch.equal(layer.router.bias_E, plain.router.bias_E) and bool(plain.router.bias_E.any())


@pytest.mark.parametrize("given", [None, 2])
def test_a_forward_that_is_kept_is_refused_at_the_update(given: int | None) -> None:
    layer = make(micro_batches=given)
    for x in batches(2):
        balance_only(layer, x)
    kept = layer(torch.randn(9, 6))
    with pytest.raises(ValueError, match="MoE: the backward of a training forward has not run; .*or delete their outp"):
        torch.optim.SGD(layer.parameters()).step()
    del kept


@pytest.mark.parametrize("given", [None, 2])
def test_forwards_before_a_skipped_update_belong_to_the_next_step(given: int | None) -> None:
    """Gradients are cleared only after the next step's forwards, whose counts must stay."""
    layer, fresh = make(micro_batches=given), make(micro_batches=given)
    for x in batches(2):
        balance_only(layer, x)
    later = [layer(x) for x in batches(2, seed=2)]
    layer.zero_grad()
    for y in later:
        (y * 0).sum().backward()
    assert seen(layer) == [5, 8]
    fresh.balancer.layer.previous_step = layer.balancer.previous_step
    for y in [fresh(x) for x in batches(2, seed=2)]:
        (y * 0).sum().backward()
    assert torch.equal(layer.router.weight.grad, fresh.router.weight.grad)


@pytest.mark.parametrize("stray", [a_forward, a_gradient_of_the_input])
def test_gradients_that_are_taken_away_break_no_step_off(stray: Callable[[MoE], None]) -> None:
    """ZeRO 2 takes them after every backward; nothing trains on a forward in between, not even in the first step."""
    layer, fresh = make(micro_batches=2, bias_update_rate=0.1), make(micro_batches=2, bias_update_rate=0.1)
    flat = torch.zeros(sum(p.numel() for p in layer.parameters()))
    flat.grad = torch.zeros_like(flat)
    optimizers = {layer: torch.optim.SGD([flat], lr=0.0), fresh: torch.optim.SGD(fresh.parameters(), lr=0.0)}
    for step in range(3):
        sums = []
        for one, optimizer in optimizers.items():
            total = torch.zeros(4, 6)
            for x in batches(2, seed=step):
                balance_only(one, x)
                if one is layer:
                    total += one.router.weight.grad
                    one.zero_grad()
                    stray(one)
            sums.append(total if one is layer else one.router.weight.grad.clone())
            optimizer.step()
            one.zero_grad()
            assert one.balancer.previous_step.micro_batches == 2
        torch.testing.assert_close(sums[0], sums[1])
        assert torch.equal(layer.router.bias_E, fresh.router.bias_E)
    assert bool(layer.router.bias_E.any())
