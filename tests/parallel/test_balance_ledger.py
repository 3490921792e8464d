"""Checks that one collective, started in the forward, sums the counts of all layers of a micro-batch.

E experts, L layers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from equimoe.moe import BalanceConfig, ExtraLossConfig, MoE, MoEConfig, Placement, Step, counting_pass, recompute
from equimoe.moe.collectives import record_traffic, world_axis
from tests.helpers import oracle
from tests.helpers.fork import run_ranks
from tests.helpers.placed import spread_experts

E, L = 8, 3
CONFIG = MoEConfig(8, 8, E, 2, balance=BalanceConfig(coefficient=0.7), init_std=0.6)


class Stack(nn.Module):
    """L layers one after the other; ``skip`` leaves one out, ``run`` wraps each."""

    def __init__(self, config: MoEConfig = CONFIG, layers: int = L) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(MoE(config) for _ in range(layers)).double()

    def forward(self, x: Tensor, skip: int | None = None, run: Callable[..., Tensor] | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i != skip:
                x = x + (layer(x) if run is None else run(layer, x))
        return x


@pytest.fixture(autouse=True)
def no_layers_of_earlier_tests() -> None:
    """Layers that wait for garbage collection would be in every sum of the forked ranks, and change its size."""
    gc.collect()


def tokens(rank: int, step: int = 0, count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(count + 2 * rank, 8, dtype=torch.float64, generator=generator)


def sums(record: list[Any]) -> list[int]:
    """Return the bytes of counts in each collective; in a ring of two ranks, each rank sends them once."""
    return [entry.sent for entry in record if entry.verb == "sum_over"]


def gradients(model: nn.Module) -> list[Tensor]:
    return [layer.router.weight.grad.clone() for layer in model.layers]


@pytest.mark.parametrize("tokens_each", [5, 50])
def test_one_collective_of_a_known_size_whatever_the_tokens(tokens_each: int) -> None:
    def script(rank: int, world: int) -> list[list[int]]:
        model, found = Stack(), []
        for step in range(4):
            with record_traffic() as record:
                out = model(tokens(rank, step, tokens_each))
                forward = sums(record)
                (out * 0).sum().backward()
            found += [forward, sums(record)]
        return found

    # one in the forward, and none in the backward
    assert run_ranks(script, 2) == [[[8 * (E + 1) * L]] * 8] * 2


def test_the_collective_is_asynchronous_and_nobody_waits_before_the_backward() -> None:
    class Watched:
        def __init__(self, work: Any, events: list[str]) -> None:
            self.work, self.events = work, events

        def wait(self) -> None:
            self.events.append("wait")
            self.work.wait()

    def script(rank: int, world: int) -> list[list[str]]:
        model, events, found = Stack(), [], []
        start = dist.all_reduce

        def watched(value: Tensor, group: Any = None, async_op: bool = False) -> Any:
            events.append(f"start {value.dtype}" if async_op else "blocks")
            return Watched(start(value, group=group, async_op=async_op), events)

        (model(tokens(rank)) * 0).sum().backward()
        dist.all_reduce = watched  # this rank's process ends with the script
        out = model(tokens(rank, 1))
        found.append(events[:])
        (out * 0).sum().backward()
        return [*found, events]

    started = ["start torch.int64"]
    assert run_ranks(script, 2) == [[started, [*started, "wait"]]] * 2


def test_micro_batches_ahead_and_in_flight_have_one_collective_each() -> None:
    def script(rank: int, world: int) -> tuple[list[int], list[int]]:
        model = Stack()
        with record_traffic() as ahead, counting_pass():
            for m in range(3):
                model(tokens(rank, m))
        outs = [model(tokens(rank, m)) for m in range(3)]
        sum((out * 0).sum() for out in outs).backward()
        for layer in model.layers:
            layer.balancer.step.end(applied=False)
        with record_traffic() as flying:
            outs = [model(tokens(rank, m)) for m in range(3)]
            before = sums(flying)
            sum((out * 0).sum() for out in reversed(outs)).backward()
        assert before == sums(flying)
        return sums(ahead), before

    assert run_ranks(script, 2) == [([8 * (E + 1) * L] * 3,) * 2] * 2


def test_a_micro_batch_that_raised_leaves_nothing_to_sum() -> None:
    def script(rank: int, world: int) -> list[int]:
        model = Stack()
        step = Step.of(model)
        with suppress(KeyError), step.micro_batch(0):
            model(tokens(rank, 0))
            raise KeyError
        with record_traffic() as found, step.micro_batch(0):
            model(tokens(rank, 1))
        return sums(found)

    assert run_ranks(script, 2) == [[8 * (E + 1) * L]] * 2


def test_bytes_of_several_scopes() -> None:
    """Scopes over all ranks share one sum; scopes within a rank add nothing to it; "communication" adds D numbers."""

    def script(rank: int, world: int, extra: dict[str, float], rate: float) -> int:
        balance = BalanceConfig(extra=ExtraLossConfig(**extra), bias_update_rate=rate)
        model = Stack(replace(CONFIG, balance=balance))
        for layer in model.layers:
            spread_experts(layer, 2)
        (model(tokens(rank)) * 0).sum().backward()
        with record_traffic() as record:
            (model(tokens(rank, 1)) * 0).sum().backward()
        assert len(sums(record)) == 1
        return sum(sums(record))

    free = {"micro": 0.01, "sequence": 1e-4, "data_parallel": 0.1, "device": 0.05}
    assert run_ranks(script, 2, free, 1e-3) == [8 * (E + 1) * L] * 2
    assert run_ranks(script, 2, free | {"communication": 0.02}, 0.0) == [8 * (E + 1 + 2) * L] * 2


def test_two_axes_of_the_same_ranks_share_a_collective() -> None:
    """With context parallelism alone, a micro-batch and a step are on the same ranks, so one collective serves both."""

    def script(rank: int, world: int) -> list[int]:
        model = Stack(replace(CONFIG, balance=BalanceConfig(extra=ExtraLossConfig(micro=0.01))))
        for layer in model.layers:
            layer.place(Placement(tokens=world_axis(), sequence=world_axis()))
        (model(tokens(rank)) * 0).sum().backward()
        with record_traffic() as record:
            (model(tokens(rank, 1)) * 0).sum().backward()
        return sums(record)

    assert run_ranks(script, 2) == [[2 * 8 * (E + 1) * L]] * 2


def test_models_that_take_turns_each_have_one_collective() -> None:
    """Layers of different models cannot be told apart, so one sum has rows for both models; the backward starts it."""

    def script(rank: int, world: int) -> list[list[int]]:
        models, found = (Stack(), Stack(layers=2)), []
        for step in range(4):
            model = models[step % 2]
            with record_traffic() as record:
                (model(tokens(rank, step)) * 0).sum().backward()
            found.append(sums(record))
        return found

    assert run_ranks(script, 2) == [[[8 * (E + 1) * (L + 2)]] * 4] * 2


def test_statistics_of_a_shorter_pass_before_its_backward() -> None:
    """No forward has started the sum when the losses are read, so reading must start it, on all ranks."""

    def script(rank: int, world: int) -> list[float]:
        model = Stack()
        (model(tokens(rank)) * 0).sum().backward()
        out = model(tokens(rank, 1), skip=L - 1)
        values = [layer.stats.losses["global"] for layer in model.layers[: L - 1]]
        (out * 0).sum().backward()
        return values

    for values in run_ranks(script, 2, detail=True):
        assert all(value > 0.9 for value in values)


def test_local_scopes_communicate_nothing() -> None:
    def script(rank: int, world: int) -> list[int]:
        model = Stack(replace(CONFIG, balance=BalanceConfig(scope="micro", extra=ExtraLossConfig(sequence=0.1))))
        with record_traffic() as record:
            for step in range(2):
                (model(tokens(rank, step)) * 0).sum().backward()
        return sums(record)

    assert run_ranks(script, 2) == [[], []]


def alone(kind: str, step: int, skip: int | None = None) -> list[Tensor]:
    """Return the router gradients of one process with both ranks' tokens."""
    model = Stack()
    x = torch.cat([tokens(rank, step) for rank in range(2)])
    found: list[Tensor] = []
    for i, layer in enumerate(model.layers):
        if i == skip:
            found.append(torch.zeros_like(layer.router.weight))
            continue
        loss = 0.7 * oracle.balance_loss(layer, x)
        found.append(torch.autograd.grad(loss, layer.router.weight)[0])
        x = (x + layer(x)).detach()
    return found


def detached(layer: nn.Module, x: Tensor) -> Tensor:
    """Detach layers, so that each layer's loss reaches only its own router, as in the oracle."""
    return layer(x.detach()) + 0 * x.sum()


KINDS: dict[str, Callable[..., Tensor]] = {
    "plain": detached,
    "non-reentrant": lambda layer, x: checkpoint(detached, layer, x, use_reentrant=False),
    "reentrant": lambda layer, x: checkpoint(detached, layer, x.requires_grad_(), use_reentrant=True),
    "recompute": lambda layer, x: recompute(detached, layer, x),
}


@pytest.mark.parametrize("kind", KINDS)
def test_right_under_every_kind_of_recomputation(kind: str) -> None:
    def script(rank: int, world: int) -> list[list[Tensor]]:
        model, found = Stack(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for step in range(3):
            (model(tokens(rank, step), run=KINDS[kind]) * 0).sum().backward()
            found.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
        return found

    results = run_ranks(script, 2, detail=True)
    for step in range(3):
        for i, want in enumerate(alone(kind, step)):
            got = (results[0][step][i] + results[1][step][i]) / 2
            assert oracle.relative_error(got, want) < 1e-12, (step, i)


def test_layers_left_out_two_models_and_passes_without_backward() -> None:
    """Passes run different layers, on one axis: every sum must be of the right layers, and no rank may hang."""

    def script(rank: int, world: int) -> list[list[list[int]]]:
        model, other, found = Stack(), Stack(layers=2), []
        for step, skip in enumerate((None, None, 1, None, 2, 2, 0, None)):
            mine, foreign = tokens(rank, step), tokens(rank, 100 + step)
            out = model(mine, skip=skip)
            if step % 3 == 1:
                model(tokens(rank, 50 + step), skip=0)  # a forward without a backward
            outs = [out, other(foreign)] if step % 2 else [out]
            sum((part * 0).sum() for part in outs).backward()
            of_step = []
            for layer in (*model.layers, *other.layers):
                before = layer.balancer.previous_step
                layer.balancer.step.end(applied=False)
                last = layer.balancer.previous_step
                of_step.append([] if last is before else [*last.counts_E.tolist(), int(last.tokens)])
            found.append(of_step)
        return found

    def local(rank: int) -> list[list[list[int]]]:
        return run_ranks(lambda _rank, _world: script(rank, 1), 1)[0]

    # layer inputs do not depend on other ranks, so the sums over ranks must equal the sums of single-process runs
    parts = [local(0), local(1)]
    want = [
        [[a + b for a, b in zip(*layers, strict=True)] for layers in zip(*steps, strict=True)]
        for steps in zip(*parts, strict=True)
    ]
    assert run_ranks(script, 2, detail=True) == [want, want]


def test_ranks_that_read_statistics_at_other_times() -> None:
    """The forward has started the sum, so one rank may read its losses while the other does not."""

    def script(rank: int, world: int) -> float:
        model, value = Stack(), 0.0
        wrapped = DistributedDataParallel(model)
        for step in range(3):
            out = wrapped(tokens(rank, step))
            if rank == 0:
                value = model.layers[-1].stats.losses["global"]
            (out * 0).sum().backward()
        return value

    assert run_ranks(script, 2)[0] > 0.9


def test_layer_alone_and_several_micro_batches_in_flight() -> None:
    def script(rank: int, world: int) -> Tensor:
        layer = MoE(replace(CONFIG, balance=replace(CONFIG.balance, micro_batches=3))).double()
        outs = [layer(tokens(rank, m)) for m in range(3)]
        for out in reversed(outs):
            (out * 0).sum().backward()
        return layer.router.weight.grad

    torch.manual_seed(0)
    layer = MoE(CONFIG).double()
    x = torch.cat([tokens(rank, m) for m in range(3) for rank in range(2)])
    (0.7 * oracle.balance_loss(layer, x)).backward()

    def seeded(rank: int, world: int) -> Tensor:
        torch.manual_seed(0)
        return script(rank, world)

    got = run_ranks(seeded, 2)
    assert oracle.relative_error((got[0] + got[1]) / 2, layer.router.weight.grad) < 1e-12


@pytest.mark.slow
def test_counts_of_512_micro_batches_in_bf16_are_exact() -> None:
    """Counts must be exact for 512 micro-batches in bf16, and the bias must move once."""

    def script(rank: int, world: int) -> tuple[list[int], list[float], list[int]]:
        torch.manual_seed(0)
        balance = BalanceConfig(micro_batches=512, bias_update_rate=0.25)
        layer = MoE(replace(CONFIG, balance=balance)).bfloat16()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        generator = torch.Generator().manual_seed(rank)
        mine = [0] * E
        for _ in range(512):
            layer(torch.randn(2 + rank, 8, generator=generator).bfloat16()).sum().backward()
            for expert in layer.balancer.visits[-1].decision.chosen_TK.flatten().tolist():
                mine[expert] += 1
        optimizer.step()
        last = layer.balancer.previous_step
        assert int(last.local_tokens) == 512 * (2 + rank)
        return [*last.counts_E.tolist(), int(last.tokens)], layer.router.bias_E.tolist(), mine

    first, second = run_ranks(script, 2)
    assert first[:2] == second[:2] and first[0][-1] == 512 * 5
    assert first[0][:-1] == [a + b for a, b in zip(first[2], second[2], strict=True)]
    mean = 2 * 512 * 5 / E
    assert first[1] == [0.25 * ((c < mean) - (c > mean)) for c in first[0][:-1]]
