"""The tensors of Megatron-Core's models, of which each rank has a part, as whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from torch import Tensor, nn

#: key -> whole tensor
Whole = dict[str, Tensor]


def shards(chunks: list[nn.Module], value_of: Callable[[Tensor], Tensor | None] = lambda p: p) -> list[ShardedTensor]:
    """Return this rank's parts of all tensors, with ``value_of`` each in its place (None: without it)."""
    found = []
    for model in chunks:
        for item in nested_values(model.sharded_state_dict()):
            if isinstance(item, ShardedTensor | ShardedTensorFactory):
                item.data = value_of(item.data)
                if item.data is not None:
                    found.append(item)
    state = dict(enumerate(found))
    apply_factories(state)
    return [s for s in nested_values(state) if isinstance(s, ShardedTensor)]


def _where(shard: ShardedTensor) -> tuple[Any, ...]:
    lead = shard.prepend_axis_num
    sizes = zip(shard.global_offset[lead:], shard.local_shape[-len(shard.global_shape) + lead :], strict=True)
    return (*shard.global_offset[:lead], *(slice(start, start + length) for start, length in sizes))


def parts(chunks: list[nn.Module], value_of: Callable[[Tensor], Tensor | None] = lambda p: p) -> list[Any]:
    """Return this rank's parts, to be joined by :func:`joined`."""
    return [(s.key, s.global_shape, _where(s), s.data.detach().cpu().clone()) for s in shards(chunks, value_of)]


def joined(parts_of_ranks: list[list[Any]], tolerance: float = 1e-6) -> Whole:
    """Return whole tensors. Parts that several ranks hold must be equal, and no element may be missing."""
    whole: Whole = {}
    for key, shape, where, value in (part for rank in parts_of_ranks for part in rank):
        tensor = whole.setdefault(key, torch.full(shape, torch.nan, dtype=torch.float64))
        known = tensor[where]
        filled = ~known.isnan()
        torch.testing.assert_close(known[filled], value.double()[filled], rtol=tolerance, atol=tolerance, msg=key)
        tensor[where] = value.double()
    for key, tensor in whole.items():
        assert not tensor.isnan().any(), f"{key}: no rank has all of it"
    return whole


@torch.no_grad()
def fill(chunks: list[nn.Module], whole: Whole) -> None:
    """Copy whole tensors into this rank's parts."""
    for shard in shards(chunks):
        shard.data.copy_(whole[shard.key][_where(shard)])


def assert_equal(found: Whole, wanted: Whole, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def moment(optimizer: Any, name: str, parameter: Tensor) -> Tensor | None:
    """Return a whole moment of a parameter from this rank's part of the optimizer; None of a buffer."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(part, "model_param_gbuf_map"):
            if all(parameter is not of_part for buffer in part.buffers for of_part in buffer.params):
                continue
            whole = torch.zeros(parameter.numel(), device=parameter.device)
            if parameter in part.model_param_group_index_map:
                group, order = part.model_param_group_index_map[parameter]
                held = part.optimizer.param_groups[group]["params"][order]
                held_range = part._get_model_param_range_map(parameter)["param"]
                whole[held_range.start : held_range.end] = part.optimizer.state[held][name]
            dist.all_reduce(whole, group=part.data_parallel_group)
            return whole.view_as(parameter)
        if parameter in part.optimizer.state:
            return part.optimizer.state[parameter][name]
    return None
