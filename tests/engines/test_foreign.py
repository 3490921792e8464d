"""MoE layers in checkpoints that DeepSpeed and Megatron-Core have written."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.engines

from equimoe.moe import MoE, MoEConfig, RouterConfig  # noqa: E402
from equimoe.moe.interop.foreign import moe_layers  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402

T, D, WIDTH, E = 12, 8, 6, 4


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*s, bias=False) for s in ((D, WIDTH), (WIDTH, D), (D, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def inputs() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(3))


def deepspeed_run(rank: int, world: int, folder: Path, stage: int, k: int) -> Tensor:
    """Train DeepSpeed's own layer, save, and return its output for some tokens."""
    import deepspeed
    from deepspeed.moe.layer import MoE as DeepSpeedMoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    torch.manual_seed(0)
    how = {"ep_size": world, "k": k, "drop_tokens": False, "top2_2nd_expert_sampling": False, "use_rts": False}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.moe = nn.Linear(D, D), DeepSpeedMoE(D, Expert(), E, **how)

        def forward(self, x: Tensor) -> Tensor:
            return self.moe(self.first(x))[0]

    model = Net()
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    settings = {"train_micro_batch_size_per_gpu": T, "zero_optimization": {"stage": stage}}
    settings |= {"zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.05), config=settings)[0]
    for _ in range(2):
        engine.backward(engine(inputs()).square().mean())
        engine.step()
    engine.save_checkpoint(str(folder), tag="two")
    engine.eval()
    with torch.no_grad():
        return engine.module.moe(inputs())[0].clone()


@pytest.mark.parametrize(("stage", "k"), [(0, 2), (2, 1)])
def test_outputs_are_those_of_deepspeeds_layer(stage: int, k: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed, which `make engines` installs")
    outputs = run_ranks(deepspeed_run, 2, tmp_path, stage, k)
    ((name, found),) = moe_layers(tmp_path, ("w1", "w3", "w2"))
    layer = MoE(MoEConfig(D, WIDTH, E, k, router=RouterConfig(normalize_weights=k > 1))).eval()
    layer.load_state_dict(found)
    assert name == "moe"
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs()[None])[0], outputs[0], atol=1e-5, rtol=1e-4)


def megatron_state(path: Path, metadata: Any, how: dict[str, Any], rank: int, world: int) -> dict[str, Tensor]:
    """Load a checkpoint with Megatron-Core into a model with this package's layers, and return their weights."""
    from megatron.core import dist_checkpointing

    from tests.engines.test_megatron_checkpoints import model_of, state_of
    from tests.helpers.megatron_models import megatron

    with megatron(**how):
        trainer = model_of(True, **how)
        [chunk] = trainer.chunks
        chunk.load_state_dict(dist_checkpointing.load(state_of(trainer, metadata), str(path))["model"])
        return {name: value.clone() for name, value in chunk.state_dict().items() if isinstance(value, Tensor)}


@pytest.mark.parametrize(
    ("singleton", "mesh", "model"),
    [
        (False, {"expert_model_parallel_size": 2}, {"bias": True, "shared": True}),
        (False, {"expert_tensor_parallel_size": 2}, {"shared": True}),
        (False, {"pipeline_model_parallel_size": 2}, {"gated_linear_unit": False}),
        (True, {"expert_model_parallel_size": 2}, {}),
    ],
)
def test_weights_are_those_that_megatron_core_loads(
    singleton: bool, mesh: dict[str, int], model: dict[str, bool], tmp_path: Path
) -> None:
    pytest.importorskip("megatron.core", reason="needs Megatron-Core, which `make engines` installs")
    from tests.engines.test_megatron_checkpoints import BIAS, SHARED, SINGLETON, save

    how: dict[str, Any] = {}
    for name, value in model.items():
        how |= {"bias": BIAS, "shared": SHARED}.get(name, {name: value})
    metadata = SINGLETON if singleton else None
    run_ranks(partial(save, tmp_path, metadata, False, mesh | how), 2)
    [wanted] = run_ranks(partial(megatron_state, tmp_path, metadata, how), 1)
    layers = dict(moe_layers(tmp_path))
    assert list(layers) == ["decoder.layers.0.mlp", "decoder.layers.1.mlp"]
    for name, found in layers.items():
        theirs = {key.removeprefix(f"{name}."): v for key, v in wanted.items() if key.startswith(f"{name}.")}
        for leaf in ("router.weight", "experts.gate_up_proj", "experts.down_proj", "router.bias_E"):
            assert (leaf in found) == (leaf in theirs)
            assert leaf not in found or torch.equal(found[leaf], theirs[leaf])
        if "shared" in model:
            both = torch.cat([found["shared.mlp.gate_proj.weight"], found["shared.mlp.up_proj.weight"]])
            assert torch.equal(both, theirs["shared_experts.linear_fc1.weight"])
            assert torch.equal(found["shared.mlp.down_proj.weight"], theirs["shared_experts.linear_fc2.weight"])
            assert torch.equal(found["shared.gate.weight"], theirs["shared_experts.gate_weight"])
        width = found["experts.down_proj"].shape[-1]
        shared = {"shared_intermediate_size": 16, "shared_gate": True} if "shared" in model else {}
        config = MoEConfig(16, width, 4, 2, gated=model.get("gated_linear_unit", True), **shared)
        missing = MoE(config).load_state_dict(found, strict=False)
        assert missing.missing_keys == [] and set(missing.unexpected_keys) <= {"router.bias_E"}
