"""A pipeline stage holds what it received only as long as it is needed."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from equimoe.moe.parallel import ParallelConfig, build_mesh, pipeline
from tests.helpers import parity
from tests.helpers.fork import run_ranks

MICRO_BATCHES = 8


def test_receive_buffers_alive_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 1F1B stage s of P has P - s micro-batches in flight: their inputs and two gradients, not those of all."""
    received: list[weakref.ref] = []
    most = 0
    before = pipeline._Stage._get_recv_ops

    def count(stage: Any, recv_infos: Any) -> Any:
        nonlocal most
        ops = before(stage, recv_infos)
        received.extend(weakref.ref(op.tensor) for op in ops)
        most = max(most, sum(buffer() is not None for buffer in received))
        return ops

    monkeypatch.setattr(pipeline._Stage, "_get_recv_ops", count)
    of = parity.Composition(4, ParallelConfig(pp=4), micro_batches=MICRO_BATCHES)

    def script(rank: int, world: int) -> tuple[int, int]:
        parity.train(of, build_mesh(of.parallel), MICRO_BATCHES)
        return len(received), most

    for stage, (number, alive) in enumerate(run_ranks(script, 4)):
        passes = 2 if stage == 3 else 1 if stage == 0 else 3  # counting, forward, backward: those that receive
        assert number == passes * MICRO_BATCHES * parity.STEPS
        assert alive <= (4 - stage) * (stage > 0) + 2


def test_groups_of_nodes_have_the_timeout() -> None:
    """Also the groups that the hierarchical dispatcher makes for itself."""
    from equimoe.moe.collectives import split_axis

    def script(rank: int, world: int) -> list[float]:
        halves = split_axis(build_mesh(ParallelConfig(ep=4, timeout_s=47))["ep"], 2)
        backends = [half.group._get_backend(torch.device("cpu")) for half in halves]
        return [backend.options._timeout.total_seconds() for backend in backends]

    assert run_ranks(script, 4) == [[47.0, 47.0]] * 4
