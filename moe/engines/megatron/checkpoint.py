"""The layer's weights in Megatron-Core's distributed checkpoints, with the names and shapes of its own MoE layer.

E experts, F expert width, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_object_for_checkpoint,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn

if TYPE_CHECKING:
    from .layer import MoELayer
    from .model import SequenceFirst

    Layer = MoELayer | SequenceFirst

#: where earlier axes, such as the layer's number, are sharded: (axis, this rank's part, number of parts)
Offsets = tuple[tuple[int, int, int], ...]
#: weight of the experts -> Megatron's name, and the axis of one expert that expert tensor parallelism splits
_EXPERTS = {"gate_up_proj": ("linear_fc1.weight", 0), "down_proj": ("linear_fc2.weight", 1)}


def sharded_layer(
    layer: MoELayer | SequenceFirst, prefix: str, offsets: Offsets, metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the sharded state dict of a layer, keyed by the names of its own state dict."""
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    groups = {"tp_group": layer.groups.tp, "dp_cp_group": metadata["dp_cp_group"]}
    router = layer.router.state_dict(keep_vars=True)
    found = make_sharded_tensors_for_checkpoint(router, f"{prefix}router.", {}, offsets, **groups)
    for sharded in found.values():
        sharded.key = sharded.key.replace("router.bias_E", "router.expert_bias")
    singleton = metadata.get("singleton_local_shards", False)
    for name, (theirs, axis) in _EXPERTS.items():
        weight = getattr(layer.experts, name)
        key = f"{prefix}experts.experts.{theirs}"
        halves = 2 if name == "gate_up_proj" and layer.config.gated else 1
        found[f"{prefix}experts.{name}"] = _experts(layer, weight, key, axis, halves, offsets, singleton)
    if layer.shared_experts is not None:
        found |= sharded_state_dict_default(
            layer.shared_experts, f"{prefix}shared_experts.", offsets, metadata, tp_group=layer.groups.tp
        )
    if layer.shared is not None:  # this package's, which every tp rank holds whole
        shared = layer.shared.state_dict(keep_vars=True)
        found |= make_sharded_tensors_for_checkpoint(shared, f"{prefix}shared.", {}, offsets, **groups)
    return found


def _experts(
    layer: MoELayer | SequenceFirst,
    weight: nn.Parameter,
    key: str,
    axis: int,
    halves: int,
    offsets: Offsets,
    singleton: bool,
) -> ShardedTensorFactory:
    """Return a stacked weight as one tensor per expert and half (gate, up), as Megatron stores them.

    Each expert also has an empty ``_extra_state``, without which Megatron's own layer would not load.
    """
    placement, number = layer.balancer.placement, layer.config.num_experts
    owned, etp = layer.balancer.owners.experts_of(placement.ep.rank), placement.etp
    names = ["_w", "_v"] if singleton and halves == 2 else [""] * halves
    replica = (0, 0, torch.distributed.get_rank(layer.groups.expt_dp))

    def build(key: str, stacked: Tensor, replica: Any, flattened_range: Any) -> list[ShardedTensor | ShardedObject]:
        parts: list[ShardedTensor | ShardedObject] = []
        states: list[ShardedTensor | ShardedObject] = []
        # with expert tensor parallelism, the engine keeps gate and up apart: [L, 2, F, D]
        for expert, of_expert in zip(owned, stacked.flatten(1, -2) if stacked.dim() > 3 else stacked, strict=True):
            where = offsets if singleton else (*offsets, (len(offsets), expert, number))
            name = key.replace(".experts.linear", f".experts.{expert}.linear") if singleton else key
            for half, tensor in enumerate(of_expert.chunk(halves, axis)):
                # halves are two tensors if singleton, else the two parts of one tensor
                part, pieces = (0, 1) if singleton else (half, halves)
                split = (len(where) + axis, part * etp.size + etp.rank, pieces * etp.size)
                parts.append(
                    ShardedTensor.from_rank_offsets(
                        name + names[half], tensor, *where, split, replica_id=replica, prepend_axis_num=len(where)
                    )
                )
            state = name.removesuffix("weight") + "_extra_state"
            states.append(make_sharded_object_for_checkpoint(None, state, where, (0, etp.rank, replica[-1])))
        return parts + states if isinstance(stacked, nn.Parameter) else parts  # an optimizer's state has none

    def merge(parts: list[Tensor]) -> Tensor:
        whole = [torch.cat(parts[i : i + halves], axis) for i in range(0, len(owned) * halves, halves)]
        return torch.stack(whole).view(weight.shape)

    return ShardedTensorFactory(key, weight, build, merge, replica)
