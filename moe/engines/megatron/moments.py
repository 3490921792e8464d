"""AdamW's moments in Megatron-Core's optimizers, which keep them per parameter, or in shards of a flat buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

_KEYS = ("exp_avg", "exp_avg_sq")


class Moments:
    """Reads and writes the moments of an optimizer from ``get_megatron_optimizer``, whole and by parameter."""

    def __init__(self, optimizer: Any) -> None:
        self._parts = list(optimizer.chained_optimizers)

    def whole(self, parameters: list[nn.Parameter]) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Return step (scalar) and moments of each parameter, in its shape; zero before the first step.

        The tensors are copies if the optimizer is distributed. Every rank must call this.
        """
        found = {
            p: {"step": torch.zeros(()), **{key: torch.zeros_like(p, dtype=torch.float32) for key in _KEYS}}
            for p in parameters
        }
        for part in self._parts:
            sharded = isinstance(part, DistributedOptimizer)
            for parameter, own, state, where in _states(part):
                del own
                of_parameter = found[parameter]
                if state:
                    of_parameter["step"].fill_(float(state["step"]))
                for key in _KEYS if state else ():
                    of_parameter[key].view(-1)[where] = state[key].view(-1).float()
            if sharded:
                _sum([found[p] for p in _parameters(part)], part.data_parallel_group)
        return found

    def restore(self, moments: dict[nn.Parameter, dict[str, Tensor]]) -> None:
        """Give the optimizer what :meth:`whole` returned, or other values of the same shapes."""
        for part in self._parts:
            for parameter, own, _, where in _states(part):
                new = moments[parameter]
                part.optimizer.state[own] = {
                    "step": new["step"].clone(),
                    **{key: new[key].view(-1)[where].view(own.shape).clone() for key in _KEYS},
                }


def _parameters(part: Any) -> list[nn.Parameter]:
    """Return the parameters that a distributed optimizer holds parts of, in an order that all ranks share."""
    return [p for buffer in part.buffers for p in buffer.params]


def _states(part: Any) -> Iterator[tuple[nn.Parameter, Tensor, dict[str, Any], slice]]:
    """Yield (parameter, the tensor that the optimizer updates, its state, where in the flat parameter it is)."""
    if not isinstance(part, DistributedOptimizer):
        for group in part.optimizer.param_groups if part.optimizer is not None else ():
            for p in group["params"]:
                yield p, p, part.optimizer.state.get(p, {}), slice(None)
        return
    for parameter, (group, index) in part.model_param_group_index_map.items():
        own = part.optimizer.param_groups[group]["params"][index]
        span = part._get_model_param_range_map(parameter)["param"]
        yield parameter, own, part.optimizer.state.get(own, {}), slice(span.start, span.end)


def _sum(moments: list[dict[str, Tensor]], group: Any) -> None:
    """Join the parts that the ranks of ``group`` have filled in."""
    for of_parameter in moments:
        for key in _KEYS:
            dist.all_reduce(of_parameter[key], group=group)
        step = of_parameter["step"].to(of_parameter[_KEYS[0]].device)
        dist.all_reduce(step, op=dist.ReduceOp.MAX, group=group)
        of_parameter["step"].copy_(step)
