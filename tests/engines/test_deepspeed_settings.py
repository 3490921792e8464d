"""What the DeepSpeed engine refuses, and what it passes on to DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed", reason="needs DeepSpeed, which `make engines` installs")
pytestmark = pytest.mark.engines

from equimoe.moe.engines.deepspeed import build_deepspeed_engine  # noqa: E402
from equimoe.moe.parallel import ParallelConfig, build_mesh  # noqa: E402
from tests.helpers import trained  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402


def adamw(trainable: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable.values())


@pytest.mark.parametrize(
    ("settings", "how", "message"),
    [
        ({}, {"zero_stage": 4}, "deepspeed.zero_stage=4: use 0, 1, 2 or 3"),
        ({"train_batch_size": 7}, {}, "train_batch_size=7 .* data.global_batch is 8"),
        ({"gradient_accumulation_steps": 3}, {}, "gradient_accumulation_steps=3"),
        ({"train_micro_batch_size_per_gpu": 3}, {}, "train_micro_batch_size_per_gpu=3"),
        ({"gradient_clipping": 0.5}, {}, "gradient_clipping=0.5 .* optim.grad_clip is 1.0"),
        ({"zero_optimization": {"stage": 2}}, {}, "zero_optimization.stage=2 .* deepspeed.zero_stage is 1"),
        ({"fp16": {"enabled": True}}, {}, "fp16.enabled=True"),
        ({"bf16": {"enabled": True}}, {}, "bf16.enabled=True .* dtype='bfloat16'"),
        ({"optimizer": {"type": "Adam"}}, {}, "optimizer in the DeepSpeed configuration"),
        ({"bfloat16": {"enabled": True}}, {}, "bfloat16.enabled=True"),
        ({"torch_autocast": {"enabled": True}}, {}, "torch_autocast in the DeepSpeed configuration: the training loop"),
        ({"sequence_parallel_size": 2}, {}, "sequence_parallel_size=2"),
        ({"zero_optimization": True}, {}, "zero_optimization=True .* must be an object"),
        ({"bf16": True}, {}, "bf16=True .* must be an object"),
        ({"zero_optimization": {"offload_param": "cpu"}}, {}, "offload_param=cpu .* must be an object"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, {}, "offload_optimizer"),
        ({"zero_optimization": {"cpu_offload": True}}, {}, "zero_optimization.cpu_offload=True .* leave it out"),
        ({"zero_optimization": {"contiguous_gradients": False}}, {}, "contiguous_gradients=False .* set it to True"),
        ({"zero_optimization": {"reduce_scatter": False}}, {}, "reduce_scatter=False .* set it to True"),
        ({"zero_optimization": {"round_robin_gradients": True}}, {}, "round_robin_gradients=True .* set it to False"),
        (
            {"zero_optimization": {"zero_hpz_partition_size": 2}},
            {"zero_stage": 3},
            "hpz_partition_size=2 .* set it to 1",
        ),
        ({"zero_optimization": {"mics_shard_size": 2}}, {"zero_stage": 3}, "mics_shard_size=2 .* set it to -1"),
        ({"train_batch_sise": 9}, {}, "train_batch_sise .* no such field; did you mean train_batch_size?"),
        ({"zzz": 9}, {}, "zzz .* no such field; leave it out"),
        ({"prescale_gradients": True}, {"zero_stage": 2}, "prescale_gradients=True .* is False"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, {}, "data_types.grad_accum_dtype=bf16 .* is fp32"),
        ({"use_data_before_expert_parallelism": True}, {}, "use_data_before_expert_parallelism=True"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], how: dict[str, Any], message: str) -> None:
    given = {"zero_stage": 1, "max_norm": 1.0, "micro_batch": 4, "micro_batches": 2} | how
    with pytest.raises(ValueError, match=message):
        build_deepspeed_engine(trained.make().float(), None, adamw, settings=settings, **given)


def test_meshes_that_deepspeed_cannot_hold_are_refused() -> None:
    def rank_main(rank: int, world: int) -> None:
        for degrees, message in (
            ({"tp": 2}, "parallel.tp=2: the DeepSpeed engine splits data and experts only"),
            ({"cp": 2}, "parallel.cp=2"),
            ({"etp": 2}, "parallel.etp=2"),
            ({"data_parallel": "fsdp"}, "parallel.data_parallel='fsdp': DeepSpeed shards by ZeRO instead"),
        ):
            mesh = build_mesh(ParallelConfig(**degrees))  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=message):
                build_deepspeed_engine(trained.make().float(), mesh, adamw)

    run_ranks(rank_main, 2)


def test_a_setting_is_passed_on(tmp_path: Path) -> None:
    """What has no option here reaches DeepSpeed, from a file."""
    from equimoe.moe.train.config import DeepSpeedConfig

    path = tmp_path / "deepspeed.json"
    auto = {"gradient_clipping": "auto", "fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}
    passed = {"zero_optimization": {"reduce_bucket_size": 1234, "contiguous_gradients": "auto"}, **auto}
    path.write_text(json.dumps(passed))

    def rank_main(rank: int, world: int) -> int:
        settings = DeepSpeedConfig(config=str(path)).settings()
        engine = build_deepspeed_engine(trained.make().float(), None, adamw, zero_stage=2, settings=settings)
        return engine.deepspeed.zero_reduce_bucket_size()

    assert run_ranks(rank_main, 1) == [1234]
    for content, message in (("{", "cannot be read"), ("[]", "must hold a JSON object")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            DeepSpeedConfig(config=str(path)).settings()
