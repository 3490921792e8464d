"""What FSDP2 shards, and what it has gathered."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def sharded_modules(parts: Iterable[nn.Module]) -> Iterator[FSDPModule]:
    """Return the modules that FSDP2 gathers, each with its own weights."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is sharded before it is imported, which takes a second
    if fsdp is None:
        return iter(())
    return (module for part in parts for module in part.modules() if isinstance(module, fsdp.FSDPModule))


def sharded_weights(parts: Iterable[nn.Module]) -> Iterator[Any]:
    """Return FSDP2's records of the weights that it shards."""
    for module in sharded_modules(parts):
        state: Any = module._get_fsdp_state()
        # torch 2.11 has at most one group per module
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        for group in groups:
            yield from group.fsdp_params if group is not None else ()


def gathered_weights(parts: Iterable[nn.Module]) -> list[Tensor]:
    """Return the whole weights that FSDP2 has gathered so far, or will gather again: into the same tensors."""
    return [weight._unsharded_param for weight in sharded_weights(parts) if hasattr(weight, "_unsharded_param")]
