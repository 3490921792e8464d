"""Checks which weights an engine trains: frozen, unused and unfrozen ones must behave as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.moe import checkpoint
from equimoe.moe.engines import Batch
from equimoe.moe.model import Decoder
from equimoe.moe.parallel import Mesh, ParallelConfig, build_mesh
from equimoe.moe.train.config import OptimConfig
from equimoe.moe.train.optim import build_optimizer
from tests.helpers.fork import run_ranks
from tests.helpers.recorded import Recorded
from tests.helpers.slow import slow_but
from tests.helpers.trained import batches, engine_of, freeze, make, whole, worst

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "dp 2": (2, {}),
    "dp 4, ep 2": (4, {"ep": 2}),
    "tp 2": (2, {"tp": 2}),
    "cp 2": (2, {"cp": 2}),
    "fsdp 2, ep 2": (2, {"data_parallel": "fsdp", "ep": 2}),
    "pp 2, tp 2": (4, {"pp": 2, "tp": 2}),
}
FAST = ("dp 2", "tp 2", "cp 2", "fsdp 2, ep 2")


def mesh_of(world: int, degrees: dict[str, Any]) -> Mesh | None:
    return build_mesh(ParallelConfig(**degrees)) if world > 1 else None


@pytest.mark.parametrize("name", slow_but(FAST, MESHES))
def test_frozen_weights_stay_and_the_others_do_not_notice(name: str) -> None:
    """AdamW decays weights whose gradient is zero, but leaves those without a gradient alone."""
    world, degrees = MESHES[name]
    parts = ("experts", "router", "attention")

    def script(rank: int, world: int) -> list[tuple[dict[str, Tensor], list[str]]]:
        mesh, found = mesh_of(world, degrees), []
        for frozen in parts:
            model = make()
            freeze(model, lambda name, frozen=frozen: frozen in name)
            engine = engine_of(model, mesh)
            for step in range(2):
                assert engine.step(batches(mesh, step), lr=0.1).applied
            found.append((whole(engine), [name for name in engine.state() if name.startswith("optimizer.")]))
        return found

    wanted, before = script(0, 1), dict(make().named_parameters())
    for result in run_ranks(script, world):
        for frozen, (got, states), (want, _) in zip(parts, result, wanted, strict=True):
            for weight in got:
                assert torch.equal(got[weight], before[weight]) == (frozen in weight), weight
            assert worst(got, want)[0] < 1e-8
            assert states and not any(frozen in state for state in states)


class Skipping(Decoder):
    """Skips its first block: in every call with ``every``, else in every second call."""

    every = True
    calls = 0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert self.embedding is not None and self.norm is not None and self.head is not None
        self.calls += 1
        x = self.embedding(x)
        for name, block in self.blocks.items():
            if name != "0" or not (self.every or self.calls % 2 == 0):
                x = block(x, mask)
        return self.head(self.norm(x))


@pytest.mark.parametrize("name", ["dp 4, ep 2", "tp 2", "fsdp 2, ep 2"])
def test_a_layer_that_no_rank_uses_stays(name: str) -> None:
    world, degrees = MESHES[name]

    def script(rank: int, world: int) -> dict[str, Tensor]:
        mesh = mesh_of(world, degrees)
        engine = engine_of(make(Skipping), mesh)
        for step in range(2):
            engine.step(batches(mesh, step), lr=0.1)
        return whole(engine)

    want, before = script(0, 1), dict(make().named_parameters())
    for got in run_ranks(script, world):
        assert all(torch.equal(got[n], before[n]) for n in got if n.startswith("blocks.0."))
        assert worst(got, want)[0] < 1e-8


@pytest.mark.parametrize("degrees", [{}, {"ep": 2}], ids=str)
def test_a_layer_that_some_ranks_use_is_updated_alike_on_all(degrees: dict[str, Any]) -> None:
    def script(rank: int, world: int) -> dict[str, Tensor]:
        mesh, model = mesh_of(world, degrees), make(Skipping, coefficient=0.0)
        model.every, model.calls = False, rank
        parts = batches(mesh)
        # one micro-batch per rank; alone, one after the other
        mine = [Batch(*(torch.cat([getattr(b, f) for b in parts]) for f in ("inputs", "labels")))]
        engine = engine_of(model, mesh)
        if mesh is None:
            engine.balance._exact = False  # a counting pass would count as calls
        for _ in range(3):
            if mesh is not None:
                model.calls = rank
            engine.step(mine if mesh is not None else parts, lr=0.1)
        return whole(engine)

    want = script(0, 1)
    for got in run_ranks(script, 2):
        assert worst(got, want)[0] < 1e-8


@pytest.mark.parametrize("name", slow_but(FAST, MESHES))
def test_weights_unfrozen_and_frozen_later(name: str) -> None:
    """Each step must reduce and update exactly the weights that are trainable then."""
    world, degrees = MESHES[name]

    def script(rank: int, world: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        mesh, model, optimizer = mesh_of(world, degrees), make(), Recorded(torch.optim.AdamW, weight_decay=0.5)
        freeze(model, lambda name: "attention" in name or "router" in name)
        engine = engine_of(model, mesh, optimizer)
        engine.step(batches(mesh, 0), lr=0.1)
        freeze(engine, lambda _: True, frozen=False)
        engine.step(batches(mesh, 1), lr=0.1)
        freeze(engine, lambda name: "experts" in name or "norm" in name)
        engine.step(batches(mesh, 2), lr=0.1)
        return whole(engine), optimizer.gradients

    want, gradients = script(0, 1)
    assert len(gradients[0]) < len(gradients[1]) > len(gradients[2])
    for got, found in run_ranks(script, world):
        assert worst(got, want)[0] < 1e-8
        for mine, theirs in zip(found, gradients, strict=True):
            assert mine.keys() == {name for name in theirs if name in got}
            assert worst(mine, theirs)[0] < 1e-8


@pytest.mark.parametrize("frozen", ["blocks.1.", "blocks.3.mlp.", "mlp.", "all but head", "all but embedding"])
@pytest.mark.parametrize("estimator", ["exact", "rolling"])
def test_frozen_layers_under_a_pipeline(frozen: str, estimator: Any) -> None:
    """A later stage cannot tell whether anything before it is trained; bias and losses fare as in one process."""

    def stays(name: str) -> bool:
        return not name.startswith(frozen[8:]) if frozen.startswith("all but ") else frozen in name

    def script(rank: int, world: int) -> dict[str, Tensor]:
        mesh = mesh_of(world, {"pp": 2})
        # what has been counted by a backward, which "rolling" reads, depends on the schedule
        loss = 0.1 if estimator == "exact" else 0.0
        model = make(layers=4, coefficient=loss, estimator=estimator, bias_update_rate=0.1)
        freeze(model, stays)
        engine = engine_of(model, mesh)
        for step in range(2):
            assert engine.step(batches(mesh, step), lr=0.1).applied
        biases = {name: value for name, value in engine.state().items() if name.endswith("bias_E")}
        for name, bias_E in biases.items():
            assert bool(bias_E.any()) != stays(name.removeprefix("model.")), name
        return whole(engine) | biases

    want = script(0, 1)
    for got in run_ranks(script, 2):
        assert worst(got, want)[0] < 1e-8


@pytest.mark.parametrize("degrees", [{}, {"tp": 2}, {"data_parallel": "fsdp"}], ids=str)
def test_weights_unfrozen_on_some_ranks_only(degrees: dict[str, Any]) -> None:
    """Refused on every rank before anything is added up; once all agree, training goes on."""

    def script(rank: int, world: int) -> tuple[str, dict[str, Tensor]]:
        mesh, model = mesh_of(world, degrees), make()
        freeze(model, lambda name: "norm" in name)
        engine = engine_of(model, mesh)
        engine.step(batches(mesh, 0), lr=0.1)
        freeze(engine, lambda name: "attention_norm" in name and bool(rank), frozen=False)
        with pytest.raises(ValueError) as error:
            engine.step(batches(mesh, 1), lr=0.1)
        freeze(engine, lambda name: "attention_norm" in name, frozen=False)
        engine.step(batches(mesh, 1), lr=0.1)
        return str(error.value), whole(engine)

    (one, got), (other, also) = run_ranks(script, 2)
    assert one == other and one.startswith("blocks.0.attention_norm.weight: only one of the ranks 0 and 1 trains it")
    assert all(torch.equal(got[name], also[name]) for name in got)


@pytest.mark.parametrize("frozen_first", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_moments_outlive_a_resume_while_their_weight_is_frozen(frozen_first: bool, world: int, tmp_path: Path) -> None:
    """Trained, frozen, saved, resumed, unfrozen: as without the resume."""

    def script(rank: int, world: int) -> bool:
        def frozen(name: str) -> bool:
            return "attention" in name

        mesh, ends = mesh_of(world, {"data_parallel": "fsdp"}), []
        for resumed in (False, True):
            engine = engine_of(make(), mesh)
            engine.step(batches(mesh, 0), lr=0.1)
            freeze(engine, frozen)
            engine.step(batches(mesh, 1), lr=0.1)
            if resumed:
                path = checkpoint.save(tmp_path, 2, engine.state(), {}, keep_last=1)
                model = make()
                freeze(model, frozen, frozen_first)
                engine, manifest = engine_of(model, mesh), checkpoint.read_manifest(path)
                engine.expect(checkpoint.contents(path, manifest))
                state = engine.state()
                checkpoint.load(path, state, manifest)
                engine.restore(state)
            freeze(engine, frozen, frozen=False)
            engine.step(batches(mesh, 2), lr=0.1)
            ends.append(whole(engine))
        return all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

    assert all(run_ranks(script, world))


@pytest.mark.parametrize("degrees", [{"ep": 2}, {"tp": 2}, {"data_parallel": "fsdp"}], ids=str)
def test_experts_alone_are_trained(degrees: dict[str, Any]) -> None:
    def script(rank: int, world: int) -> dict[str, Tensor]:
        mesh, model = mesh_of(world, degrees), make()
        freeze(model, lambda name: "experts" not in name)
        engine = engine_of(model, mesh)
        for step in range(2):
            engine.step(batches(mesh, step), lr=0.1)
        return whole(engine)

    want, before = script(0, 1), dict(make().named_parameters())
    for got in run_ranks(script, 2):
        assert {n for n in got if not torch.equal(got[n], before[n])} == {n for n in got if "experts" in n}
        assert worst(got, want)[0] < 1e-8


def test_buckets_of_any_size_give_the_same_sums() -> None:
    """Sums must not depend on bucket size, even if each weight has its own bucket and starts during the backward."""

    def script(rank: int, world: int, nbytes: int) -> dict[str, Tensor]:
        mesh, optimizer = mesh_of(world, {"ep": 2}), Recorded()
        engine = engine_of(make(layers=4), mesh, optimizer)
        engine._reducer._bucket_bytes = nbytes
        engine.step(batches(mesh), lr=0.1)
        return optimizer.gradients[0]

    want = script(0, 1, 1 << 20)
    for nbytes in (1, 2000):
        for got in run_ranks(script, 2, nbytes):
            assert got.keys() == want.keys() and worst(got, want)[0] < 1e-8


def test_the_optimizer_of_a_run_has_no_frozen_weights() -> None:
    model = make()
    freeze(model, lambda name: "experts" in name)
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig())
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == {p for name, p in model.named_parameters() if "experts" not in name}
