"""Compares the estimators with their closed forms, and checks what is reported of them.  E experts."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from equimoe.moe import BalanceConfig, ExtraLossConfig, MoE, MoEConfig, counting_pass
from equimoe.moe.observe import estimate_quality
from tests.helpers import oracle


def make(**balance: object) -> MoE:
    torch.manual_seed(0)
    config = BalanceConfig(**{"coefficient": 1.0, **balance})  # type: ignore[arg-type]
    moe = MoEConfig(hidden_size=6, intermediate_size=8, num_experts=4, top_k=2, balance=config, init_std=0.7)
    return MoE(moe).double()


def by_domain(sizes: list[int], seed: int = 1) -> list[Tensor]:
    """Return micro-batches of different domains, so that their loads differ."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(sizes), 1, 6, generator=generator, dtype=torch.float64) * 2
    return [
        centre + torch.randn(size, 6, generator=generator, dtype=torch.float64)
        for centre, size in zip(centres, sizes, strict=True)
    ]


def counts_of(layer: MoE, x: Tensor) -> Tensor:
    return torch.bincount(oracle.route(layer, x)[2].flatten(), minlength=4).double()


def train(layer: MoE, inputs: list[Tensor], ahead: bool = False) -> Tensor:
    """Return the router's gradient of one step, without changing its weights."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    optimizer.zero_grad()
    if ahead:
        with counting_pass():
            for x in inputs:
                layer(x)
    for x in inputs:
        (layer(x) * 0).sum().backward()
    optimizer.step()
    return layer.router.weight.grad.clone()


def gradient_of(layer: MoE, loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, layer.router.weight)[0]


@pytest.mark.parametrize("given", [None, 3])
def test_carry_is_the_counts_so_far_and_the_step_before_for_the_rest(given: int | None) -> None:
    layer = make(estimator="carry", micro_batches=given)
    first, second = by_domain([5, 9, 4], seed=1), by_domain([8, 3, 6], seed=2)
    train(layer, first)
    before_E, before = sum(counts_of(layer, x) for x in first), sum(map(len, first))
    loss, seen_E, seen = torch.zeros(()), torch.zeros(4), 0
    for n, x in enumerate(second, start=1):
        seen_E, seen = seen_E + counts_of(layer, x), seen + len(x)
        to_come = (3 - n) / 3
        tokens = seen + to_come * before
        load_E = 4 * (seen_E + to_come * before_E) / (2 * tokens)
        loss = loss + (load_E * oracle.route(layer, x)[1].sum(0)).sum() / tokens
    want = gradient_of(layer, loss)
    assert oracle.relative_error(train(layer, second), want) < 1e-12
    # only the previous step is carried over, not earlier ones
    assert oracle.relative_error(train(layer, second), want) > 1e-3


def test_carry_begins_as_rolling_and_is_exact_with_one_micro_batch() -> None:
    inputs = by_domain([5, 9, 4])
    rolling = train(make(micro_batches=3), inputs)
    assert torch.equal(train(make(estimator="carry", micro_batches=3), inputs), rolling)
    layer, whole = make(estimator="carry", micro_batches=1), torch.cat(inputs)
    for x in (*inputs, whole):
        want = gradient_of(layer, oracle.balance_loss(layer, x))
        assert oracle.relative_error(train(layer, [x]), want) < 1e-12


def test_carry_of_a_step_with_fewer_micro_batches_is_scaled() -> None:
    """A previous step that ended after one of two micro-batches is scaled to a whole one."""
    layer = make(estimator="carry", micro_batches=2)
    x = by_domain([7])[0]
    train(layer, [x])
    want = gradient_of(layer, oracle.balance_loss(layer, x))
    assert oracle.relative_error(train(layer, [x, x]), want) < 1e-12


def test_carry_is_exact_where_the_step_before_was_the_same() -> None:
    """If all micro-batches and both steps are alike, carry must give the exact gradient in any order."""
    x = by_domain([6])[0]
    layer = make(estimator="carry", micro_batches=3)
    train(layer, [x] * 3)
    want = gradient_of(layer, oracle.balance_loss(layer, x))
    assert oracle.relative_error(train(layer, [x] * 3), want) < 1e-12


def test_carry_of_a_step_with_more_micro_batches_than_expected_is_rolling() -> None:
    first, second = by_domain([7], seed=1), by_domain([5, 9, 4], seed=2)
    layer, rolling = make(estimator="carry"), make()
    for either in (layer, rolling):
        train(either, first)
    assert torch.equal(train(layer, second), train(rolling, second))


@pytest.mark.parametrize(("count", "share"), [(2, 0.75), (3, 0.6111), (4, 0.5208)])
def test_rolling_has_its_closed_expectation_over_orders(count: int, share: float) -> None:
    """The mean over all orders must be (H_G/G) micro + (1 - H_G/G) (G global - micro) / (G - 1)."""
    inputs = by_domain([6] * count)
    layer = make(micro_batches=count)
    orders = list(permutations(range(count)))
    mean = torch.stack([train(layer, [inputs[i] for i in order]) for order in orders]).mean(0)
    micro = gradient_of(layer, sum(oracle.balance_loss(layer, x) for x in inputs) / count)
    whole = gradient_of(layer, oracle.balance_loss(layer, torch.cat(inputs)))
    harmonic = sum(1 / n for n in range(1, count + 1)) / count
    assert harmonic == pytest.approx(share, abs=1e-4)
    want = harmonic * micro + (1 - harmonic) * (count * whole - micro) / (count - 1)
    assert oracle.relative_error(mean, want) < 1e-12
    assert oracle.relative_error(mean, whole) > 0.1


@pytest.mark.parametrize("estimator", ["rolling", "carry", "exact"])
def test_report_tells_batch_and_error(estimator: str) -> None:
    layer = make(estimator=estimator, micro_batches=3, extra=ExtraLossConfig(micro=0.01))  # the main loss is told of
    assert layer.balancer.previous_step is None
    steps = [by_domain([5, 9, 4], seed=1), by_domain([8, 3, 7], seed=2)]
    for inputs in steps:
        train(layer, inputs, ahead=estimator == "exact")
    counts = [[counts_of(layer, x) for x in inputs] for inputs in steps]
    load_E = 4 * sum(counts[1]) / (2 * 18)
    seen_E, seen, used, tokens = torch.zeros(4), 0, [], []
    for n, x in enumerate(steps[1], start=1):
        seen_E, seen = seen_E + counts[1][n - 1], seen + len(x)
        rest = (3 - n) / 3 if estimator == "carry" else 0.0
        tokens.append(18 if estimator == "exact" else seen + rest * 18)
        used.append(load_E if estimator == "exact" else 4 * (seen_E + rest * sum(counts[0])) / (2 * tokens[-1]))
    report = estimate_quality(layer.balancer.previous_step)
    assert report["balance_tokens"] == pytest.approx(sum(tokens) / 3)
    assert report["balance_sequences"] == pytest.approx(sum(tokens) / 3 / 6)  # sequences of 6 on average
    error = math.sqrt(sum(float((u - load_E).square().sum()) for u in used) / 3) / float(load_E.norm())
    assert report["estimator_error"] == pytest.approx(error, abs=1e-12)
    of_uneven = error * float(load_E.norm()) / float((load_E - 1).norm())
    assert report["gradient_error"] == pytest.approx(of_uneven, abs=1e-12)
    assert (error < 1e-12) == (estimator == "exact")


def test_report_of_scopes_within_a_rank() -> None:
    """A micro-batch loss counts over a micro-batch, and a sequence loss over a sequence."""
    x_BSD = torch.cat(by_domain([5, 5, 5])).view(3, 5, 6)
    for scope, tokens in (("micro", 15), ("sequence", 5), ("global", 45)):
        layer = make(scope=scope, estimator="exact", micro_batches=3)
        train(layer, [x_BSD] * 3, ahead=True)
        report = estimate_quality(layer.balancer.previous_step)
        assert report["balance_tokens"] == pytest.approx(tokens) and report["balance_sequences"] == tokens / 5
        assert (report["estimator_error"] > 0.1) == (scope == "sequence"), report


def test_evaluation_and_skipped_steps_leave_no_trace_in_what_is_carried() -> None:
    layer = make(estimator="carry", micro_batches=2)
    inputs = by_domain([5, 9])
    train(layer, inputs)
    before = layer.balancer.previous_X.clone()
    layer.eval()
    layer(inputs[0])
    layer.train()
    with torch.no_grad():
        layer(inputs[1])
    assert torch.equal(layer.balancer.previous_X, before) and before.tolist()[-2:] == [14, 2]


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    """A forward that raises before it has counted must not become part of the step."""
    inputs = by_domain([5, 9, 4])
    want = train(make(micro_batches=2), [inputs[0], inputs[2]])
    layer = make(micro_batches=2)
    for i, x in enumerate(inputs):
        if i == 1:
            hook = layer.router.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="of the test"):
                layer(x)
            hook.remove()
        else:
            (layer(x) * 0).sum().backward()
    assert torch.equal(layer.router.weight.grad, want)
    layer.balancer.step.end(applied=False)
    assert layer.balancer.previous_step.micro_batches == 2 and int(layer.balancer.previous_step.tokens) == 9


def fail(*_: object) -> None:
    raise RuntimeError("of the test")
