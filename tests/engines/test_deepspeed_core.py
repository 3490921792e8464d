"""This package's own layer in DeepSpeed's engine, as users of their own scripts or of the Trainer have it.

DeepSpeed's optimizer holds copies of the weights, and ZeRO 2 and 3 take gradients away after every backward.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

deepspeed = pytest.importorskip("deepspeed", reason="needs DeepSpeed, which `make engines` installs")
pytestmark = pytest.mark.engines

from deepspeed.runtime.zero import GatheredParameters  # noqa: E402

from equimoe.moe import BalanceConfig, MoE, MoEConfig  # noqa: E402
from tests.helpers import oracle  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402

PASSES, STEPS = 2, 2


def model(micro_batches: int | None) -> nn.Module:
    torch.manual_seed(0)
    balance = BalanceConfig(coefficient=0.5, micro_batches=micro_batches, bias_update_rate=0.05)
    return nn.Sequential(nn.Linear(8, 8), MoE(MoEConfig(8, 16, 4, 2, init_std=0.3, balance=balance)), nn.Linear(8, 8))


def tokens(number: int, rank: int) -> Tensor:
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(10 * number + rank))


def loss_of(run: nn.Module, x: Tensor) -> Tensor:
    return (run(x) - x).square().mean()


def one_process(world: int) -> list[Tensor]:
    alone = model(PASSES)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(STEPS):
        for m in range(PASSES):
            x = torch.cat([tokens(PASSES * step + m, rank) for rank in range(world)])
            (loss_of(alone, x) / PASSES).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert alone[1].router.bias_E.any()
    return [p.detach() for p in (*alone.parameters(), alone[1].router.bias_E)]


def train(rank: int, stage: int, micro_batches: int | None, stray: bool = False) -> list[Tensor]:
    own = model(micro_batches)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": PASSES,
        "gradient_clipping": 0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=own, optimizer=optimizer, config=config)
    for number in range(STEPS * PASSES):
        engine.backward(loss_of(engine, tokens(number, rank)))
        if stray:
            engine(tokens(99, rank))
        engine.step()
        if stray:
            engine(tokens(98, rank))
    with GatheredParameters(list(own.parameters()), enabled=stage == 3):
        return [p.detach().clone() for p in (*own.parameters(), own[1].router.bias_E)]


def test_a_known_number_of_backwards_equals_one_process() -> None:
    def rank_main(rank: int, world: int) -> list[list[Tensor]]:
        return [train(rank, stage, PASSES) for stage in (0, 1, 2, 3)]

    for found in run_ranks(rank_main, 2):
        for stage, values in enumerate(found):
            for value, right in zip(values, one_process(2), strict=True):
                assert oracle.relative_error(value, right) < 1e-5, stage


def test_training_forwards_without_a_backward_change_nothing() -> None:
    def rank_main(rank: int, world: int) -> list[list[Tensor]]:
        return [train(rank, stage, PASSES, stray=True) for stage in (0, 1, 2)]

    for found in run_ranks(rank_main, 2):
        for stage, values in enumerate(found):
            for value, right in zip(values, one_process(2), strict=True):
                assert oracle.relative_error(value, right) < 1e-5, stage


def test_an_unknown_number_is_refused() -> None:
    """Each optimizer's part of the weights is smaller than the layer."""

    def rank_main(rank: int, world: int) -> None:
        for stage in (1, 2, 3):
            with pytest.raises(ValueError, match=r"SGD: .* perhaps copies .*set balance.micro_batches"):
                train(rank, stage, None)

    run_ranks(rank_main, 2)
