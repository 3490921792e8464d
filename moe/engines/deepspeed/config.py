"""DeepSpeed's configuration: what the engine sets, and what it refuses."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from ...parallel import ParallelConfig

#: sections that would replace what the training loop does
_OURS = ("optimizer", "scheduler", "pipeline", "tensor_parallel", "expert_parallel", "torch_autocast")
#: precisions of DeepSpeed's; "bfloat16" is an old name of "bf16"
_PRECISIONS = ("fp16", "bf16", "bfloat16", "amp")
#: the fields of DeepSpeed's configuration; it ignores all others, and so a misspelled one
_FIELDS = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "allgather_size",
        "amp",
        "autotuning",
        "bf16",
        "bfloat16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "compression_training",
        "csv_monitor",
        "curriculum_learning",
        "data_efficiency",
        "data_types",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "eigenvalue",
        "elasticity",
        "expert_parallel",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "graph_harvesting",
        "hybrid_engine",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "nebula",
        "optimizer",
        "pipeline",
        "prescale_gradients",
        "progressive_layer_drop",
        "quantize_training",
        "scheduler",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "sparse_attention",
        "sparse_gradients",
        "steps_per_print",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)
#: the only value of fields of ``zero_optimization`` with which ZeRO handles experts and their moments correctly
_ZERO = {
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "round_robin_gradients": False,
    "cpu_offload": False,
    "cpu_offload_params": False,
}
#: more of them, for stage 3, which would otherwise gather weights over the wrong ranks, or export one rank's experts
_ZERO3 = {
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "stage3_gather_16bit_weights_on_model_save": False,
    "stage3_gather_fp16_weights_on_model_save": False,
}


def check_degrees(degrees: ParallelConfig | None) -> None:
    """Raise ValueError for a mesh that DeepSpeed cannot hold: it does data and expert parallelism here."""
    if degrees is None:
        return
    for name in ("pp", "cp", "tp", "etp"):
        if (value := getattr(degrees, name)) != 1:
            raise ValueError(
                f"parallel.{name}={value}: the DeepSpeed engine splits data and experts only; set parallel.{name}=1, "
                "or use engine='torch'"
            )
    if degrees.data_parallel != "ddp":
        raise ValueError(
            f"parallel.data_parallel={degrees.data_parallel!r}: DeepSpeed shards by ZeRO instead; leave it at 'ddp' "
            "and set deepspeed.zero_stage"
        )


def build_config(
    settings: dict[str, Any], zero_stage: int, micro_batch: int, micro_batches: int, ranks: int, max_norm: float
) -> dict[str, Any]:
    """Return the configuration for ``deepspeed.initialize``: ``settings``, completed.

    Raises ValueError for a field whose value contradicts the arguments, and for what the engine cannot hold.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed.zero_stage={zero_stage}: use 0, 1, 2 or 3")
    for name in settings.keys() - _FIELDS:
        near = get_close_matches(name, _FIELDS, 1)
        remedy = f"did you mean {near[0]}?" if near else "leave it out"
        raise ValueError(f"{name} in the DeepSpeed configuration: DeepSpeed has no such field; {remedy}")
    own = {
        "train_batch_size": micro_batch * micro_batches * ranks,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": max_norm if zero_stage else 0.0,
    }
    zero = dict(_section(settings, "zero_optimization"))
    _check_zero(zero, _ZERO | _ZERO3 if zero_stage == 3 else _ZERO)
    _agree("zero_optimization.stage", zero.get("stage", zero_stage), zero_stage, "deepspeed.zero_stage")
    for name, value in own.items():
        expected = max_norm if name == "gradient_clipping" else value
        _agree(name, settings.get(name, expected), expected, _SOURCES[name])
    for name in _PRECISIONS:
        if _section(settings, name).get("enabled") not in (None, False, "auto"):
            raise ValueError(
                f"{name}.enabled=True in the DeepSpeed configuration: it would round the routers' weights, which sends "
                "tokens to other experts; leave it out, and set dtype='bfloat16' for products in bfloat16"
            )
    settings = {name: value for name, value in settings.items() if name not in _PRECISIONS}
    _agree("sequence_parallel_size", settings.get("sequence_parallel_size", 1), 1, "the DeepSpeed engine's")
    _agree("prescale_gradients", settings.get("prescale_gradients", False), False, "the DeepSpeed engine's")
    accumulated = _section(settings, "data_types").get("grad_accum_dtype")
    _agree("data_types.grad_accum_dtype", accumulated or "fp32", "fp32", "the DeepSpeed engine's")
    order = "use_data_before_expert_parallelism"
    _agree(order, settings.get(order, False), False, "the mesh's order of ranks")
    for name in _OURS:
        if settings.get(name):
            raise ValueError(f"{name} in the DeepSpeed configuration: the training loop has its own; leave it out")
    defaults = {"steps_per_print": 2**31 - 1, "zero_allow_untested_optimizer": True}
    return {**defaults, **settings, **own, "zero_optimization": {**zero, "stage": zero_stage}}


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an object of the configuration; an empty one if it is left out."""
    found = settings.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{name}={found} in the DeepSpeed configuration: must be an object, or left out")
    return found


def _check_zero(zero: dict[str, Any], only: dict[str, Any]) -> None:
    for name in ("offload_optimizer", "offload_param"):
        if _section(zero, name).get("device", "none") != "none":
            raise ValueError(f"zero_optimization.{name} in the DeepSpeed configuration: is not supported; leave it out")
    for name, value in only.items():
        if (found := zero.get(name, value)) not in ("auto", value):
            raise ValueError(
                f"zero_optimization.{name}={found} in the DeepSpeed configuration: is not supported for models with "
                f"experts; set it to {value}, or leave it out"
            )
        zero.pop(name, None)


#: where the values of fields come from
_SOURCES = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.micro_batch",
    "gradient_accumulation_steps": "data.global_batch / (data.micro_batch * ranks)",
    "gradient_clipping": "optim.grad_clip",
}


def _agree(name: str, found: Any, expected: float | str, source: str) -> None:
    if found not in ("auto", expected):
        raise ValueError(
            f"{name}={found} in the DeepSpeed configuration: {source} is {expected}; make them equal, or leave "
            f"{name} out"
        )
