"""Routers that read token ids or tasks train with DeepSpeed as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed", reason="needs DeepSpeed, which `make engines` installs")
pytestmark = pytest.mark.engines

from equimoe.moe import BalanceConfig, MoEConfig, RouterConfig  # noqa: E402
from equimoe.moe.engines import Batch, Engine, build_engine  # noqa: E402
from equimoe.moe.engines.deepspeed import build_deepspeed_engine  # noqa: E402
from equimoe.moe.model import Decoder  # noqa: E402
from equimoe.moe.parallel import Mesh, ParallelConfig, build_mesh  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402

ROUTERS = {"hash": RouterConfig(gate="hash"), "task": RouterConfig(gate="task", tasks=3)}
#: ZeRO 3 partitions weights of more elements than this, and frees gathered ones at once
SETTINGS = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 8,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
    }
}


def model(gate: str) -> Decoder:
    torch.manual_seed(0)
    balance = BalanceConfig(coefficient=0.1 if gate == "task" else 0.0, estimator="exact")
    moe = MoEConfig(16, 8, 4, 2, ROUTERS[gate], balance, init_std=0.3)
    return Decoder(vocab_size=32, seq_len=8, num_layers=2, num_heads=2, intermediate_size=24, moe=moe)


def adamw(trainable: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable.values())


def trajectory(engine: Engine, mesh: Mesh | None) -> list[tuple[float, float]]:
    """Return the sum of this rank's losses, and the gradient norm, of each step."""
    dp, rank = (1, 0) if mesh is None else (mesh["dp"].size, mesh["dp"].rank)
    found = []
    for step in range(3):
        ids = torch.randint(32, (8, 9), generator=torch.Generator().manual_seed(step))
        parts = zip(*(t.chunk(dp)[rank].chunk(2) for t in (ids, torch.arange(8) % 3)), strict=True)
        batches = [Batch(part[:, :-1], part[:, 1:], tasks=tasks) for part, tasks in parts]
        result = engine.step(batches, 0.01)
        found.append((float(sum(losses.sum() for losses in result.losses)), float(result.norm)))
    return found


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("gate", ROUTERS)
def test_equals_one_process(gate: str, stage: int) -> None:
    def script(rank: int, world: int) -> Any:
        mesh = build_mesh(ParallelConfig(ep=2))
        sizes = {"max_norm": 1.0, "micro_batch": 2, "micro_batches": 2}
        return trajectory(
            build_deepspeed_engine(model(gate), mesh, adamw, zero_stage=stage, settings=SETTINGS, **sizes), mesh
        )

    want = trajectory(build_engine(model(gate), None, adamw, max_norm=1.0), None)
    results = run_ranks(script, 2, timeout=110)
    for step, (loss, norm) in enumerate(want):
        assert sum(found[step][0] for found in results) == pytest.approx(loss, rel=1e-5)
        assert all(found[step][1] == pytest.approx(norm, rel=1e-5) for found in results)
