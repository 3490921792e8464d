"""Reads and writes the weights and moments of a model, whole, under each stage of ZeRO."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ...checkpoint import restore_optimizer, training_state

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Replicated:
    """ZeRO 0: every rank holds everything.

    ``parameters`` are those of the model, ``trained`` those that the optimizer updates; ``engine`` is DeepSpeed's.
    """

    def __init__(
        self, engine: Any, parameters: dict[str, nn.Parameter], trained: dict[str, nn.Parameter], optimizer: Optimizer
    ) -> None:
        self.engine, self.parameters, self.trained, self.optimizer = engine, parameters, trained, optimizer

    def state(self) -> dict[str, Tensor]:
        """Return the weights and the optimizer's tensors by logical names. Every rank must call it."""
        return self._weights() | training_state(self.trained, self.optimizer, {})

    def restore(self, own: dict[str, Tensor]) -> None:
        """Adopt a filled :meth:`state`. Every rank must call it."""
        restore_optimizer(self.trained, self.optimizer, own)

    def forget(self) -> None:
        """Drop the gradients of a step that is not taken."""
        self.engine.zero_grad()

    def gradient(self) -> list[Tensor]:
        """Return this rank's part of the step's gradient."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def _weights(self) -> dict[str, Tensor]:
        return {f"model.{name}": p.detach() for name, p in self.parameters.items()}


class Sharded(Replicated):
    """ZeRO 1 and 2: every rank holds the weights, and a part of their fp32 copies and moments."""

    def state(self) -> dict[str, Tensor]:
        self._check_moments()
        steps = max((int(state["step"]) for state in self.optimizer.state.values() if "step" in state), default=0)
        if steps:
            self._link()
        found = self._weights()
        for name, parameter in self.trained.items():
            found[f"model.{name}"] = weight = safe_get_full_fp32_param(parameter)
            for key in _MOMENTS:
                moment = safe_get_full_optimizer_state(parameter, key) if steps else torch.zeros_like(weight)
                found[f"optimizer.{name}.{key}"] = moment.detach()
            found[f"optimizer.{name}.step"] = torch.tensor(float(steps))
        return found

    def restore(self, own: dict[str, Tensor]) -> None:
        steps = max((float(own[f"optimizer.{name}.step"]) for name in self.trained), default=0.0)
        for flat in self._flat():
            moments = {key: torch.zeros_like(flat) for key in _MOMENTS}
            self.optimizer.state[flat] = {"step": torch.tensor(steps), **moments}
        self._link()
        for name, parameter in self.parameters.items():
            self._write_weight(parameter, own[f"model.{name}"])
        for name, parameter in self.trained.items():
            for key in _MOMENTS:
                self._write_moment(parameter, own[f"optimizer.{name}.{key}"], key)

    def forget(self) -> None:
        super().forget()
        zero = self.engine.optimizer
        for key in zero.all_grad_tensors:
            zero.all_grad_tensors[key] = None
        # a backward that raised has reduced some buckets, and filled others
        for bucket in zero.ipg_buckets.values():
            bucket.clear()
        zero.extra_large_param_to_reduce.clear()
        zero.params_already_reduced[:] = [False] * len(zero.params_already_reduced)
        zero._release_ipg_buffers()

    def gradient(self) -> list[Tensor]:
        groups = self.engine.optimizer.averaged_gradients.values()
        return [part for group in groups for part in group if part is not None]

    def norm(self) -> Tensor:
        """Return the norm of the whole model's gradient, before the step that clips it. Every rank must call it."""
        norm = torch.as_tensor(self._norm(), dtype=torch.float32)
        return torch.where(norm < 0, torch.inf, norm)  # DeepSpeed's sign of a norm that is not finite

    def _norm(self) -> Tensor:
        norm: Tensor = self.engine.optimizer.scaled_global_norm()
        return norm

    def _flat(self) -> list[Tensor]:
        """Return this rank's flat fp32 parts, which the optimizer updates."""
        return [part for group in self.optimizer.param_groups for part in group["params"]]

    def _link(self) -> None:
        """Let each parameter know its moments. DeepSpeed does it after the update of the first parameter group, when
        the other groups have no moments yet."""
        self.engine.optimizer._hp_optimizer_states_linked = False
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _write_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value)

    def _write_moment(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        safe_set_full_optimizer_state(parameter, value, key)

    def _check_moments(self) -> None:
        """Raise ValueError if the optimizer keeps something else than AdamW's moments."""
        kept = {key for state in self.optimizer.state.values() for key, value in state.items() if value is not None}
        if other := sorted(kept - {"step", *_MOMENTS}):
            raise ValueError(
                f"{type(self.optimizer).__name__}: a checkpoint with ZeRO holds the moments of AdamW, and would lose "
                f"{other[0]}; use AdamW, or zero_stage=0"
            )


class Partitioned(Sharded):
    """ZeRO 3: every rank holds a part of each weight, too, and gathers it when a module needs it."""

    def forget(self) -> None:
        self.engine.zero_grad()
        zero = self.engine.optimizer
        zero.zero_grad(set_to_none=True)
        for bucket in zero.ipg_buckets.values():
            bucket.clear_params()
        zero.parameter_offload.partition_all_parameters()  # frees those that were gathered

    def _weights(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.parameters.items():
            if name not in self.trained:
                with GatheredParameters([parameter]):
                    found[f"model.{name}"] = parameter.detach().clone()
        return found

    def _norm(self) -> Tensor:
        norm: Tensor = combine_grad_norm_groups(self.engine.optimizer._get_norm_groups())
        return norm

    def _flat(self) -> list[Tensor]:
        return self.engine.optimizer.fp32_partitioned_groups_flat

    def _link(self) -> None:
        """Nothing to do: ZeRO 3 looks moments up."""

    def _write_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        with GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        safe_set_local_fp32_param(parameter, _part(parameter, value))

    def _write_moment(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        safe_set_local_optimizer_state(parameter, _part(parameter, value), key)


def _part(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's part of ``value``, padded so that all ranks have equal parts."""
    size, rank = parameter.partition_numel(), parameter.ds_zero_partition_rank
    padding = size * parameter.ds_zero_partition_world_size - value.numel()
    return F.pad(value.flatten(), (0, padding))[size * rank : size * (rank + 1)]


#: stage of ZeRO -> its class
SHARDS: dict[int, type[Replicated]] = {0: Replicated, 1: Sharded, 2: Sharded, 3: Partitioned}
