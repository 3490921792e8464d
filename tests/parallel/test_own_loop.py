"""Checks training loops of users' own, whatever wraps the model: balance, clipping and sharding equal one process."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from equimoe.moe import BalanceConfig, MoE, MoEConfig, Placement, Step, counting_pass
from equimoe.moe.balance.own_step import registry
from equimoe.moe.parallel import ParallelConfig, build_mesh, clip_grad_norm_, parallelize
from tests.helpers import oracle, trained
from tests.helpers.fork import run_ranks
from tests.helpers.recorded import full
from tests.helpers.slow import slow_but

WORLD, MICRO_BATCHES = 2, 2


def make(**balance: Any) -> nn.Sequential:
    torch.manual_seed(0)
    config = BalanceConfig(**{"coefficient": 1.0, "estimator": "exact", **balance})
    moe = MoE(MoEConfig(8, 8, 8, 2, init_std=0.6, balance=config))
    return nn.Sequential(nn.Linear(8, 8), moe, nn.Linear(8, 8)).double()


def tokens(step: int, m: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * m + rank)
    shape: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return torch.randn(2, 6, 8, **shape) + 2 * torch.randn(8, **shape)


def alone(step: int) -> dict[str, Tensor]:
    """The gradients of a step's balance loss in one process."""
    model = make()
    x = torch.cat([tokens(step, m, rank) for m in range(MICRO_BATCHES) for rank in range(WORLD)])
    (model(x) * 0).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if bool(p.grad.any())}


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "DDP, static graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "DDP, gradients as views": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "FSDP2": sharded,
    "DDP, then compiled": lambda model: compiled(DistributedDataParallel(model)),
    "compiled, then DDP": lambda model: DistributedDataParallel(compiled(model)),
    "FSDP2, then compiled": lambda model: compiled(sharded(model)),
}
FAST = ("DDP", "FSDP2", "compiled, then DDP")


def balance_gradients(rank: int, world: int, wrap: Callable[[nn.Module], nn.Module]) -> list[dict[str, Tensor]]:
    """The gradients of two steps, whose micro-batches are all counted through the wrapped model first."""
    warnings.simplefilter("ignore")
    original = make()
    model, found = wrap(original), []
    dispatcher = original[1].dispatcher  # slow to compile, and not tested here
    dispatcher.send, dispatcher.finish = map(torch.compiler.disable, (dispatcher.send, dispatcher.finish))
    for step in range(2):
        batches = [tokens(step, m, rank) for m in range(MICRO_BATCHES)]
        with counting_pass():
            for x in batches:
                model(x)
        for x in batches:
            ((model(x) * 0).sum() / MICRO_BATCHES).backward()
        found.append({name: full(p.grad) for name, p in original.named_parameters()})
        model.zero_grad()
    return found


@pytest.mark.parametrize("name", slow_but(list(FAST), list(WRAPPERS)))
def test_counting_through_a_wrapper(name: str) -> None:
    for found in run_ranks(balance_gradients, WORLD, WRAPPERS[name]):
        for step, gradients in enumerate(found):
            for weight, right in alone(step).items():
                assert oracle.relative_error(gradients[weight], right) < 1e-10, weight


def test_zero_redundancy_optimizer() -> None:
    """Each rank's optimizer holds some of the weights, but the step ends, and the bias moves, once on all ranks."""

    def script(rank: int, world: int) -> tuple[list[float], Tensor]:
        warnings.simplefilter("ignore")
        layer = make(estimator="rolling", bias_update_rate=0.01)
        model = DistributedDataParallel(layer)
        optimizer, moved = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.0), []
        for step in range(3):
            before = layer[1].router.bias_E.clone()
            model(tokens(step, 0, rank)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            moved.append(float((layer[1].router.bias_E - before).abs().max()))
        return moved, layer[1].router.bias_E

    (moved, bias_E), (_, other_E) = run_ranks(script, WORLD)
    assert moved == pytest.approx([0.01] * 3) and torch.equal(bias_E, other_E)


@pytest.mark.parametrize("around", [True, False])
def test_flat_parameters_are_refused(around: bool) -> None:
    """FSDP1's flat parameter hides a layer's weights, which must not end its balancing silently."""

    def script(rank: int, world: int) -> None:
        warnings.simplefilter("ignore")
        layer = make(estimator="rolling")[1]
        model = nn.Sequential(layer) if around else layer
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model(tokens(0, 0, rank)).square().sum().backward()
        with pytest.raises(ValueError, match="MoE: its weights are views of a flat parameter.*use_orig_params=True"):
            optimizer.step()

    run_ranks(script, WORLD)


@pytest.mark.parametrize("driven", [False, True])
def test_flat_parameters_balance_if_the_number_of_backwards_is_known(driven: bool) -> None:
    """The update changes the flat parameter, after which torch answers few questions about a view of it."""

    def script(rank: int, world: int) -> list[float]:
        warnings.simplefilter("ignore")
        layer, moved = make(estimator="rolling", bias_update_rate=0.01, micro_batches=None if driven else 1)[1], []
        driver = Step.of(layer) if driven else None
        model = FullyShardedDataParallel(layer, device_id=torch.device("cpu"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.01)
        for step in range(3):
            before = layer.router.bias_E.clone()
            with driver.micro_batch() if driver else contextlib.nullcontext():
                out = model(tokens(step, 0, rank))
            out.square().sum().backward()
            optimizer.step()
            other.step()
            if driver:
                driver.end()
            optimizer.zero_grad()
            moved.append(float((layer.router.bias_E - before).abs().max()))
        return moved

    for moved in run_ranks(script, WORLD):
        assert moved == pytest.approx([0.01] * 3)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({}, "parallel.data_parallel='ddp': .* would drift apart; set parallel.data_parallel='fsdp'"),
        ({"ep": 2}, "parallel.data_parallel='ddp'"),
        ({"tp": 2}, "parallel.data_parallel='ddp'"),
        ({"tp": 2, "data_parallel": "fsdp"}, "parallel.tp=2: .* build_engine"),
        ({"ep": 2, "data_parallel": "fsdp"}, ""),
        ({"pp": 2}, ""),
    ],
)
def test_weights_that_nobody_reduces_are_refused(degrees: dict[str, Any], message: str) -> None:
    """In one's own loop, unless it is said that the loop reduces them."""

    def script(rank: int, world: int) -> None:
        mesh, model = build_mesh(ParallelConfig(**degrees)), trained.make()
        if message:
            with pytest.raises(ValueError, match=message + ".*pass reduced=True"):
                parallelize(model, mesh)
        parallelize(model, mesh, reduced=bool(message))

    run_ranks(script, WORLD)


def test_the_default_group_is_none() -> None:
    """As in torch, and as for ``MoE(config, group=None)``; here with gradients that are summed."""

    def script(rank: int, world: int) -> Tensor:
        model = make(estimator="rolling")
        model[1].place(Placement.of_group(None, gradient_scale=1.0))
        (model(tokens(0, 0, rank)) * 0).sum().backward()
        grad = model[1].router.weight.grad
        torch.distributed.all_reduce(grad)
        return grad

    model = make()
    (model(torch.cat([tokens(0, 0, rank) for rank in range(WORLD)])) * 0).sum().backward()
    for found in run_ranks(script, WORLD):
        assert oracle.relative_error(found, model[1].router.weight.grad) < 1e-10


# ---- clipping


@pytest.mark.parametrize(
    ("world", "parallel", "error"),
    [
        (2, {"ep": 2}, "got mixed torch.Tensor and DTensor"),
        (2, {"data_parallel": "fsdp"}, "must have the same mesh"),
        (4, {"ep": 2, "data_parallel": "fsdp"}, "must have the same mesh"),
    ],
    ids=["ep", "FSDP2", "ep and FSDP2"],
)
def test_only_our_clipping_knows_several_meshes(world: int, parallel: dict[str, Any], error: str) -> None:
    """Torch's cannot add norms on different meshes. It must raise, and not clip by a wrong norm."""
    max_norm = 0.1

    def script(rank: int, world: int) -> tuple[str, float, float]:
        engine = trained.engine_of(trained.make(), build_mesh(ParallelConfig(**parallel)), max_norm=0.0)
        found: list[Any] = []

        def clip(optimizer: Optimizer, *_: Any) -> None:
            weights = list(engine.parameters.values())
            with pytest.raises(RuntimeError) as raised:
                nn.utils.clip_grad_norm_(weights, max_norm)
            found.append(str(raised.value))
            found.extend(float(clip_grad_norm_(weights, max_norm)) for _ in range(2))

        engine.optimizer.register_step_pre_hook(clip)
        engine.step(trained.batches(build_mesh(ParallelConfig(**parallel))), lr=0.0)
        return tuple(found)

    right = float(trained.engine_of(trained.make(), None, max_norm=0.0).step(trained.batches(None), lr=0.0).norm)
    for raised, norm, after in run_ranks(script, world):
        assert error in raised
        assert norm == pytest.approx(right, rel=1e-6) and after == pytest.approx(max_norm, rel=1e-5)


def test_groups_are_let_go_at_the_end() -> None:
    """Also while a loss of the last step is alive: gloo's threads abort the process if they outlive the interpreter."""

    def rank_main(rank: int, world: int) -> None:
        layer = MoE(MoEConfig(8, 8, num_experts=4, top_k=2))
        loss = layer(torch.randn(4, 8)).sum()
        loss.backward()
        (sums,) = layer.balancer.shared.values()
        group = weakref.ref(sums.axis.group)
        dist.destroy_process_group()
        assert group() is not None
        registry.forget_sums()
        assert group() is None and loss.requires_grad

    run_ranks(rank_main, 2)
