"""Checks a user's own training script around DistributedDataParallel, without mesh or trainer.

The script's only call of ours counts ahead.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from equimoe.moe import BalanceConfig, ExtraLossConfig, MoE, MoEConfig, RouterConfig, Routing, counting_pass
from equimoe.moe.balance.bias import sign
from equimoe.moe.collectives import record_traffic
from equimoe.moe.observe import estimate_quality
from tests.helpers import oracle
from tests.helpers.fork import run_ranks

E, K, WORLD = 8, 2, 2
CONFIG = MoEConfig(8, 8, E, K, balance=BalanceConfig(coefficient=0.7, estimator="exact"), init_std=0.6)


def make(**balance: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(replace(CONFIG, balance=replace(CONFIG.balance, **balance))).double()


def tokens(rank: int, number: int) -> tuple[Tensor, Tensor]:
    """Return tokens of a different domain for each rank and micro-batch; some have no valid token."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    centre = torch.randn(8, dtype=torch.float64, generator=generator)
    x = torch.randn(12, 8, dtype=torch.float64, generator=generator) + centre
    return x, torch.arange(12) < (12, 5, 0, 9)[(rank + number) % 4]


def whole(numbers: range) -> tuple[Tensor, Tensor]:
    parts = [tokens(rank, n) for n in numbers for rank in range(WORLD)]
    return torch.cat([x for x, _ in parts]), torch.cat([mask for _, mask in parts])


RUN: dict[str, Callable[..., Tensor]] = {
    "plain": lambda model, x, mask: model(x, mask),
    "non-reentrant": lambda model, x, mask: checkpoint(model, x, mask, use_reentrant=False),
    "reentrant": lambda model, x, mask: checkpoint(model, x.requires_grad_(), mask, use_reentrant=True),
}


@pytest.mark.parametrize("kind", RUN)
def test_accumulation_without_sync_in_steps_of_any_length(kind: str) -> None:
    """Run steps of four, two (an incomplete accumulation) and three micro-batches.

    With evaluations in between, a clipped gradient, and a skipped step.
    """
    lengths = (4, 2, 3)

    def script(rank: int, world: int) -> tuple[list[Tensor], list[Tensor]]:
        layer = make(bias_update_rate=0.01)
        model = DistributedDataParallel(layer)
        optimizer, found, biases = torch.optim.SGD(model.parameters(), lr=0.0), [], []
        for step, length in enumerate(lengths):
            with counting_pass():
                for m in range(length):
                    model(*tokens(rank, 10 * step + m))
            for m in range(length):
                layer.eval()
                layer(*tokens(rank, 77))
                layer.train()
                with model.no_sync() if m + 1 < length else nullcontext():
                    (RUN[kind](model, *tokens(rank, 10 * step + m)) * 0).sum().backward()
            found.append(layer.router.weight.grad.clone())
            nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
            if step != 1:
                optimizer.step()
            optimizer.zero_grad()
            biases.append(layer.router.bias_E.clone())
        return found, biases

    results, layer, bias_E = run_ranks(script, WORLD), make(), torch.zeros(E)
    layer.router.bias_E = bias_E
    for step, length in enumerate(lengths):
        x, mask = whole(range(10 * step, 10 * step + length))
        with torch.no_grad():
            routing = layer.eval().router(x, mask)
        layer.zero_grad()
        balance_loss(layer, x[mask], routing.ids_TK[mask]).backward()
        for grads, _ in results:
            assert oracle.relative_error(grads[step], layer.router.weight.grad) < 1e-10, step
        if step != 1:
            bias_E.add_((0.01 * sign(routing.counts_BE.sum(0)).double()).float())
        assert all(torch.equal(biases[step], bias_E) for _, biases in results), step
    assert bool(bias_E.any())


def balance_loss(layer: MoE, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    """Return the oracle's balance loss, for choices in which a bias took part."""
    probs_TE = oracle.route(layer, x_TD)[1]
    load_E = torch.bincount(ids_TK.flatten(), minlength=E).double() * E / (K * len(ids_TK))
    return 0.7 * (load_E * probs_TE.mean(0)).sum()


def test_two_forwards_in_one_backward_and_a_module_that_is_used_between() -> None:
    """DDP gets the gradients of two forwards at once, and broadcasts the bias in each forward; neither may do harm."""

    def script(rank: int, world: int) -> tuple[Tensor, Tensor]:
        layer = make(bias_update_rate=0.01, estimator="rolling")
        model, optimizer = DistributedDataParallel(layer), torch.optim.SGD(layer.parameters(), lr=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            layer.router.bias_E.zero_()
            sum((model(*tokens(rank, m)) * 0).sum() for m in range(2)).backward()
            grad = layer.router.weight.grad.clone()
            optimizer.step()
        return grad, layer.router.bias_E

    layer = make()
    (0.7 * oracle.balance_loss(layer, *whole(range(2)))).backward()
    results = run_ranks(script, WORLD)
    for grad, bias_E in results:  # all forwards came before the backward, so no counting pass is needed
        assert oracle.relative_error(grad, layer.router.weight.grad) < 1e-10
        assert torch.equal(bias_E, results[0][1]) and bool(bias_E.any())


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_deepseek_v3s_companions_together(wrapper: str) -> None:
    """Combine bias, sequence loss of 1e-4, node-limited groups and sigmoid scores, as DeepSeek-V3 does.

    Weights are bf16 under DDP, or FSDP computes in bf16. The bias must be fp32, bitwise equal on all ranks, and move
    once per step by the rate or not at all.
    """
    router = RouterConfig(score="sigmoid", weight_scale=2.5, groups=4, kept_groups=2)
    balance = BalanceConfig(scope="sequence", coefficient=1e-4, bias_update_rate=0.001)

    def script(rank: int, world: int) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        layer = MoE(replace(CONFIG, router=router, balance=balance))
        if wrapper == "fsdp":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            model: Any = fully_shard(layer, mesh=init_device_mesh("cpu", (world,)), mp_policy=policy)
        else:
            model = DistributedDataParallel(layer.bfloat16())
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, foreach=False)
        biases, counts = [], []
        for step in range(3):
            for m in range(2):
                with model.no_sync() if m == 0 and wrapper == "ddp" else nullcontext():
                    x, mask = tokens(rank, 10 * step + m)
                    model(x.bfloat16().view(2, 6, 8), mask.view(2, 6)).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            biases.append(layer.router.bias_E.clone())
            counts.append(layer.balancer.previous_step.counts_E)
        assert all("bias" not in name for name, _ in layer.named_parameters())
        assert all(bool(p.grad is None) for p in layer.parameters())
        return biases, counts

    (biases, counts), *others = run_ranks(script, WORLD)
    want_E = torch.zeros(E)
    for step in range(3):
        want_E += (0.001 * sign(counts[step]).double()).float()
        assert biases[step].dtype == torch.float32 and torch.equal(biases[step], want_E)
        assert all(
            torch.equal(other[0][step], want_E) and torch.equal(other[1][step], counts[step]) for other in others
        )


def test_counts_beyond_2_to_the_24_are_exact() -> None:
    """fp32 has only even numbers at this size, but one choice more must decide the bias, on all ranks."""
    many = 2**24

    def script(rank: int, world: int) -> tuple[list[int], list[float], float]:
        layer = make(bias_update_rate=0.5, estimator="rolling", extra=ExtraLossConfig(micro=0.1))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        counts_E = torch.full((E,), many, dtype=torch.int64)
        counts_E[0] += 1 - rank
        counts_E[1] -= 1 - rank

        def many_more(_module: Any, _args: Any, routing: Routing) -> Routing:
            return replace(routing, counts_BE=counts_E[None], tokens_B=counts_E.sum()[None] // K)

        layer.router.register_forward_hook(many_more)
        for _ in range(3):
            layer(tokens(rank, 0)[0]).sum().backward()
        optimizer.step()
        last = layer.balancer.previous_step
        error = float(estimate_quality(last)["estimator_error"])
        return [*last.counts_E.tolist(), int(last.tokens)], layer.router.bias_E.tolist(), error

    for totals, bias, error in run_ranks(script, WORLD):
        assert totals == [6 * many + 3, 6 * many - 3, *[6 * many] * (E - 2), 6 * many * E // K]
        assert bias == [-0.5, 0.5, *[0.0] * (E - 2)] and error < 1e-7


class Stack(nn.Module):
    """Three layers; the second may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(estimator="rolling") for _ in range(3))

    def forward(self, x: Tensor, fails: bool = False) -> Tensor:
        for i, layer in enumerate(self.layers):
            if fails and i == 1:
                raise KeyError
            x = x + layer(x)
        return x


def test_one_collective_again_after_a_forward_that_failed() -> None:
    """After a failed forward, the next pass first sums what the failed one counted, because nobody knows yet that it is
    void.
    """

    def script(rank: int, world: int) -> list[list[int]]:
        model, found = Stack(), []
        for step in range(5):
            with record_traffic() as record:
                if step == 2:
                    with pytest.raises(KeyError):
                        model(tokens(rank, step)[0], fails=True)
                    model.zero_grad()
                else:
                    (model(tokens(rank, step)[0]) * 0).sum().backward()
            found.append([entry.sent for entry in record if entry.verb == "sum_over"])
        return found

    gc.collect()  # layers of earlier tests that wait for garbage collection would be in every sum
    every = 3 * 8 * (E + 1)
    assert run_ranks(script, WORLD) == [[[every], [every], [], [every, every], [every]]] * WORLD
