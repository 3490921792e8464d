"""Megatron-Core's distributed checkpoints, between meshes, and between its own MoE layer and ours."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs Megatron-Core, which `make engines` installs")
pytestmark = pytest.mark.engines

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402

from equimoe.moe.engines.megatron import moe_layer_spec  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.megatron_cpu import save as write  # noqa: E402
from tests.helpers.megatron_models import Trainer, chunks_of, config_of, megatron  # noqa: E402
from tests.helpers.megatron_tensors import assert_equal, joined, moment, parts  # noqa: E402

TP, PP, EP, ETP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
SHARED = {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True}


def model_of(own: bool, distributed: bool = False, /, **how: Any) -> Trainer:
    """Build a GPTModel with our MoE layer, or with Megatron-Core's own."""
    config = config_of(**how, moe_token_dispatcher_type="allgather")
    return Trainer(
        chunks_of(config, moe_layer_spec(config) if own else None), exact=False, distributed_optimizer=distributed
    )


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
        write(state_of(trainer, metadata), path)
        return parts(trainer.chunks), losses


def load(path: Path, metadata: Any, own: bool, how: dict[str, Any], rank: int, world: int) -> Any:
    """Return the loaded weights, and the losses of the same sequences."""
    with megatron(**how):
        torch.manual_seed(1)
        trainer = model_of(own, **how)
        [chunk] = trainer.chunks
        chunk.load_state_dict(dist_checkpointing.load(state_of(trainer, metadata), str(path))["model"])
        return parts(trainer.chunks), trainer.schedule(trainer.data(0), forward_only=True)


SINGLETON = {"singleton_local_shards": True}
#: metadata, the mesh that saves, and the one that loads
ROUNDS: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (None, {EP: 2}, {}),
    (None, {EP: 2}, {TP: 2}),
    (None, {EP: 2}, {PP: 2}),
    (None, {TP: 2, ETP: 2, **SHARED}, {EP: 2, **SHARED}),
    (None, {PP: 2, **BIAS}, {ETP: 2, **BIAS}),
    (SINGLETON, {ETP: 2}, {EP: 2}),
]


def world_of(how: dict[str, Any]) -> int:
    return 2 if any(value == 2 for value in how.values()) else 1


@pytest.mark.parametrize(("metadata", "saved", "loaded"), ROUNDS)
def test_between_meshes(tmp_path: Path, metadata: Any, saved: dict[str, Any], loaded: dict[str, Any]) -> None:
    before = run_ranks(partial(save, tmp_path, metadata, True, saved), world_of(saved))
    after = run_ranks(partial(load, tmp_path, metadata, True, loaded), world_of(loaded))
    whole = joined([weights for weights, _ in before])
    assert_equal(joined([weights for weights, _ in after]), whole, rtol=0, atol=0)
    for key, value in whole.items():
        if key.endswith("experts.linear_fc1.weight"):
            experts = value.flatten(0, 1)  # of all layers
            assert len(experts.unique(dim=0)) == len(experts)


@pytest.mark.parametrize("from_own", [True, False], ids=["from ours", "from Megatron-Core's"])
@pytest.mark.parametrize(
    ("metadata", "model"), [(None, BIAS | SHARED), (None, {"gated_linear_unit": False}), (SINGLETON, {})]
)
def test_between_megatrons_layer_and_ours(tmp_path: Path, metadata: Any, model: Any, from_own: bool) -> None:
    [(before, wanted)] = run_ranks(partial(save, tmp_path, metadata, from_own, model), 1)
    after = run_ranks(partial(load, tmp_path, metadata, not from_own, {EP: 2, **model}), 2)
    assert_equal(joined([weights for weights, _ in after]), joined([before]), rtol=0, atol=0)
    [(_, losses)] = run_ranks(partial(load, tmp_path, metadata, not from_own, model), 1)
    torch.testing.assert_close(losses, wanted)


RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}


def resume(
    path: Path, saves: bool, own: bool, distributed: bool, how: dict[str, Any], rank: int, world: int
) -> dict[str, Any]:
    """Save after a step, or load. Take another step. Returns weights and moments before it, and its norm and weights.

    Megatron-Core can load a distributed optimizer with the Adam of TransformerEngine or Apex, which has one number of
    steps for all weights, but not with torch's.
    """
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(self: Any, weight: Any, tensors: dict[str, Any]) -> None:
        step = self._get_main_param_and_optimizer_states(weight)["step"]
        set_states(self, weight, tensors | {"step": step})

    replaced = mock.patch.object(DistributedOptimizer, "_set_main_param_and_optimizer_states", with_step)
    with megatron(**how), replaced:
        torch.manual_seed(0 if saves else 7)
        trainer = model_of(own, distributed, **how)
        [chunk] = trainer.chunks
        metadata = RESHARDABLE if distributed else None
        if saves or distributed:  # with torch's AdamW, only an optimizer that has stepped can load
            trainer.backward(0)
            trainer.update()
        model = chunk.sharded_state_dict(metadata=metadata)
        optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=not saves, metadata=metadata)
        model = chunk.sharded_state_dict(metadata=metadata)
        if saves:
            write({"model": model, "optimizer": optimizer}, path)
        else:
            found = dist_checkpointing.load({"model": model, "optimizer": optimizer}, str(path))
            chunk.load_state_dict(found["model"])
            trainer.optimizer.load_state_dict(found["optimizer"])
        state = {"weights": parts(trainer.chunks)}
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = parts(trainer.chunks, partial(moment, trainer.optimizer, name))
        trainer.backward(1)
        return state | {"norm": trainer.update(), "then": parts(trainer.chunks)}


@pytest.mark.parametrize(
    ("own", "distributed", "saved", "loaded"),
    [
        (True, False, {EP: 2}, {}),
        (True, True, {EP: 2}, {EP: 2}),
        (True, True, {EP: 2}, {TP: 2, "sequence_parallel": True}),
        (True, True, {}, {EP: 2}),
        (False, True, {EP: 2}, {}),
    ],
)
def test_optimizers_resume(
    tmp_path: Path, own: bool, distributed: bool, saved: dict[str, Any], loaded: dict[str, Any]
) -> None:
    before = run_ranks(partial(resume, tmp_path, True, own, distributed, saved), world_of(saved))
    after = run_ranks(partial(resume, tmp_path, False, True, distributed, loaded), world_of(loaded))
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        assert_equal(joined([r[kind] for r in after]), joined([r[kind] for r in before]), rtol=0, atol=0)
    if own and not distributed:  # a distributed optimizer does not load the step number of torch's AdamW either
        assert after[0]["norm"] == pytest.approx(before[0]["norm"], rel=1e-5)
        assert_equal(joined([r["then"] for r in after]), joined([r["then"] for r in before]), rtol=1e-4, atol=1e-5)
