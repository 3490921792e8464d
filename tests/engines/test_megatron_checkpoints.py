"""Megatron-Core's distributed checkpoints, between meshes, and between its own MoE layer and ours."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs Megatron-Core, which `make engines` installs")
pytestmark = pytest.mark.engines

from megatron.core import dist_checkpointing  # noqa: E402

from equimoe.moe.engines.megatron import moe_layer_spec  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.megatron_models import (  # noqa: E402
    Trainer,
    assert_equal,
    chunks_of,
    config_of,
    joined,
    megatron,
    moment,
    parts,
)

TP, PP, EP, ETP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
SHARED = {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True}


def model_of(own: bool = True, **how: Any) -> Trainer:
    """Build a GPTModel with our MoE layer, or with Megatron-Core's own."""
    config = config_of(**how, moe_token_dispatcher_type="allgather")
    return Trainer(chunks_of(config, moe_layer_spec(config) if own else None), exact=False, **{})


def state_of(trainer: Trainer, metadata: dict[str, Any] | None) -> dict[str, Any]:
    [chunk] = trainer.chunks
    return {"model": chunk.sharded_state_dict(metadata=metadata)}


def save(path: Path, metadata: Any, own: bool, how: dict[str, Any], rank: int, world: int) -> Any:
    """Save random weights, different on every rank. Returns them, and the losses of some sequences."""
    with megatron(**how):
        trainer = model_of(own, **how)
        for chunk in trainer.chunks:
            for name, buffer in chunk.named_buffers():
                if "bias" in name:
                    buffer.normal_()
        losses = trainer.schedule(trainer.data(0), forward_only=True)
        dist_checkpointing.save(state_of(trainer, metadata), str(path))
        return parts(trainer.chunks), losses


def load(path: Path, metadata: Any, own: bool, how: dict[str, Any], rank: int, world: int) -> Any:
    """Return the loaded weights, and the losses of the same sequences."""
    with megatron(**how):
        torch.manual_seed(1)
        trainer = model_of(own, **how)
        [chunk] = trainer.chunks
        chunk.load_state_dict(dist_checkpointing.load(state_of(trainer, metadata), str(path))["model"])
        return parts(trainer.chunks), trainer.schedule(trainer.data(0), forward_only=True)


ROUNDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({EP: 2}, {}),
    ({EP: 2}, {TP: 2}),
    ({EP: 2}, {PP: 2}),
    ({}, {EP: 2}),
    ({TP: 2, ETP: 2}, {EP: 2}),
    ({PP: 2}, {ETP: 2}),
    ({TP: 2, EP: 2, **SHARED}, SHARED),
    (BIAS, {EP: 2, **BIAS}),
]


def world_of(how: dict[str, Any]) -> int:
    return 2 if any(value == 2 for value in how.values()) else 1


@pytest.mark.parametrize("metadata", [None, {"singleton_local_shards": True}], ids=["stacked", "singleton"])
@pytest.mark.parametrize(("saved", "loaded"), ROUNDS)
def test_between_meshes(tmp_path: Path, saved: dict[str, Any], loaded: dict[str, Any], metadata: Any) -> None:
    before = run_ranks(partial(save, tmp_path, metadata, True, saved), world_of(saved))
    after = run_ranks(partial(load, tmp_path, metadata, True, loaded), world_of(loaded))
    whole = joined([weights for weights, _ in before])
    assert_equal(joined([weights for weights, _ in after]), whole, rtol=0, atol=0)
    for key, value in whole.items():
        if key.endswith("experts.linear_fc1.weight"):
            experts = value.flatten(0, 1)  # of all layers
            assert len(experts.unique(dim=0)) == len(experts)


@pytest.mark.parametrize("metadata", [None, {"singleton_local_shards": True}], ids=["stacked", "singleton"])
@pytest.mark.parametrize("from_own", [True, False], ids=["from ours", "from Megatron-Core's"])
@pytest.mark.parametrize("model", [{}, BIAS | SHARED, {"gated_linear_unit": False}])
def test_between_megatrons_layer_and_ours(tmp_path: Path, model: Any, from_own: bool, metadata: Any) -> None:
    [(before, wanted)] = run_ranks(partial(save, tmp_path, metadata, from_own, model), 1)
    after = run_ranks(partial(load, tmp_path, metadata, not from_own, {EP: 2, **model}), 2)
    assert_equal(joined([weights for weights, _ in after]), joined([before]), rtol=0, atol=0)
    [(_, losses)] = run_ranks(partial(load, tmp_path, metadata, not from_own, model), 1)
    torch.testing.assert_close(losses, wanted)
