"""Checks that a pipeline stage holds what it receives only as long as it needs it."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.moe.collectives import world_axis
from equimoe.moe.parallel import ParallelConfig, build_mesh
from equimoe.moe.parallel.pipeline import Pipeline
from equimoe.moe.parallel.torch_stage import TorchStage
from tests.helpers import parity
from tests.helpers.fork import run_ranks
from tests.parallel import test_pipeline

MICRO_BATCHES = 8


def test_receive_buffers_alive_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 1F1B, stage s of P has P - s micro-batches in flight; it may hold only their inputs, and two gradients."""
    received: list[weakref.ref] = []
    most = 0
    before = TorchStage._buffer

    def count(stage: TorchStage) -> Tensor:
        nonlocal most
        buffer = before(stage)
        received.append(weakref.ref(buffer))
        most = max(most, sum(seen() is not None for seen in received))
        return buffer

    monkeypatch.setattr(TorchStage, "_buffer", count)
    of = parity.Composition(4, ParallelConfig(pp=4), micro_batches=MICRO_BATCHES)

    def script(rank: int, world: int) -> tuple[int, int]:
        parity.train(of, build_mesh(of.parallel), MICRO_BATCHES)
        return len(received), most

    for stage, (number, alive) in enumerate(run_ranks(script, 4)):
        passes = 2 if stage == 3 else 1 if stage == 0 else 3  # counting, forward, backward: those that receive
        assert number == passes * MICRO_BATCHES * parity.STEPS
        assert alive <= (4 - stage) * (stage > 0) + 2


@pytest.mark.parametrize("schedule", test_pipeline.USABLE)
def test_nothing_is_left_of_a_micro_batch(schedule: str) -> None:
    """An evaluation, a counting pass and a step must leave no inputs, outputs, gradients or deferred backwards."""

    def left(stages: list[TorchStage]) -> list[Any]:
        return [value for stage in stages for held in stage._in_flight.values() for value in vars(held).values()]

    def script(rank: int, world: int) -> list[int]:
        stages: list[TorchStage] = []
        made = TorchStage.__init__

        def remember(stage: TorchStage, *of: Any) -> None:
            made(stage, *of)
            stages.append(stage)

        TorchStage.__init__ = remember  # type: ignore[method-assign]
        pipeline: Pipeline = test_pipeline.pipeline_of(world_axis(), schedule, 4)
        inputs, labels, masks = test_pipeline.data(4)
        loss_fn = test_pipeline.shares_of(labels)
        outputs: list[weakref.ref] = []
        for part in pipeline.stages:
            part.register_forward_hook(lambda _, args, output: outputs.append(weakref.ref(output)))
        found = []
        for run in (
            lambda: pipeline.evaluate(inputs, labels, {"mask": masks}, loss_fn),
            lambda: pipeline.count(inputs, {"mask": masks}),
            lambda: pipeline.step(inputs, labels, {"mask": masks}, loss_fn),
        ):
            run()
            found.append(sum(value is not None for value in left(stages)))
            found.append(sum(output() is not None for output in outputs))
        return found

    assert run_ranks(script, 2) == [[0] * 6] * 2


def test_groups_of_nodes_have_the_timeout() -> None:
    """The groups that the hierarchical dispatcher creates must have the timeout too."""
    from equimoe.moe.collectives import split_axis

    def script(rank: int, world: int) -> list[float]:
        halves = split_axis(build_mesh(ParallelConfig(ep=4, timeout_s=47))["ep"], 2)
        backends = [half.group._get_backend(torch.device("cpu")) for half in halves]
        return [backend.options._timeout.total_seconds() for backend in backends]

    assert run_ranks(script, 4) == [[47.0, 47.0]] * 4
