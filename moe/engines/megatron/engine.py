"""The engine that trains with Megatron-Core (0.16): its models, data parallelism, optimizers and pipeline schedules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ...balance import Step, random_state_kept
from ...checkpoint import State, tensors_of
from ...collectives import global_ranks, world_axis
from ...experts import cast_once
from ...layer import MoE
from ...model import Decoder
from ...model.documents import Documents
from ...parallel import (
    LocalBatch,
    LossFunction,
    Mesh,
    ParallelConfig,
    build_mesh,
    check_alike,
    token_losses,
    vocabulary_parallel,
)
from ..balance import StepBalance
from ..base import Accept, Batch, Computed, OptimizerFactory, StepResult
from ..inputs import accepted, codes_read, count_tokens, evaluation_mode, local_batches, valid_positions
from ..runners import Precision
from .model import GPTStage, Weight, build_stage, copy_weights, transformer_config, weights
from .moments import Moments

#: maps logits [B, S, V] to (sum of the losses, number of positions that count, the losses by name)
LossOf = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def build_megatron_engine(
    model: nn.Module,
    mesh: Mesh | None,
    optimizer: OptimizerFactory,
    *,
    distributed_optimizer: bool = True,
    loss: LossFunction = token_losses,
    max_norm: float = 0.0,
    device: torch.device | None = None,
    precision: Precision = nullcontext,
) -> MegatronEngine:
    """Build a GPTModel of Megatron-Core with the weights and MoE layers of ``model``, and the engine that trains it.

    The arguments are those of :func:`equimoe.moe.engines.build_engine`, and ``distributed_optimizer``, which shards the
    optimizer's state over the ranks that hold a weight. ``model`` must be a :class:`equimoe.moe.model.Decoder`;
    ``optimizer`` must make AdamW, whose settings Megatron-Core's optimizer then gets. If Megatron-Core has no process
    groups yet, they are created from ``mesh``.

    Raises ValueError for a model, a mesh or an optimizer that Megatron-Core cannot hold.
    """
    if not isinstance(model, Decoder):
        raise ValueError(f"model: a {type(model).__name__}; the Megatron engine trains only a Decoder")
    if reads := codes_read([model]):
        raise ValueError(f"router.gate: the Megatron engine does not give routers the {reads}; use engine='torch'")
    device = device or next(model.parameters()).device
    mesh = _mesh_of_one(device) if mesh is None else mesh
    check_degrees(mesh.degrees)
    _join(mesh, device)
    check_alike(model, world_axis())
    exact = any(m.config.balance.estimator == "exact" for m in model.modules() if isinstance(m, MoE))
    whole: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if ".experts." not in name}
    config = transformer_config(model, mesh, device)
    config.finalize_model_grads_func = finalize_model_grads
    tokens = _Tokens()
    stage = build_stage(model, config, mesh, tokens).to(device)
    held = weights(stage, mesh)
    copy_weights(held, whole, mesh)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer)
    wrapped = DistributedDataParallel(config, ddp_config, stage)
    # halves of one parameter have two names
    named = {w.parameter: name for name, w in held.items() if w.parameter.requires_grad}
    _check_trained(len(named), device)
    made = optimizer({name: parameter for parameter, name in named.items()})
    given = {p for group in made.param_groups for p in group["params"]}
    if left_out := [name for parameter, name in named.items() if parameter not in given]:
        raise ValueError(
            f"optimizer: does not hold {left_out[0]}, which Megatron-Core's would train; freeze it before, or add it"
        )
    adam = _optimizer(made, wrapped, distributed_optimizer, max_norm)
    balance = StepBalance([Step.of(stage)], exact)
    return MegatronEngine(stage, held, mesh, wrapped, adam, balance, tokens, loss, precision, device)


def _check_trained(number: int, device: torch.device) -> None:
    """Raise ValueError on every rank if some rank trains no weight: Megatron-Core's optimizer cannot be empty."""
    least = torch.tensor([number], device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    if not int(least):
        raise ValueError(
            "model: on some rank (a pipeline stage) all weights are frozen, and Megatron-Core's optimizer cannot be "
            "empty; train a weight of each stage, or use engine='torch'"
        )


def _mesh_of_one(device: torch.device) -> Mesh:
    """Return the mesh of a single process: Megatron-Core needs process groups also there."""
    if (size := world_axis().size) > 1:
        raise ValueError(f"mesh=None: {size} ranks would train separate models; pass build_mesh(...)")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return build_mesh(ParallelConfig(sequence_parallel=False), device.type)


class _Tokens:
    """The tokens of a step's loss on all ranks, by which Megatron-Core divides the gradients in the end."""

    value: Tensor

    def __call__(self) -> Tensor:
        return self.value


def check_degrees(degrees: ParallelConfig) -> None:
    """Raise ValueError for a mesh that Megatron-Core cannot hold here."""
    wanted = {
        "cp": (1, "its attention needs TransformerEngine for that"),
        "data_parallel": ("ddp", "use distributed_optimizer"),
        "schedule": ("1f1b", "it has no other schedule here"),
        "dp_replicate": (1, "it has one data-parallel axis; use dp_shard"),
    }
    if degrees.tp > 1:
        wanted["sequence_parallel"] = (False, "its norms need TransformerEngine for that")
    for name, (value, reason) in wanted.items():
        found = getattr(degrees, name)
        if found != value and not (name == "schedule" and degrees.pp == 1):
            raise ValueError(
                f"parallel.{name}={found!r}: the Megatron engine cannot hold it: {reason}; set it to {value!r}, or use "
                "engine='torch'"
            )
    if degrees.stages_per_rank not in (None, 1):
        raise ValueError(
            f"parallel.stages_per_rank={degrees.stages_per_rank}: the Megatron engine has one stage per rank; leave it "
            "out"
        )


def _join(mesh: Mesh, device: torch.device) -> None:
    """Create Megatron-Core's process groups from the mesh, or check that they are the same."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    degrees = mesh.degrees
    try:
        torch.cuda.current_device()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"engine='megatron': Megatron-Core needs a GPU ({error}); use engine='torch' or 'deepspeed' on a CPU"
        ) from None
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            degrees.tp,
            degrees.pp,
            expert_model_parallel_size=degrees.ep,
            expert_tensor_parallel_size=degrees.etp,
            distributed_timeout_minutes=max(int(timedelta(seconds=degrees.timeout_s).total_seconds() // 60), 1),
        )
        model_parallel_cuda_manual_seed(torch.initial_seed() % (1 << 31))
    groups = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "dense": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "ep": parallel_state.get_expert_model_parallel_group(),
        "etp": parallel_state.get_expert_tensor_parallel_group(),
        "edp": parallel_state.get_expert_data_parallel_group(),
    }
    for name, group in groups.items():
        axis = mesh[name]
        own = global_ranks(axis) if axis.size > 1 else [dist.get_rank()]
        if (theirs := dist.get_process_group_ranks(group)) != own:
            raise ValueError(
                f"parallel.{'dp' if name == 'dense' else name}: the mesh has ranks {own}, but parallel_state has "
                f"{theirs}; give initialize_model_parallel() the same degrees; if an earlier engine made the groups, "
                "call parallel_state.destroy_model_parallel() first"
            )


def _optimizer(made: Any, wrapped: Any, distributed: bool, max_norm: float) -> Any:
    """Return Megatron-Core's optimizer with the settings of ``made``, an AdamW."""
    if not isinstance(made, torch.optim.AdamW):
        raise ValueError(f"optimizer={type(made).__name__}: Megatron-Core's optimizer is AdamW here; make AdamW")
    first = made.param_groups[0]
    for group in made.param_groups:
        for name in ("lr", "betas", "eps", "amsgrad", "maximize"):
            if group[name] != first[name] or (name in ("amsgrad", "maximize") and group[name]):
                raise ValueError(
                    f"optimizer: a group has {name}={group[name]}, another {first[name]}; Megatron-Core's groups may "
                    "only differ in weight decay, and cannot have amsgrad or maximize"
                )
    decays = sorted({group["weight_decay"] for group in made.param_groups})
    if len(decays) > 1 and (len(decays) > 2 or decays[0] != 0.0):
        raise ValueError(f"optimizer: weight decays {decays}; Megatron-Core's optimizer can hold one, and zero")
    without = {id(p) for g in made.param_groups if g["weight_decay"] == 0.0 for p in g["params"]}
    undecayed = ParamKey(predicate=ParamPredicate("without weight decay", lambda p: id(p) in without))
    config = OptimizerConfig(
        optimizer="adam",
        lr=float(first["lr"]),
        min_lr=0.0,
        weight_decay=decays[-1],
        adam_beta1=first["betas"][0],
        adam_beta2=first["betas"][1],
        adam_eps=first["eps"],
        clip_grad=max_norm,
        use_distributed_optimizer=distributed,
    )
    found = get_megatron_optimizer(config, [wrapped], {undecayed: {"wd_mult": 0.0}}, use_gloo_process_groups=False)
    for group in found.param_groups:
        group["weight_decay"] = decays[-1] * group["wd_mult"]
    return found


class MegatronEngine:
    """Implements :class:`equimoe.moe.engines.base.Engine`. Built by :func:`build_megatron_engine`."""

    def __init__(
        self,
        stage: GPTStage,
        held: dict[str, Weight],
        mesh: Mesh,
        wrapped: Any,
        optimizer: Any,
        balance: StepBalance,
        tokens: _Tokens,
        loss: LossFunction,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.parts: list[nn.Module] = [stage]
        self.balance = balance
        #: Megatron-Core's own model, wrapped for data parallelism, and its optimizer
        self.megatron, self.optimizer = wrapped, optimizer
        self._stage, self._held, self._mesh, self._device = stage, held, mesh, device
        self._tokens, self._loss, self._precision = tokens, loss, precision
        self._moments = Moments(optimizer)
        self._trained = self._trainable()

    def step(self, batches: list[Batch], lr: float, accept: Accept | None = None) -> StepResult:
        """See :meth:`equimoe.moe.engines.base.Engine.step`."""
        if changed := sorted(self._trainable() ^ self._trained):
            raise ValueError(
                f"{changed[0]}: was frozen or unfrozen after the Megatron engine was built, whose buffers cannot take "
                "it in; freeze weights before, or build a new engine"
            )
        parameters = {name: weight.parameter for name, weight in self._held.items()}
        try:
            local = local_batches(batches, self._mesh, self._device, self.parts)
            tokens, routed, check_alike = count_tokens(batches, local, self._mesh, parameters)
            check_alike()
            self._tokens.value = tokens.clamp_min(1)
            self.balance.begin(len(local), routed)
            self._zero_grad()
            with cast_once(*self.parts):
                if self.balance.counts_ahead:
                    with random_state_kept(), torch.no_grad():
                        self._run(local, lambda m: self.balance.micro_batch(m, ahead=True), forward_only=True)
                losses = self._run(local, self.balance.micro_batch, forward_only=False)
            norm, applied = self._update(lr, losses, tokens, accept)
        except BaseException:
            self.balance.discard()
            raise
        finally:
            self._zero_grad()
        self.balance.end(applied)
        return StepResult(losses, norm, applied)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> list[Tensor]:
        """See :meth:`equimoe.moe.engines.base.Engine.evaluate`."""
        if not batches:
            return []
        with evaluation_mode([self.megatron]), cast_once(*self.parts):
            local = local_batches(batches, self._mesh, self._device, self.parts)
            return self._run(local, lambda m: nullcontext(), forward_only=True)

    def _run(
        self, batches: list[LocalBatch], around: Callable[[int], AbstractContextManager[None]], forward_only: bool
    ) -> list[Tensor]:
        """Run the micro-batches through Megatron-Core's schedule; return their losses [B, S] on the last stage.

        ``around`` returns the context of a micro-batch's forward.
        """

        def forward(source: Iterator[tuple[int, LocalBatch]], model: nn.Module) -> tuple[Tensor, LossOf]:
            m, batch = next(source)
            positions = torch.arange(batch.inputs.shape[1], device=self._device).expand(batch.inputs.shape)
            padding = None if batch.mask is None else ~batch.mask
            # Megatron-Core's mask is True where a query does not see a key; without one, attention is causal
            hidden = None if batch.starts is None else ~Documents(batch.starts).seen()
            with around(m), self._precision():
                output = model(batch.inputs, positions, hidden, padding_mask=padding)
            if not self._stage.post_process:
                output = output.to(self._stage.config.pipeline_dtype)  # what the next stage receives, also of autocast
            return output, lambda logits: self._losses(logits, batch)

        first = batches[0].inputs.shape
        with vocabulary_parallel(self._mesh):
            found = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(enumerate(batches)),
                model=[self.megatron],
                num_microbatches=len(batches),
                seq_length=first[1],
                micro_batch_size=first[0],
                forward_only=forward_only,
            )
        return [each["losses"] for each in found]

    def _losses(self, logits_BSV: Tensor, batch: LocalBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the sum of a micro-batch's losses, the number of positions that count, and the losses."""
        if self._mesh["tp"].size > 1:
            logits_BSV = DTensor.from_local(logits_BSV, self._mesh.dense["tp"], [Shard(-1)], run_check=False)
        losses_BS = self._loss(logits_BSV, batch.labels)
        if batch.mask is not None and batch.labels.is_floating_point():
            losses_BS = losses_BS.masked_fill(~batch.mask, 0.0)
        valid = valid_positions(batch).to(torch.int)
        return losses_BS.sum(), valid, {"losses": losses_BS.detach()}

    def _update(self, lr: float, losses: list[Tensor], tokens: Tensor, accept: Accept | None) -> tuple[Tensor, bool]:
        """Update the weights if that is accepted; return the gradient's norm, and whether they were updated."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.prepare_grads()
        norm = torch.as_tensor(self.optimizer.get_grad_norm(), dtype=torch.float32, device=self._device).reshape(())
        applied = accepted(accept, Computed(losses, norm, tokens, self._gradient), self._mesh)
        if applied:
            self.optimizer.step()
        return norm, applied

    def _gradient(self) -> list[Tensor]:
        return [p.main_grad for p in self.megatron.parameters() if getattr(p, "main_grad", None) is not None]

    def _zero_grad(self) -> None:
        self.megatron.zero_grad_buffer()
        self.optimizer.zero_grad()

    # ---- checkpoints

    def weights(self) -> dict[str, Tensor]:
        """See :meth:`equimoe.moe.engines.base.Engine.weights`."""
        biases = {n: layer.router.bias_E for n, layer in self._layers().items() if layer.router.bias_E is not None}
        found = {name: weight.logical(weight.parameter.detach()) for name, weight in self._held.items()}
        return found | {f"blocks.{n}.mlp.router.bias_E": bias_E for n, bias_E in biases.items()}

    def moments(self) -> dict[str, Tensor]:
        """See :meth:`equimoe.moe.engines.base.Engine.moments`."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """See :meth:`equimoe.moe.engines.base.Engine.state`. Every rank must call it: it gathers sharded moments."""
        found = {f"model.{name}": weight for name, weight in self.weights().items()}
        for name, moments in self._whole_moments().items():
            for key, value in moments.items():
                logical = value.clone() if key == "step" else self._held[name].logical(value)
                found[f"optimizer.{name}.{key}"] = logical
        return found

    def expect(self, names: Collection[str]) -> None:
        """See :meth:`equimoe.moe.engines.base.Engine.expect`. Frozen weights have no moments here."""

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """See :meth:`equimoe.moe.engines.base.Engine.restore`."""
        moments, saved = self._whole_moments(), tensors_of(state)
        for name, of_weight in moments.items():
            for key, value in of_weight.items():
                found = saved[f"optimizer.{name}.{key}"]
                found = found.to_local() if isinstance(found, DTensor) else found
                (value if key == "step" else self._held[name].view(value)).copy_(found)
        by_parameter = {self._held[name].parameter: of_weight for name, of_weight in moments.items()}
        self._moments.restore(by_parameter)
        self.optimizer.reload_model_params()

    def _whole_moments(self) -> dict[str, dict[str, Tensor]]:
        """Return the moments of the trained weights by name. Halves of one parameter share its tensors."""
        trained = {name: w.parameter for name, w in self._held.items() if name in self._trained}
        of_parameter = self._moments.whole(list(dict.fromkeys(trained.values())))
        return {name: of_parameter[parameter] for name, parameter in trained.items()}

    def _layers(self) -> dict[str, MoE]:
        return {number: block.mlp for number, block in self._stage.blocks.items() if isinstance(block.mlp, MoE)}

    def _trainable(self) -> set[str]:
        return {name for name, weight in self._held.items() if weight.parameter.requires_grad}
