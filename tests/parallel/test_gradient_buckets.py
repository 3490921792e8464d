"""Checks that gradients are reduced in buckets while the last backward runs, and that no fault makes ranks differ.

The model has experts in blocks 1 and 3. Under "dp 4, ep 2" each expert has two replicas, which are DTensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from equimoe.moe.engines.torch import TorchEngine
from equimoe.moe.model import Decoder
from equimoe.moe.parallel import Mesh, ParallelConfig, build_mesh, token_losses
from tests.helpers.fork import run_ranks
from tests.helpers.recorded import Recorded
from tests.helpers.slow import slow_but
from tests.helpers.trained import MICRO_BATCHES, batches, engine_of, make, whole, worst

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "dp 2": (2, {}),
    "dp 4, ep 2": (4, {"ep": 2}),
    "dp 2, tp 2, ep 2": (4, {"tp": 2, "ep": 2}),
    "dp 2, etp 2": (4, {"dp_shard": 4, "etp": 2}),
}
PIPELINES: dict[str, tuple[int, dict[str, Any]]] = {"pp 2, dp 2, ep 2": (4, {"pp": 2, "ep": 2})}


def mesh_of(name: str, world: int) -> Mesh | None:
    return build_mesh(ParallelConfig(**(MESHES | PIPELINES)[name][1])) if world > 1 else None


@pytest.mark.parametrize("name", slow_but(["dp 4, ep 2"], MESHES))
def test_buckets_start_in_one_order_during_the_last_backward(name: str) -> None:
    def script(rank: int, world: int) -> list[str]:
        log: list[str] = []
        sum_up, exchange = dist.all_reduce, dist.all_to_all_single

        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.dtype == torch.float64 and tensor.dim() == 1:
                log.append(f"bucket of {tensor.numel()}")
            return sum_up(tensor, *args, **kwargs)

        def all_to_all(*args: Any, **kwargs: Any) -> Any:
            log.append("exchange")
            return exchange(*args, **kwargs)

        def loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
            log.append("loss")
            return token_losses(logits_BSV, labels_BS)

        mesh = mesh_of(name, world)
        engine = engine_of(make(layers=4, coefficient=0.0), mesh, loss=loss)
        engine._reducer._bucket_bytes = 1  # one bucket per weight
        finish = engine._reducer.finish
        engine._reducer.finish = lambda: (log.append("finish"), finish())[1]  # type: ignore[method-assign]
        dist.all_reduce, dist.all_to_all_single = all_reduce, all_to_all
        engine.step(batches(mesh), lr=0.1)
        return log

    first, *others = run_ranks(script, MESHES[name][0], timeout=120.0)
    assert all([e for e in log if "bucket" in e] == [e for e in first if "bucket" in e] for log in others)
    before, last = first[: first.index("finish")], len(first) - 1 - first[::-1].index("loss")
    buckets = [i for i, entry in enumerate(first) if "bucket" in entry]
    assert first.count("loss") == MICRO_BATCHES and min(buckets) > last
    assert max(buckets) < len(before), "all buckets are under way before the backward ends"
    if "exchange" in before:
        final = len(before) - 1 - before[::-1].index("exchange")
        assert sum(i < final for i in buckets) > len(buckets) / 3, "and the first of them before the last exchange"


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_stages_reduce_during_their_last_backward(schedule: str) -> None:
    """Each stage has two replicas. A schedule that splits backwards reduces after them."""

    def script(rank: int, world: int) -> list[tuple[int, int]]:
        started, sum_up = [0], dist.all_reduce

        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            started[0] += tensor.dtype == torch.float64 and tensor.dim() == 1
            return sum_up(tensor, *args, **kwargs)

        mesh, found = build_mesh(ParallelConfig(pp=2, ep=2, schedule=schedule)), []
        engine = engine_of(make(layers=4, coefficient=0.0), mesh)
        engine._reducer._bucket_bytes = 1
        finish = engine._reducer.finish

        def finish_and_count() -> None:
            found.append((started[0], len(engine._reducer._buckets)))
            finish()

        engine._reducer.finish = finish_and_count  # type: ignore[method-assign]
        dist.all_reduce = all_reduce
        for step in range(2):
            started[0] = 0
            engine.step(batches(mesh, step), lr=0.1)
        return found

    for found in run_ranks(script, 4, timeout=120.0):
        assert all(buckets > 0 and started == (buckets if schedule == "1f1b" else 0) for started, buckets in found)


@pytest.mark.parametrize("nbytes", [1, 3000])
@pytest.mark.parametrize("name", slow_but(["dp 4, ep 2"], MESHES | PIPELINES))
def test_three_steps_equal_one_process_and_themselves(name: str, nbytes: int) -> None:
    """Loss, norm, every gradient and the parameters; a second run must repeat every bit."""

    def script(rank: int, world: int) -> list[Any]:
        mesh, runs = mesh_of(name, world), []
        for _ in range(2 if world > 1 else 1):
            optimizer = Recorded(torch.optim.AdamW, weight_decay=0.5)
            engine, numbers = engine_of(make(layers=4), mesh, optimizer, max_norm=0.5), []
            engine._reducer._bucket_bytes = nbytes
            for step in range(3):
                result = engine.step(batches(mesh, step), lr=0.1)
                own = mesh is None or mesh["tp"].rank == 0
                numbers.append((float(sum(part.sum() for part in result.losses)) * own, float(result.norm)))
            runs.append([numbers, optimizer.gradients, whole(engine)])
        return runs

    ((wanted, gradients, parameters),) = script(0, 1)
    results = run_ranks(script, (MESHES | PIPELINES)[name][0], timeout=120.0)
    for (numbers, of_steps, last), (again, once_more, at_last) in results:
        assert numbers == again and all(torch.equal(last[n], at_last[n]) for n in last)
        for got, repeated, want in zip(of_steps, once_more, gradients, strict=True):
            assert got.keys() <= want.keys() and worst(got, want)[0] < 1e-8
            assert all(torch.equal(got[n], repeated[n]) for n in got)
        assert worst(last, parameters)[0] < 1e-8
        assert [norm for _, norm in numbers] == pytest.approx([norm for _, norm in wanted], rel=1e-6)
    for step, (loss, _) in enumerate(wanted):
        assert sum(numbers[step][0] for (numbers, *_), _ in results) == pytest.approx(loss, rel=1e-9)


class Skipping(Decoder):
    """Skips its first block, which is dense, if told so."""

    skips = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert self.embedding is not None and self.norm is not None and self.head is not None
        x = self.embedding(x)
        for name, block in self.blocks.items():
            if not (self.skips and name == "0"):
                x = block(x, mask)
        return self.head(self.norm(x))


def planted(*_: Any) -> None:
    raise ArithmeticError("planted")


def in_the_last(module: Any, fault: Callable[[Tensor], Any]) -> Callable[[], None]:
    """Call ``fault`` with the module's output in the last forward of a step that has a backward."""
    calls = iter(range(MICRO_BATCHES))

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad and next(calls) == MICRO_BATCHES - 1:
            fault(output)

    return module.register_forward_hook(hook).remove


def before_the_backward(engine: TorchEngine) -> Callable[[], None]:
    """Raise when every rank has run its last forward."""
    return in_the_last(engine.parts[0], planted)


def late_in_the_backward(engine: TorchEngine) -> Callable[[], None]:
    """Raise in the last backward, when only the gradient of the embedding is missing."""
    return in_the_last(engine.parts[0].embedding, lambda output: output.register_hook(planted))


#: what goes wrong on the first replica of each expert, and on the second; None: nothing
FAULTS: dict[str, tuple[Any, Any]] = {
    "late": (late_in_the_backward, late_in_the_backward),
    "at different points": (before_the_backward, late_in_the_backward),
    "on some ranks": (before_the_backward, None),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", slow_but(["dp 2"], ["dp 2", "dp 4, ep 2", "dp 2, tp 2, ep 2"]))
def test_ranks_stay_in_step_after_a_fault(name: str, fault: str) -> None:
    """Some ranks lack gradients, then steps fail at different points; a second model and evaluations come between.

    A rank that has not failed gets no finite norm, so that it does not apply sums that lack the others' part. Under
    tensor parallelism, autograd computes the gradient of more of the embedding than a rank has.
    """

    def script(rank: int, world: int) -> list[list[dict[str, Tensor]]]:
        mesh, found = mesh_of(name, world), []
        assert mesh is not None
        replica = mesh["edp"].rank
        for broken in (False, True):
            engines = [engine_of(make(Skipping, layers=4, coefficient=0.0), mesh) for _ in range(2)]
            engine, other = engines
            engine._reducer._bucket_bytes = 1
            engine.parts[0].skips = replica == 1  # type: ignore[assignment]
            if broken:
                undo = FAULTS[fault][replica]
                if undo is None:
                    result = engine.step(batches(mesh, 7), 0.1, lambda computed: False)
                    assert not result.norm.isfinite()
                else:
                    remove = undo(engine)
                    with pytest.raises(ArithmeticError, match="planted"):
                        engine.step(batches(mesh, 7), 0.1)
                    remove()
                engine.evaluate(batches(mesh, 3))
            other.step(batches(mesh, 2), 0.1)
            for step in range(2):
                engine.step(batches(mesh, step), 0.1)
                if broken:
                    other.evaluate(batches(mesh, 4))
            found.append([whole(engine), whole(other)])
        return found

    for wanted, got in run_ranks(script, MESHES[name][0], timeout=120.0):
        for mine, theirs in zip(got, wanted, strict=True):
            assert all(torch.equal(mine[n], theirs[n]) for n in theirs)
