"""Makes DeepSpeed see the experts of this package's MoE layers, as it sees those of its own."""

# E experts, L experts of a rank.

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.zero import register_external_parameter
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ...layer import MoE
from ...placement import Placement

#: where DeepSpeed's checkpoints look for the weights of a rank's expert i
_PREFIX = "deepspeed_moe.experts.deepspeed_experts."


def adopt_experts(model: nn.Module, ep: int, ranks: float, zero_stage: int) -> None:
    """Turn the MoE layers of a model, whose experts are split over ``ep`` ranks, into layers that DeepSpeed knows.

    Each rank's experts become plain parameters that name the group of ranks with the same experts. DeepSpeed looks for
    its own class, so each layer gets a class that is both its own and DeepSpeed's. ZeRO 3 refuses that class, and looks
    at the parameters instead. ``ranks`` is the number over which DeepSpeed averages gradients.
    """
    if zero_stage == 3:
        create_groups(ep)
    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        if layer.config.widths is not None:
            raise ValueError(
                f"moe.widths={layer.config.widths}: DeepSpeed counts experts of one width; use engine='torch'"
            )
        for name, weight in list(layer.experts.named_parameters(recurse=False)):
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            own: Any = nn.Parameter(local.detach(), requires_grad=weight.requires_grad)
            own.allreduce, own.group_name = False, f"ep_size_{ep}"
            if zero_stage == 3:
                _shard_over_replicas(own)
            layer.experts.register_parameter(name, own)
        layer.place(replace(layer.balancer.placed or Placement(), gradient_scale=ranks))
        if zero_stage == 3:
            continue
        layer.__class__ = _known_class(type(layer))
        layer.ep_size, layer.expert_group_name = ep, f"ep_size_{ep}"  # type: ignore[assignment]
        layer.num_experts, layer.num_local_experts = layer.config.num_experts, layer.config.num_experts // ep  # type: ignore[assignment]
        layer.register_state_dict_post_hook(_split)
        layer.register_load_state_dict_pre_hook(_stack)


def _shard_over_replicas(weight: Any) -> None:
    """Have ZeRO 3 shard an expert's ``weight`` over the ranks that hold the same experts, instead of over all ranks.

    These are the marks of DeepSpeed's own experts ("AutoEP"): it averages their gradients over all ranks, and counts
    the experts of every rank in the norm.
    """
    weight.ds_zero_placement_family, weight.ds_zero_partition_group_name = "autoep_expert", weight.group_name
    weight.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(weight.group_name)


def gather_routers(model: nn.Module) -> None:
    """Have ZeRO 3 gather each router's weights together with its layer.

    It gathers weights for the backward of a module whose outputs it knows, and a router's output is not a tensor.
    """
    for layer in model.modules():
        if isinstance(layer, MoE):
            for weight in layer.router.parameters():
                register_external_parameter(layer, weight)


def create_groups(ep: int, data_before_experts: bool = False) -> None:
    """Create DeepSpeed's groups of ``ep`` ranks that share a layer's experts, and of ranks with the same experts."""
    if f"ep_size_{ep}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep, use_data_before_expert_parallel_=data_before_experts)


def check_experts(parameters: Iterable[nn.Parameter], zero_stage: int) -> None:
    """Raise ValueError if ZeRO 1 or 2 would have no expert to train: they need a parameter group of experts."""
    experts = [p for p in parameters if is_moe_param(p)]
    if zero_stage in (1, 2) and experts and not any(p.requires_grad for p in experts):
        raise ValueError(
            f"deepspeed.zero_stage={zero_stage}: all experts are frozen, and DeepSpeed's ZeRO cannot hold a model with "
            "experts of which it trains none; set deepspeed.zero_stage=0, or use engine='torch'"
        )


def split_groups(optimizer: Optimizer) -> None:
    """Give experts parameter groups of their own, which DeepSpeed needs, with the settings that they have."""
    named = [{"name": f"group {i}", **group} for i, group in enumerate(optimizer.param_groups)]
    optimizer.param_groups[:] = split_params_into_different_moe_groups_for_optimizer(named, max_group_size=None)


def _known_class(own: type[MoE]) -> type[MoE]:
    return type(own.__name__, (Known, own, DeepSpeedMoE), {})


class Known:
    """What DeepSpeed asks of a layer that it knows."""

    ep_size: int
    expert_group_name: str

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        create_groups(self.ep_size, use_data_before_expert_parallel_)


def refuse_other_ep(optimizer: Optimizer) -> None:
    """Have ``optimizer`` refuse the state of a checkpoint whose experts were split over another number of ranks.

    DeepSpeed would give each rank the weights and moments that the rank of the same number saved: of other experts.
    """

    def check(optimizer: Optimizer, state: dict[str, Any]) -> None:
        found, own = (
            {g["name"] for g in groups if g.get("moe")} for groups in (state["param_groups"], optimizer.param_groups)
        )
        if found != own:
            raise ValueError(
                f"load_checkpoint: saved with experts split as {sorted(found)}, but here they are {sorted(own)}, "
                "and DeepSpeed cannot split the optimizer's state again; keep the expert parallelism, or load only the "
                "weights: load_checkpoint(..., load_optimizer_states=False)"
            )

    optimizer.register_load_state_dict_pre_hook(check)


def _split(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Replace the stacked experts of a state dict by one entry per expert. DeepSpeed writes each to its own file."""
    for name, _ in layer.experts.named_parameters(recurse=False):  # type: ignore[union-attr]
        stacked = state.pop(f"{prefix}experts.{name}")
        for i, weight in enumerate(stacked):
            state[f"{prefix}{_PREFIX}{i}.{name}"] = weight


def _stack(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Undo :func:`_split`, before a state dict is loaded."""
    for name, weight in layer.experts.named_parameters(recurse=False):  # type: ignore[union-attr]
        keys = [f"{prefix}{_PREFIX}{i}.{name}" for i in range(len(weight))]
        if all(key in state for key in keys):
            state[f"{prefix}experts.{name}"] = torch.stack([state.pop(key) for key in keys])
