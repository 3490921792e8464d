"""Swapped models of transformers under DeepSpeed's ZeRO."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs Transformers, which `make engines` installs")
deepspeed = pytest.importorskip("deepspeed", reason="needs DeepSpeed, which `make engines` installs")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

from equimoe.moe import BalanceConfig  # noqa: E402
from equimoe.moe.interop import swap  # noqa: E402
from tests.helpers import trained  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.hf_models import WORLD, build, part, whole  # noqa: E402

STEPS, RATE = 2, 0.1


def alone(family: str) -> dict[str, Tensor]:
    model = swap(build(family), BalanceConfig(coefficient=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        model(**whole()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def under_zero(rank: int, world: int, family: str, stage: int) -> dict[str, Tensor]:
    model = swap(build(family), BalanceConfig(coefficient=0.5, micro_batches=1))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    for _ in range(STEPS):
        engine.backward(engine(**part(rank)).loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("family", "stage"), [("mixtral", 1), ("deepseek v3", 2), ("qwen2", 3), ("gpt-oss", 3)])
def test_weights_equal_those_of_one_process(family: str, stage: int) -> None:
    right = alone(family)
    for found in run_ranks(under_zero, WORLD, family, stage):
        error, name = trained.worst(found, {name: p.detach() for name, p in right.items()})
        assert error < 1e-5, (name, error)
