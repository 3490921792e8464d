"""The engine that trains with DeepSpeed (0.19): ZeRO 0, 1 and 2, together with this package's expert parallelism."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from ...balance import Step
from ...checkpoint import restore_optimizer, training_state
from ...collectives import world_axis
from ...layer import MoE
from ...parallel import LocalBatch, LossFunction, Mesh, check_alike, parallelize, token_losses
from ...parallel.grad_norm import clip_gradients_
from ..balance import StepBalance
from ..base import Accept, Batch, Computed, OptimizerFactory, StepResult
from ..inputs import accepted, count_tokens, evaluation_mode, local_batches
from ..reduce import Reducer
from ..runners import Precision, WholeModel
from .config import build_config, check_degrees
from .experts import adopt_experts, check_experts, refuse_other_ep, split_groups


def build_deepspeed_engine(
    model: nn.Module,
    mesh: Mesh | None,
    optimizer: OptimizerFactory,
    *,
    zero_stage: int = 1,
    settings: dict[str, Any] | None = None,
    loss: LossFunction = token_losses,
    max_norm: float = 0.0,
    device: torch.device | None = None,
    precision: Precision = nullcontext,
    micro_batch: int = 1,
    micro_batches: int = 1,
) -> DeepSpeedEngine:
    """Split the experts of ``model`` over ``mesh``, and build the DeepSpeed engine that trains it.

    The arguments are those of :func:`equimoe.moe.engines.build_engine`, and these:

    * ``zero_stage``: 0 replicates everything; 1 shards the optimizer's state over the ranks that hold a weight, 2 the
      gradients too.
    * ``settings``: a DeepSpeed configuration, for what is not set here. A field that contradicts the other arguments
      is refused.
    * ``micro_batch``, ``micro_batches``: sequences per forward on a rank, and forwards per step, for DeepSpeed's own
      counters. A step may have another number of micro-batches.

    Raises ValueError for a mesh or a setting that DeepSpeed cannot hold.
    """
    check_degrees(None if mesh is None else mesh.degrees)
    world = world_axis()
    if mesh is None and world.size > 1:
        raise ValueError(f"mesh=None: {world.size} ranks would train separate models; pass build_mesh(...)")
    config = build_config(settings or {}, zero_stage, micro_batch, micro_batches, world.size, max_norm)
    device = device or next(model.parameters()).device
    exact = any(m.config.balance.estimator == "exact" for m in model.modules() if isinstance(m, MoE))
    check_alike(model, world)
    if mesh is not None:
        parallelize(model, mesh)
    adopt_experts(model, 1 if mesh is None else mesh["ep"].size, float(world.size))
    parameters = dict(model.named_parameters())
    check_experts(parameters.values(), zero_stage)
    made = optimizer({name: p for name, p in parameters.items() if p.requires_grad})
    split_groups(made)
    _join(device)
    engine, *_ = deepspeed.initialize(model=model, optimizer=made, config=config)
    refuse_other_ep(made)
    runner = _Runner(engine, mesh, loss, precision, float(world.size))
    balance = StepBalance([Step.of(model)], exact)
    return DeepSpeedEngine(model, parameters, mesh, engine, made, runner, balance, device, zero_stage, max_norm)


def _join(device: torch.device) -> None:
    """Let DeepSpeed use the process group that there is, or one of this process alone."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


class _Runner(WholeModel):
    """Runs micro-batches through a DeepSpeed engine, which averages gradients over all ``ranks``."""

    def __init__(self, engine: Any, mesh: Mesh | None, loss: LossFunction, precision: Precision, ranks: float) -> None:
        super().__init__(engine.module, mesh, loss, precision, Reducer({}, {}))
        self._engine, self._ranks = engine, ranks

    def _forward(self, batch: LocalBatch) -> Any:
        mask = () if batch.mask is None else (batch.mask,)
        model = self._engine if torch.is_grad_enabled() else self.model
        with self.precision():
            return model(batch.inputs, *mask)

    def _train_one(self, batch: LocalBatch, m: int, tokens: Tensor, balance: StepBalance, last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        with balance.micro_batch(m):
            losses_BS = self._losses(batch)
            self._engine.backward(losses_BS.sum() * (self._ranks / tokens), scale_wrt_gas=False)
        if not last:
            self._engine.step()
        return losses_BS.detach()


class DeepSpeedEngine:
    """Implements :class:`equimoe.moe.engines.base.Engine`. Built by :func:`build_deepspeed_engine`.

    Gradients are clipped to ``max_norm`` (0: not clipped) by the norm of the whole model, all experts included.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        mesh: Mesh | None,
        engine: Any,
        optimizer: Optimizer,
        runner: _Runner,
        balance: StepBalance,
        device: torch.device,
        zero_stage: int,
        max_norm: float,
    ) -> None:
        self.parts, self.parameters, self.balance = [model], parameters, balance
        #: DeepSpeed's own engine, for example for its checkpoints
        self.deepspeed = engine
        self._optimizer, self._mesh, self._runner = optimizer, mesh, runner
        self._device, self._zero, self._max_norm = device, zero_stage > 0, max_norm
        self._trained = {name for name, p in parameters.items() if p.requires_grad}

    def step(self, batches: list[Batch], lr: float, accept: Accept | None = None) -> StepResult:
        """See :meth:`equimoe.moe.engines.base.Engine.step`."""
        self._check_trained()
        try:
            local = local_batches(batches, self._mesh, self._device)
            tokens, routed = count_tokens(batches, local, self._mesh, self.parameters)
            self.balance.begin(len(local), routed)
            losses = self._runner.train(local, tokens.clamp_min(1), self.balance)
            norm, applied = self._update(lr, losses, accept)
        except BaseException:
            self.balance.discard()
            self._forget()
            raise
        self.balance.end(applied)
        return StepResult(losses, norm, applied)

    def _update(self, lr: float, losses: list[Tensor], accept: Accept | None) -> tuple[Tensor, bool]:
        """Update the weights if that is accepted; return the gradient's norm, and whether they were updated."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._zero:  # clips in its own step
            norm = torch.as_tensor(self.deepspeed.optimizer.scaled_global_norm(), dtype=torch.float32)
            norm = torch.where(norm < 0, torch.inf, norm)  # DeepSpeed's sign of a norm that is not finite
        else:
            grads = [self._logical(name, p.grad) for name, p in self.parameters.items() if p.grad is not None]
            norm = clip_gradients_(grads, self._max_norm, self._device)
        if accepted(accept, Computed(losses, norm, self._gradient), self._mesh):
            self.deepspeed.step()
            return norm, not self._zero or bool(self.deepspeed.was_step_applied())
        self._forget()
        return norm, False

    def _gradient(self) -> list[Tensor]:
        if self._zero:
            parts = self.deepspeed.optimizer.averaged_gradients.values()
            return [part for group in parts for part in group if part is not None]
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> list[Tensor]:
        """See :meth:`equimoe.moe.engines.base.Engine.evaluate`."""
        with evaluation_mode(self.parts):
            return self._runner.evaluate(local_batches(batches, self._mesh, self._device))

    def weights(self) -> dict[str, Tensor]:
        """See :meth:`equimoe.moe.engines.base.Engine.weights`."""
        biases = {n: b for n, b in self.parts[0].named_buffers() if n.endswith("router.bias_E")}
        return {name: self._logical(name, p.detach()) for name, p in self.parameters.items()} | biases

    def state(self) -> dict[str, Tensor]:
        """See :meth:`equimoe.moe.engines.base.Engine.state`. Every rank must call it: it gathers what ZeRO shards."""
        found = {f"model.{name}": weight for name, weight in self.weights().items()}
        found |= self._zero_state() if self._zero else training_state(self._trained_parameters(), self._optimizer, {})
        for name in self.parameters:
            for key in (f"model.{name}", f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq"):
                if key in found and not isinstance(found[key], DTensor):
                    found[key] = self._logical(name, found[key])
        return found

    def _zero_state(self) -> dict[str, Tensor]:
        """The fp32 weights and AdamW's moments of which every rank holds a part, whole."""
        found: dict[str, Tensor] = {}
        steps = self._steps()
        self._check_moments()
        if steps:
            self._link()
        for name, parameter in self._trained_parameters().items():
            found[f"model.{name}"] = safe_get_full_fp32_param(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                full = safe_get_full_optimizer_state(parameter, key) if steps else torch.zeros_like(parameter)
                found[f"optimizer.{name}.{key}"] = full.detach()
            found[f"optimizer.{name}.step"] = torch.tensor(float(steps))
        return found

    def _link(self) -> None:
        """Let each parameter know its moments. DeepSpeed does it after the update of the first parameter group, when
        the other groups have no moments yet."""
        self.deepspeed.optimizer._hp_optimizer_states_linked = False
        self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def _check_moments(self) -> None:
        """Raise ValueError if the optimizer keeps something else than AdamW's moments."""
        kept = {key for state in self._optimizer.state.values() for key, value in state.items() if value is not None}
        if other := sorted(kept - {"step", "exp_avg", "exp_avg_sq"}):
            raise ValueError(
                f"{type(self._optimizer).__name__}: a checkpoint with ZeRO holds the moments of AdamW, and would lose "
                f"{other[0]}; use AdamW, or zero_stage=0"
            )

    def _steps(self) -> int:
        """How many updates the optimizer has made."""
        return max((int(state["step"]) for state in self._optimizer.state.values() if "step" in state), default=0)

    def expect(self, names: Collection[str]) -> None:
        """See :meth:`equimoe.moe.engines.base.Engine.expect`. Frozen weights have no moments here."""

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """See :meth:`equimoe.moe.engines.base.Engine.restore`."""
        own = {key: value.to_local() if isinstance(value, DTensor) else value for key, value in state.items()}
        if not self._zero:
            restore_optimizer(self._trained_parameters(), self._optimizer, own)
            return
        steps = [float(own[f"optimizer.{name}.step"]) for name in self._trained_parameters()]
        for flat in (p for group in self._optimizer.param_groups for p in group["params"]):
            moments = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[flat] = {"step": torch.tensor(max(steps, default=0.0)), **moments}
        self._link()
        for name, parameter in self._trained_parameters().items():
            parameter.copy_(own[f"model.{name}"])
            safe_set_full_fp32_param(parameter, own[f"model.{name}"])
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(parameter, own[f"optimizer.{name}.{key}"], key)

    def _trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.parameters.items() if name in self._trained}

    def _logical(self, name: str, value: Tensor) -> Tensor:
        """Return a tensor of the parameter ``name`` as part of the whole: a rank's experts are a shard of all."""
        if self._mesh is None or self._mesh["ep"].size == 1 or not is_moe_param(self.parameters[name]):
            return value
        return DTensor.from_local(value, self._mesh.expert["ep"], [Shard(0)], run_check=False)

    def _forget(self) -> None:
        """Drop the gradients of a step that is not taken."""
        self.deepspeed.zero_grad()
        if not self._zero:
            return
        zero = self.deepspeed.optimizer
        zero.zero_grad(set_to_none=True)
        for key in zero.averaged_gradients:
            zero.averaged_gradients[key] = None
            zero.all_grad_tensors[key] = None
        for bucket in zero.ipg_buckets.values():
            bucket.clear()
        zero.params_already_reduced[:] = [False] * len(zero.params_already_reduced)

    def _check_trained(self) -> None:
        now = {name for name, p in self.parameters.items() if p.requires_grad}
        if changed := sorted(now ^ self._trained):
            raise ValueError(
                f"{changed[0]}: was frozen or unfrozen after the DeepSpeed engine was built, whose optimizer cannot "
                "take it in; freeze weights before, or build a new engine"
            )
