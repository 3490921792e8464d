"""Checks steps that go wrong: exceptions, gradients that are not finite, evaluations in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from equimoe.moe.engines import Batch, build_engine
from equimoe.moe.parallel import Mesh, ParallelConfig, build_mesh, token_losses
from tests.helpers.fork import run_ranks
from tests.helpers.recorded import Recorded, full
from tests.helpers.slow import slow_but
from tests.helpers.trained import batches, engine_of, make, whole

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "dp 2, ep 2": (2, {"ep": 2}),
    "tp 2": (2, {"tp": 2}),
    "fsdp 2": (2, {"data_parallel": "fsdp"}),
}
MORE: dict[str, tuple[int, dict[str, Any]]] = {
    "hsdp 2 x 2": (4, {"dp_replicate": 2, "data_parallel": "fsdp"}),
    "pp 2, fsdp 2": (4, {"pp": 2, "data_parallel": "fsdp"}),
    "zero bubble v, fsdp 2": (4, {"pp": 2, "schedule": "zbv", "data_parallel": "fsdp"}),
}


def mesh_of(world: int, degrees: dict[str, Any]) -> Mesh | None:
    return build_mesh(ParallelConfig(**degrees)) if world > 1 else None


class Broken(RuntimeError):
    """Raised by the loss of a test."""


class _BreakBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise Broken


class Loss:
    """The language model's loss; :meth:`break_at` makes it raise in the forward or backward of a later micro-batch."""

    def __init__(self) -> None:
        self.where, self.left = "", 0

    def break_at(self, where: str, micro_batch: int) -> None:
        self.where, self.left = where, micro_batch + 1

    def __call__(self, logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        losses_BS = token_losses(logits_BSV, labels_BS)
        self.left -= 1
        if self.left == 0 and self.where == "forward":
            raise Broken
        if self.left == 0 and self.where == "backward":
            return _BreakBackward.apply(losses_BS)
        return losses_BS * float("nan") if self.left == 0 else losses_BS


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *slow_but(
            [(name, torch.float64) for name in ("alone", "dp 2, ep 2", "fsdp 2")],
            [(name, torch.float64) for name in MESHES],
        ),
        ("fsdp 2", torch.bfloat16),
    ],
    ids=str,
)
def test_after_an_exception_the_next_step_is_right(name: str, dtype: torch.dtype) -> None:
    """A step raises on all ranks, in a forward or backward, in the first or last micro-batch; the next is right."""
    world, degrees = MESHES[name]
    how: dict[str, Any] = {} if dtype == torch.float64 else {"dtype": dtype}

    def script(rank: int, world: int) -> list[list[dict[str, Tensor]]]:
        mesh, found = mesh_of(world, degrees), []
        for where in (None, ("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1)):
            loss, optimizer = Loss(), Recorded(torch.optim.AdamW, weight_decay=0.5)
            model = make(coefficient=0.0).to(torch.float32 if how else torch.float64)
            engine = engine_of(model, mesh, optimizer, loss=loss, **how)
            if where is not None:
                loss.break_at(*where)
                with pytest.raises(Broken):
                    engine.step(batches(mesh, 7), lr=0.1)
                assert all(p.grad is None for p in engine.parameters.values())
                assert not engine.optimizer.state
            engine.step(batches(mesh, 0), lr=0.1)
            found.append([whole(engine), optimizer.gradients[0]])
        return found

    for wanted, *others in run_ranks(script, world):
        for got in others:
            for mine, theirs in zip(got, wanted, strict=True):
                assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize("name", slow_but(["alone", "tp 2", "pp 2, fsdp 2"], [*MESHES, "pp 2, fsdp 2"]))
def test_a_step_that_is_not_finite_is_not_applied(name: str) -> None:
    world, degrees = (MESHES | MORE)[name]

    def script(rank: int, world: int) -> bool:
        mesh, loss = mesh_of(world, degrees), Loss()
        engine = engine_of(make(layers=4), mesh, loss=loss)
        first = engine.step(batches(mesh, 0), lr=0.1)
        before = {name: tensor.clone() for name, tensor in engine.state().items()}
        loss.break_at("value", 1)  # on the ranks with a loss
        result = engine.step(batches(mesh, 1), lr=0.1)
        after = engine.state()
        same = all(torch.equal(full(before[n]), full(after[n])) for n in before)
        no_gradients = all(p.grad is None for p in engine.parameters.values())
        again = engine.step(batches(mesh, 2), lr=0.1)
        changed = any(not torch.equal(full(before[n]), full(tensor)) for n, tensor in engine.state().items())
        return first.applied and not result.applied and same and no_gradients and again.applied and changed

    assert all(run_ranks(script, world))


@pytest.mark.parametrize(
    ("name", "raises"),
    [
        *slow_but([("dp 2, ep 2", False), ("pp 2, fsdp 2", False)], [(name, False) for name in (*MESHES, *MORE)]),
        ("alone", True),
        ("fsdp 2", True),
    ],
    ids=lambda value: "raises" if value is True else "" if value is False else value,
)
def test_an_evaluation_leaves_no_trace(name: str, raises: bool) -> None:
    """An evaluation must not change weights, modules' parameters, optimizer state, modes, or the next step."""
    world, degrees = (MESHES | MORE)[name]

    def script(rank: int, world: int) -> tuple[bool, dict[str, Tensor]]:
        mesh, loss = mesh_of(world, degrees), Loss()
        engine = engine_of(make(layers=4), mesh, loss=loss)
        engine.step(batches(mesh, 0), lr=0.1)
        before = engine.state()
        copies = {name: full(tensor) for name, tensor in before.items()}
        engine.parts[0].blocks.eval()  # a mode that the user has set
        if raises:
            loss.break_at("forward", 1)
            with pytest.raises(Broken):
                engine.evaluate(batches(mesh, 5))
        else:
            nats = engine.evaluate(batches(mesh, 5))
            assert all(n.shape == b.labels.shape for n, b in zip(nats, batches(mesh, 5), strict=False))
        assert engine.parts[0].training and not engine.parts[0].blocks.training
        engine.parts[0].blocks.train()
        after = engine.state()
        assert list(after) == list(before)
        same = all(after[n].dtype == before[n].dtype and torch.equal(copies[n], full(after[n])) for n in before)
        named = {name: p for part in engine.parts for name, p in part.named_parameters()}
        same = same and all(named[name] is p for name, p in engine.parameters.items())
        if degrees.get("data_parallel") == "fsdp":
            same = same and all(isinstance(after[f"optimizer.{n}.exp_avg"], DTensor) for n in named)
            same = same and all(bool(full(after[f"optimizer.{n}.exp_avg"]).any()) for n in named)
        engine.step(batches(mesh, 1), lr=0.1)
        return same, whole(engine)

    def straight(rank: int, world: int) -> dict[str, Tensor]:
        mesh = mesh_of(world, degrees)
        engine = engine_of(make(layers=4), mesh)
        for step in range(2):
            engine.step(batches(mesh, step), lr=0.1)
        return whole(engine)

    for (same, got), want in zip(run_ranks(script, world), run_ranks(straight, world), strict=True):
        assert same and all(torch.equal(got[n], want[n]) for n in want)


def test_reading_the_state_changes_nothing() -> None:
    def run(read: bool) -> dict[str, Tensor]:
        engine = engine_of(make(), None)
        for step in range(3):
            if read:
                engine.state()
            engine.step(batches(None, step), lr=0.1)
        return engine.state()

    want = run(read=False)
    assert all(torch.equal(value, want[name]) for name, value in run(read=True).items())


class Masked(nn.Module):
    """Takes a mask, but each position's output depends on that position alone."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner).double()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.inner(x)


MASK = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.5


def assert_masked(make: Callable[[], Masked], x: Tensor, y: Tensor, want: Tensor, alone: Masked, **how: Any) -> None:
    """Check the first gradients on one and two ranks against those of the loss ``want`` of the model ``alone``."""

    def script(rank: int, world: int) -> dict[str, Tensor]:
        optimizer, mesh = Recorded(), mesh_of(world, {})
        engine = build_engine(make(), mesh, optimizer, **how)
        rows = slice(rank * 4 // world, (rank + 1) * 4 // world)
        result = engine.step([Batch(x[i : i + 1], y[i : i + 1], MASK[i : i + 1]) for i in range(4)[rows]], lr=0.1)
        losses = torch.cat(result.losses)
        assert not losses[~MASK[rows]].any() and losses[MASK[rows]].all()
        return optimizer.gradients[0]

    want.backward()
    for world in (1, 2):
        for got in run_ranks(script, world):
            for name, p in alone.named_parameters():
                assert torch.allclose(got[name], p.grad, rtol=1e-12), name


def test_real_labels_and_a_mask() -> None:
    """With float labels and a user's own loss, the mean is over positions where the mask is True, on all ranks."""

    def make() -> Masked:
        torch.manual_seed(0)
        return Masked(nn.Linear(3, 3))

    x, y = torch.randn(2, 4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone = make()
    want = (alone(x) - y)[MASK].square().sum(-1).mean()
    assert_masked(make, x, y, want, alone, loss=lambda out, label: (out - label).square().sum(-1))


def test_tokens_that_a_mask_hides_have_no_loss() -> None:
    def make() -> Masked:
        torch.manual_seed(0)
        return Masked(nn.Embedding(7, 3), nn.Linear(3, 7))

    x, y = torch.randint(7, (2, 4, 5), generator=torch.Generator().manual_seed(0))
    alone = make()
    assert_masked(make, x, y, nn.functional.cross_entropy(alone(x)[MASK], y[MASK]), alone)


def test_tensor_parallelism_refuses_a_micro_batch_without_sequences() -> None:
    """torch would compute it without end."""

    def script(rank: int, world: int) -> None:
        mesh = build_mesh(ParallelConfig(tp=2))
        engine, empty = engine_of(make(), mesh), torch.zeros(0, 8, dtype=torch.int64)
        for run in (lambda b: engine.step(b, lr=0.1), engine.evaluate):
            with pytest.raises(ValueError, match=r"batch.inputs: has no sequence, .* mask=False .* parallel.tp=2 to 1"):
                run([*batches(mesh), Batch(empty, empty)])
        engine.step(batches(mesh), lr=0.1)

    run_ranks(script, 2)
