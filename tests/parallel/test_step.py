"""Checks steps that the training loop drives, on several ranks: one sum per forward pass, matched by layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from equimoe.moe import MoE, Step
from equimoe.moe.collectives import record_traffic
from tests.helpers.fork import run_ranks
from tests.helpers.scenarios import CONFIG, E, balance_only, error, make, tokens, whole

L, WORLD, M = 3, 2, 2


class Stack(nn.Module):
    """Layers that all get the same input; ``run`` says which ones run."""

    def __init__(self, **balance: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(**balance) for _ in range(L))

    def forward(self, x: Tensor, run: Sequence[int] = range(L)) -> Tensor:
        return sum((self.layers[i](x) for i in run), torch.zeros_like(x))


def joined(model: Stack) -> None:
    """Return the mean over ranks, as an engine computes it; a layer that did not run has no gradient."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
        p.grad /= WORLD


def number(step: int, m: int, rank: int) -> int:
    return 100 * step + 10 * m + rank


def test_one_sum_for_each_pass() -> None:
    """Ranks may run different layers in different orders; rows of layers that did not run are zero."""
    runs = {0: (0, 1, 2), 1: (2, 0)}

    def script(rank: int, world: int) -> tuple[list[int], list[float]]:
        model = Stack()
        step, sent, errors = Step.of(model), [], []
        for s in range(2):
            step.begin(micro_batches=M)
            outs = []
            for m in range(M):
                with record_traffic() as record, step.micro_batch(m):
                    outs.append(balance_only(model, tokens(number(s, m, rank)), torch.tensor(runs[(rank + s) % 2])))
                sent += [entry.sent for entry in record if entry.verb == "sum_over"]
            with record_traffic() as record:
                sum(outs).backward()
            assert record == []
            joined(model)
            for i, layer in enumerate(model.layers):
                ranks = [r for r in range(WORLD) if i in runs[(r + s) % 2]]
                want = whole(layer, [tokens(number(s, m, r)) for m in range(M) for r in ranks])
                errors.append(error(layer, want))
            model.zero_grad()
            step.end()
        return sent, errors

    for sent, errors in run_ranks(script, WORLD, detail=True):
        assert sent == [8 * (E + 1) * L] * 2 * M
        assert max(errors) < 1e-12


def test_counted_ahead_and_after_an_exception() -> None:
    def script(rank: int, world: int) -> list[float]:
        model = Stack(estimator="exact")
        step, errors = Step.of(model), []
        for s in range(2):
            step.begin(micro_batches=M)
            for m in range(M):
                with torch.no_grad(), step.micro_batch(m, ahead=True):
                    model(tokens(number(s, m, rank)))
            with suppress(KeyError), step.micro_batch(7):
                model.layers[0](tokens(99))
                raise KeyError
            for m in range(M):
                with step.micro_batch(m):
                    balance_only(model, tokens(number(s, m, rank))).backward()
            joined(model)
            everything = [tokens(number(s, m, r)) for m in range(M) for r in range(WORLD)]
            errors += [error(layer, whole(layer, everything)) for layer in model.layers]
            model.zero_grad()
            step.end()
        return errors

    assert max(max(errors) for errors in run_ranks(script, WORLD, detail=True)) < 1e-12


def test_what_is_assumed_is_said_once() -> None:
    """A script that declares nothing is warned once about the assumption; a given group means no warning."""

    def script(rank: int, world: int, tell: bool) -> list[str]:
        layers = [MoE(CONFIG, group=dist.group.WORLD if tell else None) for _ in range(2)]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for n in range(3):
                sum(layer(tokens(n).float()).sum() for layer in layers).backward()
        return [str(w.message) for w in seen if "MoE:" in str(w.message)]

    for messages in run_ranks(script, WORLD, False):
        assert len(messages) == 1 and "all 2 ranks of the default process group" in messages[0]
        assert "MoE(config, group=...)" in messages[0]
    assert run_ranks(script, WORLD, True) == [[], []]


@pytest.mark.parametrize("first", [True, False])
def test_a_step_takes_over_from_a_layer_that_helped_itself(first: bool) -> None:
    def script(rank: int, world: int) -> float:
        model = Stack()
        if first:
            balance_only(model, tokens(50 + rank)).backward()
            model.zero_grad()
        step = Step.of(model)
        with step.micro_batch():
            balance_only(model, tokens(rank)).backward()
        joined(model)
        return max(error(layer, whole(layer, [tokens(r) for r in range(WORLD)])) for layer in model.layers)

    assert max(run_ranks(script, WORLD)) < 1e-12
