"""Checks a layer under FSDP2 in a user's own script, without our engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from equimoe.moe import BalanceConfig, MoE, MoEConfig
from equimoe.moe.engines import Batch, build_engine
from equimoe.moe.parallel import ParallelConfig, build_mesh
from tests.helpers import oracle
from tests.helpers.fork import run_ranks

CONFIG = MoEConfig(
    hidden_size=8, intermediate_size=6, num_experts=4, top_k=2, balance=BalanceConfig(coefficient=0.5), init_std=0.5
)


def tokens(rank: int, micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + micro_batch)
    return torch.randn(5 + rank, 8, dtype=torch.float64, generator=generator)


def make() -> MoE:
    torch.manual_seed(0)
    return MoE(CONFIG).double()


def test_router_gradient_and_window() -> None:
    """FSDP takes the gradients from unsharded weights after each micro-batch; the step must still have two micro-
    batches.
    """

    def script(rank: int, world: int) -> tuple[list[Tensor], list[int]]:
        layer = make()
        fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, foreach=False)
        gradients, lengths = [], []
        for _ in range(2):
            outs = []
            for m in range(2):
                outs.append(layer(tokens(rank, m)))
                (outs[-1] * 0).sum().backward()
            gradients.append(layer.router.weight.grad.full_tensor())
            lengths.append(len(layer.balancer.visits))
            optimizer.step()
            optimizer.zero_grad()
            lengths.append(len(layer.balancer.visits))
        return gradients, lengths

    layer = make()
    weighted = torch.zeros(())
    seen = torch.zeros(4, dtype=torch.float64)
    routed = [oracle.route(layer, torch.cat([tokens(r, m) for r in range(2)])) for m in range(2)]
    for m, (_, probs_TE, ids_TK, _) in enumerate(routed):  # rolling: the counts so far
        seen = seen + torch.bincount(ids_TK.flatten(), minlength=4)
        weighted = weighted + 4 * (seen / (2 * 11 * (m + 1)) * probs_TE.sum(0)).sum() / 22
    (0.5 * weighted).backward()
    for gradients, lengths in run_ranks(script, 2):
        assert lengths == [2, 0, 2, 0]
        assert oracle.relative_error(gradients[1], layer.router.weight.grad) < 1e-10


def test_a_skipped_step_starts_anew() -> None:
    """Only sharded weights have gradients after a step, so the layer cannot detect a skipped step by its own weight."""

    def script(rank: int, world: int) -> list[Tensor]:
        layer = make()
        fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, foreach=False)
        gradients = []
        for skipped in (False, True, False):
            for m in range(2):
                (layer(tokens(rank, m)) * 0).sum().backward()
            assert len(layer.balancer.visits) == 2
            gradients.append(layer.router.weight.grad.full_tensor())
            if not skipped:
                optimizer.step()
            optimizer.zero_grad()
        return gradients

    for _, second, third in run_ranks(script, 2):
        assert torch.equal(second, third)


def test_a_step_that_fails_says_why_and_leaves_nothing() -> None:
    def script(rank: int, world: int) -> tuple[str, bool]:
        def engine_of() -> Any:
            return build_engine(
                make(),
                build_mesh(ParallelConfig(data_parallel="fsdp")),
                optimizer=lambda trainable: torch.optim.SGD(trainable.values(), lr=0.1),
                loss=lambda y, labels: (y - labels).square().sum(-1),
                max_norm=1.0,
            )

        def broken(module: MoE, args: Any, output: Tensor) -> None:
            seen.append(output)
            if len(seen) == 2:
                raise RuntimeError("broken in the second micro-batch")

        batches = [Batch(inputs=tokens(rank, m)[None], labels=tokens(rank, 9)[None]) for m in range(2)]
        engine, seen, said = engine_of(), list[Tensor](), ""
        want = engine_of().step(batches, 0.1).norm
        handle = engine.parts[0].register_forward_hook(broken)
        try:
            engine.step(batches, 0.1)
        except RuntimeError as error:
            said = str(error)
        handle.remove()
        return said, torch.equal(engine.step(batches, 0.1).norm, want)

    assert run_ranks(script, 2) == [("broken in the second micro-batch", True)] * 2
