"""This package's own layer in DeepSpeed's engine, as users of their own scripts or of the Trainer have it.

DeepSpeed's optimizer holds copies of the weights, and ZeRO 2 and 3 take gradients away after every backward.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

deepspeed = pytest.importorskip("deepspeed", reason="needs DeepSpeed, which `make engines` installs")
pytestmark = pytest.mark.engines

from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.runtime.zero import GatheredParameters  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402

from equimoe.moe import BalanceConfig, MoE, MoEConfig, use_gradient_scaler  # noqa: E402
from tests.helpers import oracle  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402

PASSES, STEPS = 2, 2


def model(micro_batches: int | None, coefficient: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    balance = BalanceConfig(coefficient=coefficient, micro_batches=micro_batches, bias_update_rate=0.05)
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


def settings(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": PASSES,
        "gradient_clipping": 0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def train(rank: int, stage: int, micro_batches: int | None, stray: bool = False) -> list[Tensor]:
    own = model(micro_batches)
    config = settings(stage)
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


def overflowing(rank: int, stage: int, known: bool = True) -> tuple[list[bool], list[Tensor], list[Tensor]]:
    """Train in fp16. In the second step, one micro-batch on one rank has a gradient that is not finite.

    Returns which steps were applied, the bias after each, and the weights in fp32.
    """
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed asks whether the CPU is fast at it
    own, applied, biases = model(PASSES), [], []
    config = settings(stage) | {"fp16": {"enabled": True, "initial_scale_power": 10, "hysteresis": 1}}
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=own, optimizer=optimizer, config=config)
    if known:
        use_gradient_scaler(own, engine)
    for number in range(4 * PASSES):
        huge = 1e6 if rank == 1 and number == PASSES else 1.0
        engine.backward(huge * loss_of(engine, tokens(number, rank).half()).float())
        engine.step()
        if number % PASSES == PASSES - 1:
            applied.append(engine.was_step_applied())
            biases.append(own[1].router.bias_E.clone())
    return applied, biases, [(safe_get_full_fp32_param(p) if stage else p).detach().float() for p in own.parameters()]


def skipping(applied: list[bool], coefficient: float) -> tuple[list[Tensor], list[Tensor]]:
    """One process that skips the same steps."""
    own, biases = model(PASSES, coefficient), []
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    for step, takes in enumerate(applied):
        for m in range(PASSES):
            x = torch.cat([tokens(PASSES * step + m, rank) for rank in range(2)])
            (loss_of(own, x) / PASSES).backward()
        if takes:
            optimizer.step()
        optimizer.zero_grad()
        biases.append(own[1].router.bias_E.clone())
    return biases, [p.detach() for p in own.parameters()]


def test_an_overflow_on_one_rank_skips_the_step_on_all_of_them() -> None:
    """Neither weights nor biases move, and the next steps are those of one process. The balance loss is scaled too."""

    def rank_main(rank: int, world: int) -> list[Any]:
        return [overflowing(rank, stage) for stage in (0, 1, 2)]

    wanted = [True, False, True, True]
    (right_biases, right), (_, without) = skipping(wanted, 0.5), skipping(wanted, 0.0)
    for found in run_ranks(rank_main, 2):
        for stage, (applied, biases, weights) in enumerate(found):
            assert applied == wanted, stage
            assert torch.equal(biases[1], biases[0]) and not torch.equal(biases[2], biases[1])
            assert all(torch.equal(*pair) for pair in zip(biases[:3], right_biases, strict=False)), stage
            if stage == 0:  # DeepSpeed 0.19.8 divides by the scale without having multiplied by it, so nothing trains
                continue
            assert torch.equal(biases[3], right_biases[3])
            errors = [
                max(oracle.relative_error(*pair) for pair in zip(weights, w, strict=True)) for w in (right, without)
            ]
            assert errors[0] < 0.001 < 0.01 < errors[1], (stage, errors)


def test_a_loss_scale_that_the_layer_does_not_know_is_refused() -> None:
    def rank_main(rank: int, world: int) -> None:
        for stage in (0, 1, 2):
            with pytest.raises(
                ValueError, match=r"^DeepSpeedEngine: .* 1024 times too .*_scaler\(model, engine\) once"
            ):
                overflowing(rank, stage, known=False)

    run_ranks(rank_main, 2)
