"""Expert weights that are cast once per step, on any mesh: the same bits as casts in every forward."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from equimoe.moe import MoE, MoEConfig, cast_once
from equimoe.moe.collectives import world_axis
from equimoe.moe.config import PlacementConfig
from equimoe.moe.experts.casts import KeptCasts
from equimoe.moe.parallel import ParallelConfig, build_mesh
from tests.helpers import trained
from tests.helpers.casts import Casts, always_cast
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but

BF16 = partial(torch.autocast, "cpu", torch.bfloat16)
Found = tuple[dict[str, Tensor], list[Tensor]]


def three_steps(
    degrees: dict[str, Any],
    dtype: torch.dtype | None = None,
    layers: int = 2,
    recompute_blocks: bool = True,
    **placement: Any,
) -> tuple[Found, int]:
    """Return weights and losses of evaluations, and how often the experts of this rank were cast in the last step."""
    mesh = build_mesh(ParallelConfig(**degrees), "cpu")
    engine = trained.engine_of(
        trained.make(layers=layers, recompute_blocks=recompute_blocks).float(),
        mesh,
        dtype=dtype,
        precision=BF16 if dtype is None else nullcontext,
        placement=PlacementConfig(**placement),
    )
    losses: list[Tensor] = []
    for step in range(3):
        with Casts(nn.ModuleList(engine.parts)) as casts:
            assert engine.step(trained.batches(mesh, step), 0.05).applied
        losses += engine.evaluate(trained.batches(mesh, 9))
    return (trained.whole(engine), losses), casts.count


def same(found: Found, want: Found) -> bool:
    return all(torch.equal(found[0][n], w) for n, w in want[0].items()) and all(map(torch.equal, found[1], want[1]))


ROWS: list[tuple[int, dict[str, Any]]] = [
    (2, {"degrees": {"ep": 2}}),
    (2, {"degrees": {}}),
    (2, {"degrees": {"etp": 2, "tp": 2, "sequence_parallel": False}}),
    (2, {"degrees": {"pp": 2}, "layers": 4}),
    (2, {"degrees": {"pp": 2, "schedule": "interleaved_zero_bubble"}, "layers": 8, "recompute_blocks": False}),
    (2, {"degrees": {"pp": 2, "schedule": "zbv"}, "layers": 8, "recompute_blocks": False}),
    (2, {"degrees": {"experts": "fssdp"}}),
    (2, {"degrees": {"experts": "fssdp"}, "rematerialize": True, "reshard_every": 1}),
    (2, {"degrees": {"experts": "fssdp", "data_parallel": "fsdp"}, "dtype": torch.bfloat16}),
    (4, {"degrees": {"ep": 2, "pp": 2}, "layers": 4}),
]


@pytest.mark.parametrize(("world", "how"), slow_but(ROWS[:1], ROWS))
def test_bits_and_counts(world: int, how: dict[str, Any]) -> None:
    """Steps of two micro-batches, counted ahead, with all blocks recomputed: six forwards of each layer.

    Split backwards recompute nothing.
    """
    forwards = 6 if how.get("recompute_blocks", True) else 4

    def body(rank: int, world: int) -> tuple[bool, int, bool]:
        found, once = three_steps(**how)
        with always_cast():
            want, always = three_steps(**how)
        return same(found, want), once, always >= forwards * once

    of_rank = 2 * how.get("layers", 2) // 2 // how["degrees"].get("pp", 1)  # two weights in every second block
    assert run_ranks(body, world, timeout=100) == [(True, of_rank, True)] * world


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_fsdp_gathers_weights_itself(dtype: torch.dtype | None) -> None:
    """No cast of its gathered weights is kept. With a ``dtype``, it gathers them in that, and no forward casts."""

    def body(rank: int, world: int) -> tuple[bool, bool]:
        kept, of = [], KeptCasts.of
        how: dict[str, Any] = {"degrees": {"data_parallel": "fsdp"}, "dtype": dtype}
        with mock.patch.object(KeptCasts, "of", lambda *given: kept.append(of(*given))):
            found, _ = three_steps(**how)
        with always_cast():
            want, _ = three_steps(**how)
        return same(found, want), bool(kept) == (dtype is None) and not any(cast is not None for cast in kept)

    assert run_ranks(body, 2, timeout=100) == [(True, True)] * 2


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (MoE(MoEConfig(16, 24, num_experts=4, top_k=2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_a_loop_of_your_own_with_all_its_steps_in_the_block(wrap: Any) -> None:
    """The optimizer is fused. FSDP puts gathered weights into the memory that they had before."""

    def trains(block: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = wrap(Two())
        optimizer, found = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), []
        with cast_once(model) if block else nullcontext():
            for step in range(3):
                for m in range(2):
                    torch.manual_seed(10 * step + 2 * m + world_axis().rank)
                    with BF16():
                        y = model(torch.randn(2, 5, 16))
                    found.append(y.detach())
                    y.float().square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return found

    def body(rank: int, world: int) -> bool:
        return all(map(torch.equal, trains(True), trains(False)))

    assert run_ranks(body, 2) == [True] * 2


def test_a_block_that_is_entered_while_weights_are_gathered() -> None:
    """FSDP fills them again, after a change of the sharded weights that torch does not count for the gathered ones."""

    def body(rank: int, world: int) -> list[bool]:
        torch.manual_seed(0)
        layer, x = fully_shard(MoE(MoEConfig(16, 24, num_experts=4, top_k=2)).eval()), torch.randn(2, 5, 16)

        @torch.no_grad()
        def output() -> Tensor:
            with BF16():
                return layer(x).clone()

        before = output()
        layer.unshard()
        with cast_once(layer):
            found = [output()]
            layer.reshard()
            with torch.no_grad():
                for weight in layer.experts.parameters():
                    weight.mul_(2)
            found.append(output())
        after = output()
        return [torch.equal(found[0], before), torch.equal(found[1], after), not torch.equal(before, after)]

    assert run_ranks(body, 2) == [[True] * 3] * 2
