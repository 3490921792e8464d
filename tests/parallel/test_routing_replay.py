"""Recorded routing decisions are repeated exactly, whatever the routers have become, and gradients still flow."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from equimoe.moe import BalanceConfig, CapacityConfig, MoE, MoEConfig, RouterConfig
from equimoe.moe.config import ZeroComputationConfig
from equimoe.moe.engines.torch import TorchEngine
from equimoe.moe.model.decoder import numbered_moe_layers
from equimoe.moe.parallel import Mesh, ParallelConfig, build_mesh
from equimoe.moe.train.config import RoutingConfig, TrainConfig
from equimoe.moe.train.data import DataError
from equimoe.moe.train.decisions import Decisions, RecordError, recorded_routing, replayed_routing
from equimoe.moe.types import Decision
from tests.helpers import small
from tests.helpers.fork import run_ranks
from tests.helpers.recorded import Recorded
from tests.helpers.slow import slow_but
from tests.helpers.trained import batches, engine_of, make, whole, worst
from tests.moe.test_train import trainer_of


def layers_of(engine: Any) -> dict[int, MoE]:
    return numbered_moe_layers(engine.parts)


def mesh_of(world: int, degrees: dict[str, Any]) -> Mesh | None:
    return build_mesh(ParallelConfig(**degrees)) if world > 1 else None


def disturb_routers(engine: Any) -> None:
    """Turn each router's choices around."""
    with torch.no_grad():
        for layer in layers_of(engine).values():
            layer.router.weight.mul_(-1.0)


def same(one: Decisions, two: Decisions) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], two[name], strict=True)
    )


CASES: dict[str, dict[str, Any]] = {
    "rolling": {"estimator": "rolling"},
    "exact, recompute": {"estimator": "exact", "recompute_blocks": True},
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_replays_its_decisions_with_other_routers(name: str) -> None:
    engine: TorchEngine = engine_of(make(layers=4, **CASES[name]), None)
    with recorded_routing(layers_of(engine)) as first:
        engine.step(batches(None), lr=0.0)
    assert [len(decision.chosen_TK) for decision in first.values()] == [64, 64]  # neither counted ahead nor again
    disturb_routers(engine)
    with recorded_routing(layers_of(engine)) as own:
        engine.step(batches(None), lr=0.0)
    assert not same(own, first)
    with recorded_routing(layers_of(engine)) as again, replayed_routing(layers_of(engine), first):
        engine.step(batches(None), lr=0.0)
    assert same(again, first)
    for number, layer in layers_of(engine).items():
        assert layer.balancer.previous_step is not None
        counts = torch.bincount(first[number].chosen_TK.flatten(), minlength=4)
        assert torch.equal(layer.balancer.previous_step.counts_E, counts)


def test_the_routers_gradient_is_that_of_the_loss_with_these_decisions() -> None:
    """By finite differences: the loss is smooth, because no choice changes."""
    recorded = Recorded(torch.optim.SGD)
    engine = engine_of(make(coefficient=0.0), None, recorded)
    with recorded_routing(layers_of(engine)) as decisions:
        engine.evaluate(batches(None))
    disturb_routers(engine)
    layers, weight = layers_of(engine), layers_of(engine)[1].router.weight

    def loss() -> float:
        with replayed_routing(layers, decisions):
            return float(torch.cat(engine.evaluate(batches(None))).mean())

    with replayed_routing(layers, decisions):
        engine.step(batches(None), lr=0.0)
    gradient = recorded.gradients[0]["blocks.1.mlp.router.weight"]
    for place in ((0, 0), (2, 5), (3, 7)):
        ends = []
        for step in (1e-4, -2e-4):
            with torch.no_grad():
                weight[place] += step
            ends.append(loss())
        with torch.no_grad():
            weight[place] += 1e-4
        assert float(gradient[place]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-5, abs=1e-9)
    assert float(gradient.abs().max()) > 1e-4


MESHES: list[tuple[int, dict[str, Any]]] = [
    (2, {"ep": 2}),
    (2, {"data_parallel": "fsdp", "ep": 2}),
    (4, {"ep": 4, "experts": "fssdp"}),
    (4, {"ep": 2}),
]


@pytest.mark.parametrize(("world", "degrees"), slow_but(MESHES[:1], MESHES), ids=str)
def test_a_replay_on_ranks_is_that_of_one_process(world: int, degrees: dict[str, Any]) -> None:
    """Decisions are recorded in one process and replayed by the ranks that have the tokens, with other routers."""

    def replayed(rank: int, world: int, decisions: Decisions) -> dict[str, Tensor]:
        mesh = mesh_of(world, degrees)
        engine = engine_of(make(recompute_blocks=True), mesh)
        disturb_routers(engine)
        mine = {number: Decision(*(ids_TK.chunk(world)[rank] for ids_TK in d)) for number, d in decisions.items()}
        for _ in range(2):
            with recorded_routing(layers_of(engine)) as again, replayed_routing(layers_of(engine), mine):
                engine.step(batches(mesh), lr=0.1)
            assert same(again, mine)
        return whole(engine)

    alone = engine_of(make(), None)
    with recorded_routing(layers_of(alone)) as decisions:
        alone.evaluate(batches(None))
    want = replayed(0, 1, decisions)
    for got in run_ranks(replayed, world, decisions):
        assert worst(got, want)[0] < 1e-8


SLOTS = RouterConfig(gate="slots", normalize_weights=False)
KINDS: dict[str, dict[str, Any]] = {
    "MLPs": {},
    "zero-computation experts": {"zero_computation": ZeroComputationConfig(1, 1, 1)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_choices_are_dropped_again(kind: str) -> None:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(8, 4, 4, 2, capacity=CapacityConfig(0.7), **KINDS[kind]))
    x = torch.randn(32, 8)
    with recorded_routing({"a": layer}) as decisions:
        y = layer(x)
    dropped = int((decisions["a"].ids_TK < 0).sum())
    assert dropped == int(layer.stats.dropped_choices) > 0
    assert bool((decisions["a"].ids_TK >= 4).any()) == bool(KINDS[kind])
    with torch.no_grad():
        layer.router.weight.mul_(-1.0)
    with recorded_routing({"a": layer}) as again, replayed_routing({"a": layer}, decisions):
        assert not torch.equal(layer(x), y)
    assert same(again, decisions) and int(layer.stats.dropped_choices) == dropped


def test_wrong_replays_are_refused() -> None:
    layer, x = MoE(MoEConfig(8, 4, 4, 2)), torch.randn(6, 8)
    with recorded_routing({"a": layer}) as decisions:
        layer(x)
    slots = MoE(MoEConfig(8, 4, 4, 1, router=SLOTS, balance=BalanceConfig(coefficient=0.0)))
    with pytest.raises(ValueError, match="MoE layer a: router.gate='slots' mixes all tokens"):
        recorded_routing({"a": slots}).__enter__()
    match = "decisions: none were recorded for MoE layer b"
    with pytest.raises(ValueError, match=match), replayed_routing({"b": layer}, decisions):
        pass
    match = "MoE layer a: decisions for 6 tokens were recorded, and 9 are routed"
    with pytest.raises(ValueError, match=match), replayed_routing({"a": layer}, decisions):
        layer(x)
        layer(x[:3])
    match = "decisions for 6 tokens were recorded, and only 4 were routed"
    with pytest.raises(ValueError, match=match), replayed_routing({"a": layer}, decisions):
        layer(x[:4])
    twice = {"a": Decision(*(torch.cat((ids_TK, ids_TK)) for ids_TK in decisions["a"]))}
    x.requires_grad_()
    with replayed_routing({"a": layer}, twice):
        ys = [checkpoint(layer, x, use_reentrant=False) for _ in range(2)]
        with pytest.raises(ValueError, match="use equimoe.moe.recompute to replay routing"):
            torch.stack(ys).sum().backward()
    layer(x)  # no hook is left
    assert "sent" not in vars(layer.local)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return small.on(small.write_texts(tmp_path / "texts"), steps=4)


def test_a_run_replays_the_decisions_of_another(config: TrainConfig, tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("first", "second")]
    first = trainer_of(replace(config, routing=RoutingConfig(record=folders[0])))
    steps = []
    for step in range(2):
        steps.append(first.cursor.batch(step, config.data.global_batch))
        first.train_step()
    second = trainer_of(replace(config, routing=RoutingConfig(record=folders[1], replay=folders[0])))
    disturb_routers(second.engine)
    assert first.records is not None and second.records is not None
    for step, numbers in enumerate(steps):
        second.train_step()
        assert same(first.records.read(step, numbers), second.records.read(step, numbers))
        with pytest.raises(ValueError, match=f"routing.record=.*: step {step + 1} was recorded on other sequences"):
            first.records.read(step, numbers[1:])
    with pytest.raises(DataError, match="routing.replay=.*: the decisions of step 3 cannot be read from"):
        second.train_step()
    stored = first.records.path(0)
    with np.load(stored) as file:
        ids = {name: ids if name == "sequences" else ids + 77 for name, ids in file.items()}
    np.savez(stored, **ids)
    third = trainer_of(replace(config, routing=RoutingConfig(replay=folders[0])))
    with pytest.raises(DataError, match=f"routing.replay={folders[0]}: does not fit this run: ids_TK in .77, "):
        third.train_step()
    stored.write_bytes(stored.read_bytes()[:-40].replace(b"chosen_TK", b"chosen_TX"))
    with pytest.raises(DataError, match="the decisions of step 1 cannot be read from"):
        first.records.read(0, [])
    stored.unlink()
    os.mkfifo(stored)
    with pytest.raises(DataError, match="the decisions of step 1 cannot be read from .* \\(is not a file\\)"):
        first.records.read(0, [])


def test_a_replay_without_decisions_is_refused_before_the_first_step(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"routing.replay={tmp_path}: has no tokens-0-of-1.stage-0.npz for any step"):
        trainer_of(replace(config, routing=RoutingConfig(replay=str(tmp_path))))


def test_decisions_that_cannot_be_stored_name_the_folder(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "step-00000000").write_text("in the way")
    with pytest.raises(RecordError, match=f"routing.record={tmp_path}: cannot be written \\(File exists\\); make room"):
        trainer_of(replace(config, routing=RoutingConfig(record=str(tmp_path)))).train_step()


def test_a_replay_and_steps_computed_twice_exclude_each_other(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="routing.replay='x': health.replay_every=5 computes steps twice"):
        replace(config, routing=RoutingConfig(replay="x"), health=replace(config.health, replay_every=5))
