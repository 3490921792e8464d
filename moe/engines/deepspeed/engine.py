"""The engine that trains with DeepSpeed (0.19): ZeRO 0 to 3, together with this package's expert parallelism."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ...balance import Step
from ...checkpoint import State, tensors_of
from ...collectives import world_axis
from ...experts import cast_once
from ...layer import MoE
from ...parallel import LocalBatch, LossFunction, Mesh, check_alike, parallelize, token_losses
from ...parallel.grad_norm import clip_gradients_
from ..balance import StepBalance
from ..base import Accept, Batch, Computed, OptimizerFactory, StepResult
from ..inputs import accepted, count_tokens, evaluation_mode, local_batches
from ..main_grads import MainGrads
from ..reduce import Reducer
from ..runners import Precision, WholeModel
from .config import build_config, check_degrees
from .experts import adopt_experts, check_experts, gather_routers, refuse_other_ep, split_groups
from .shards import SHARDS, Replicated, Sharded


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
      gradients too, 3 the weights too.
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
        parallelize(model, mesh, reduced=True)
    _join(device)
    adopt_experts(model, 1 if mesh is None else mesh["ep"].size, float(world.size), zero_stage)
    parameters = dict(model.named_parameters())
    check_experts(parameters.values(), zero_stage)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    made = optimizer(trained)
    split_groups(made)
    with _local_rank():
        engine, *_ = deepspeed.initialize(model=model, optimizer=made, config=config)
    refuse_other_ep(made)
    if zero_stage == 3:
        gather_routers(model)
    shards = SHARDS[zero_stage](engine, parameters, trained, made)
    runner = _Runner(engine, mesh, loss, precision, float(world.size))
    balance = StepBalance([Step.of(model)], exact)
    return DeepSpeedEngine(model, parameters, mesh, engine, shards, runner, balance, device, max_norm)


def _join(device: torch.device) -> None:
    """Let DeepSpeed use the process group that there is, or one of this process alone."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


@contextmanager
def _local_rank() -> Iterator[None]:
    """Within the block, set the variable of a launcher that DeepSpeed demands of a single process, too."""
    alone = "LOCAL_RANK" not in os.environ
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield
    finally:
        if alone:
            del os.environ["LOCAL_RANK"]


class _Runner(WholeModel):
    """Runs micro-batches through a DeepSpeed engine, which averages gradients over all ``ranks``."""

    def __init__(self, engine: Any, mesh: Mesh | None, loss: LossFunction, precision: Precision, ranks: float) -> None:
        super().__init__(engine.module, mesh, loss, precision, Reducer({}, {}), MainGrads([]))
        self._engine, self._ranks = engine, ranks

    def _forward(self, batch: LocalBatch) -> Any:
        model = self._engine if torch.is_grad_enabled() else self.model
        with self.precision():
            return self._call(model, batch)

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
        shards: Replicated,
        runner: _Runner,
        balance: StepBalance,
        device: torch.device,
        max_norm: float,
    ) -> None:
        self.parts, self.parameters, self.balance = [model], parameters, balance
        #: DeepSpeed's own engine, for example for its checkpoints
        self.deepspeed = engine
        self._shards, self._mesh, self._runner = shards, mesh, runner
        self._device, self._max_norm = device, max_norm

    def step(self, batches: list[Batch], lr: float, accept: Accept | None = None) -> StepResult:
        """See :meth:`equimoe.moe.engines.base.Engine.step`."""
        self._check_trained()
        try:
            local = local_batches(batches, self._mesh, self._device, self.parts)
            tokens, routed, check_alike = count_tokens(batches, local, self._mesh, self.parameters)
            check_alike()
            self.balance.begin(len(local), routed)
            with cast_once(*self.parts):
                losses = self._runner.train(local, tokens.clamp_min(1), self.balance)
            norm, applied = self._update(lr, losses, tokens, accept)
        except BaseException:
            self.balance.discard()
            self._shards.forget()
            raise
        self.balance.end(applied)
        return StepResult(losses, norm, applied)

    def _update(self, lr: float, losses: list[Tensor], tokens: Tensor, accept: Accept | None) -> tuple[Tensor, bool]:
        """Update the weights if that is accepted; return the gradient's norm, and whether they were updated."""
        for group in self._shards.optimizer.param_groups:
            group["lr"] = lr
        if sharded := isinstance(self._shards, Sharded):  # clips in its own step
            norm = self._shards.norm()
        else:
            grads = [self._logical(name, p.grad) for name, p in self.parameters.items() if p.grad is not None]
            norm = clip_gradients_(grads, self._max_norm, self._device)
        if accepted(accept, Computed(losses, norm, tokens, self._shards.gradient), self._mesh):
            self.deepspeed.step()
            return norm, not sharded or bool(self.deepspeed.was_step_applied())
        self._shards.forget()
        return norm, False

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> list[Tensor]:
        """See :meth:`equimoe.moe.engines.base.Engine.evaluate`."""
        with evaluation_mode(self.parts), cast_once(*self.parts):
            return self._runner.evaluate(local_batches(batches, self._mesh, self._device, self.parts))

    def weights(self) -> dict[str, Tensor]:
        """See :meth:`equimoe.moe.engines.base.Engine.weights`."""
        return {name: self._logical(name, p.detach()) for name, p in self.parameters.items()} | self._biases()

    def moments(self) -> dict[str, Tensor]:
        """See :meth:`equimoe.moe.engines.base.Engine.moments`."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """See :meth:`equimoe.moe.engines.base.Engine.state`. Every rank must call it: it gathers what ZeRO shards."""
        found = self._shards.state()
        for name in self.parameters:
            for key in (f"model.{name}", f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq"):
                if key in found:
                    found[key] = self._logical(name, found[key])
        return found | {f"model.{name}": bias_E for name, bias_E in self._biases().items()}

    def expect(self, names: Collection[str]) -> None:
        """See :meth:`equimoe.moe.engines.base.Engine.expect`. Frozen weights have no moments here."""

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """See :meth:`equimoe.moe.engines.base.Engine.restore`."""
        tensors = tensors_of(state).items()
        self._shards.restore({key: v.to_local() if isinstance(v, DTensor) else v for key, v in tensors})

    def _biases(self) -> dict[str, Tensor]:
        return {name: b for name, b in self.parts[0].named_buffers() if name.endswith("router.bias_E")}

    def _logical(self, name: str, value: Tensor) -> Tensor:
        """Return a tensor of the parameter ``name`` as part of the whole: a rank's experts are a shard of all."""
        if self._mesh is None or self._mesh["ep"].size == 1 or not is_moe_param(self.parameters[name]):
            return value
        return DTensor.from_local(value, self._mesh.expert["ep"], [Shard(0)], run_check=False)

    def _check_trained(self) -> None:
        now = {name for name, p in self.parameters.items() if p.requires_grad}
        if changed := sorted(now ^ self._shards.trained.keys()):
            raise ValueError(
                f"{changed[0]}: was frozen or unfrozen after the DeepSpeed engine was built, whose optimizer cannot "
                "take it in; freeze weights before, or build a new engine"
            )
