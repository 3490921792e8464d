"""Expert weights whose gradients are added to ``main_grad``: in a layer, in our engine, on one and on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equimoe.moe import BalanceConfig, MoE, MoEConfig
from equimoe.moe.engines import build_engine
from equimoe.moe.engines.base import Batch
from equimoe.moe.engines.main_grads import MainGrads
from equimoe.moe.parallel import ParallelConfig, build_mesh
from tests.helpers.fork import run_ranks

CONFIG = MoEConfig(hidden_size=16, intermediate_size=24, num_experts=4, top_k=2, balance=BalanceConfig(coefficient=0.0))


def weights(layer: MoE) -> list[nn.Parameter]:
    return list(layer.experts.parameters())


def inputs(m: int) -> Tensor:
    return torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(m))


class Hooked(nn.Module):
    """What Megatron-Core's DDP does with its weights."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer
        self.accumulators = []
        for weight in weights(layer):
            weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False
            accumulator = weight.view_as(weight).grad_fn.next_functions[0][0]
            accumulator.register_hook(partial(self.collect, weight))
            self.accumulators.append(accumulator)

    def collect(self, weight: Any, *_: object) -> None:
        assert weight.grad is not None, "DDP with overlap_grad_reduce needs one"
        if not weight.grad_added_to_main_grad:
            weight.main_grad.add_(weight.grad)
        weight.grad = None


@pytest.mark.parametrize("recompute", [False, True])
def test_megatron_convention(recompute: bool) -> None:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(**{**vars(CONFIG), "recompute_experts": recompute})).bfloat16()
    twin = MoE(CONFIG).bfloat16().double()
    twin.load_state_dict(layer.state_dict())
    hooked = Hooked(layer)
    for m in range(3):
        layer(inputs(m).bfloat16()).float().square().sum().backward()
        twin(inputs(m).bfloat16().double()).square().sum().backward()
    assert len(hooked.accumulators) == 2
    for weight, want in zip(weights(layer), weights(twin), strict=True):
        assert weight.grad_added_to_main_grad is True and weight.grad is None
        assert (weight.main_grad - want.grad).norm() < 0.02 * want.grad.norm()


def test_a_gradient_that_arrives_otherwise_is_added() -> None:
    """As from experts that were copied to other ranks."""
    torch.manual_seed(0)
    layer = MoE(CONFIG)
    for weight in weights(layer):
        weight.main_grad = torch.zeros_like(weight)
    gate_up, down = layer.experts._weights(torch.bfloat16)
    (gate_up.sum() + 2 * down.sum()).backward()
    assert [w.main_grad.unique().tolist() for w in weights(layer)] == [[1.0], [2.0]]
    assert all(w.grad is None for w in weights(layer))


class Model(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.first = MoE(MoEConfig(**{**vars(CONFIG), "recompute_experts": recompute}))
        self.second = MoE(CONFIG)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


def squares(y: Tensor, labels: Tensor) -> Tensor:
    return (y.float() - labels).square().sum(-1)


def trained(fused: bool, micro_batches: int, amp: bool, mesh: Any = None, recompute: bool = False) -> list[Tensor]:
    """Return the weights after two steps."""
    torch.manual_seed(0)
    model = Model(recompute)

    def optimizer(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters.values(), lr=0.1)

    precision: Callable[[], Any] = partial(torch.autocast, "cpu", torch.bfloat16, enabled=amp)
    engine = build_engine(model, mesh, optimizer, loss=squares, max_norm=1.0, precision=precision)
    assert engine._runner.main_grads.weights == [], "on a CPU, autograd adds"
    experts = [p for name, p in engine.parameters.items() if ".experts." in name]
    if fused:
        engine._runner.main_grads = MainGrads(experts)
    for step in range(2):
        batches = [Batch(inputs(10 * step + m), inputs(99)) for m in range(micro_batches)]
        engine.step(batches, 0.1)
        assert not any(hasattr(p, "main_grad") or p.grad is not None for p in experts)
    return [p.detach().to_local() if hasattr(p, "to_local") else p.detach() for p in engine.parameters.values()]


@pytest.mark.parametrize(("micro_batches", "amp", "recompute"), [(1, True, False), (2, True, True), (3, False, False)])
def test_our_engine_gets_the_same_gradients(micro_batches: int, amp: bool, recompute: bool) -> None:
    """The bits are equal, because on a CPU the same gradients are added in the same order."""
    pairs = zip(
        trained(True, micro_batches, amp, recompute=recompute),
        trained(False, micro_batches, amp, recompute=recompute),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_two_ranks_with_expert_parallelism() -> None:
    def body(rank: int, world: int) -> bool:
        mesh = build_mesh(ParallelConfig(ep=2), "cpu")
        found, wanted = (trained(fused, 2, True, mesh) for fused in (True, False))
        assert found[1].shape[0] == 2, "experts of this rank"
        return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    assert run_ranks(body, 2) == [True, True]


def test_what_is_left_of_a_step_that_fails() -> None:
    layer = MoE(CONFIG)
    main_grads = MainGrads(weights(layer))
    with pytest.raises(RuntimeError, match="broken"), main_grads.of_step(2):
        layer(inputs(0)).sum().backward()
        raise RuntimeError("broken")
    assert not any(hasattr(w, "main_grad") for w in weights(layer))
    with main_grads.of_step(2):
        pass
    assert all(w.grad is None for w in weights(layer)), "a weight that was not used has no gradient"
