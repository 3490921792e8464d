"""This package's MoE layer as a module of Megatron-Core's GPTModel.

S positions, B sequences, D hidden, E experts, F expert width.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection, save_to_aux_losses_tracker
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from ...balance import Visit, recompute
from ...collectives import LOCAL, Axis, axis_of
from ...layer import MoE
from ...placement import Owners, Placement
from ...types import Routing
from .checkpoint import Offsets, sharded_layer
from .config import Estimator, RouterName, loss_types, moe_config
from .router import ExactRouter, MegatronRouter
from .step import MegatronStep

#: this package's names of losses -> Megatron's, in its log
_LOGGED = {
    "micro": "load_balancing_loss",
    "sequence": "seq_load_balancing_loss",
    "global": "global_load_balancing_loss",
    "z": "z_loss",
}
_DEGREES = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "expt_tp": "expert_tensor_parallel_size",
}


def moe_layer_spec(
    config: TransformerConfig,
    *,
    router: RouterName = "equimoe",
    estimator: Estimator = "rolling",
    shared_experts: ModuleSpec | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> ModuleSpec:
    """Return the spec of the MoE layer that ``config`` describes, for the ``mlp`` of a transformer layer's spec:

    >>> spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts)
    >>> spec.submodules.mlp = moe_layer_spec(config)

    * ``router``: "equimoe" counts the choices that tokens make, and gives ``global_aux_loss`` its exact gradient.
      "megatron" is Megatron-Core's TopKRouter with all its settings. It counts the choices that tokens would make
      without expert bias and groups, and the gradient of its ``global_aux_loss`` is divided by the number of
      data-parallel ranks.
    * ``estimator``: see :class:`equimoe.moe.config.BalanceConfig`. "rolling" is Megatron's. "exact" needs a
      ``counting_pass`` around a ``forward_only`` run of the step's micro-batches.
    * ``shared_experts``: their spec; None: Megatron's SharedExpertMLP with its plain linear layers.
    * ``pg_collection``: the model's process groups; None: those of ``parallel_state``. A transformer layer gives its
      own only to Megatron's layers, and logs "Unknown MLP type" for others.

    Raises ValueError for a setting that this layer does not have.
    """
    moe_config(config, router, estimator)
    if shared_experts is None and config.moe_shared_expert_intermediate_size is not None:
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

        shared_experts = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts).submodules.shared_experts
    return ModuleSpec(
        module=MoELayer,
        params={"router": router, "estimator": estimator, "pg_collection": pg_collection},
        submodules=MoESubmodules(shared_experts=shared_experts),
        metainfo={"fuse_pre_mlp_layernorm": False},
    )


class MoELayer(MoE):
    """The layer that :func:`moe_layer_spec` describes. Maps [S, B, D] to the same shape; it has no bias.

    ``experts`` holds this rank's experts only. Weights are initialised by the functions of ``config``. Checkpoints have
    the names and shapes of Megatron-Core's own layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        router: RouterName = "equimoe",
        estimator: Estimator = "rolling",
    ) -> None:
        if pg_collection is None and not parallel_state.is_initialized():
            raise ValueError(
                "parallel_state: not initialised; call initialize_model_parallel() before building a model"
            )
        if submodules is not None and submodules.experts is not None:
            raise ValueError("submodules.experts: the experts are this package's own; use moe_layer_spec(config)")
        groups = get_default_pg_collection() if pg_collection is None else pg_collection
        _check_groups(config, groups)
        moe = moe_config(config, router, estimator)
        with torch.device("meta"):  # a rank need not have room for all experts
            super().__init__(moe)
        self.megatron, self.groups, self.layer_number = config, groups, layer_number
        with torch.device("cpu" if config.use_cpu_initialization else "cuda"):
            self.router: Any = ExactRouter(moe, config) if router == "equimoe" else MegatronRouter(config, groups)
            self._place()
            self._create_weights()
        weight: Any = self.router.weight
        weight.sequence_parallel = config.sequence_parallel
        self.shared_experts: nn.Module | None = None
        if config.moe_shared_expert_intermediate_size is not None:
            assert submodules is not None, "the spec has them"
            self.shared_experts = build_module(
                submodules.shared_experts, config=config, pg_collection=groups, gate=config.moe_shared_expert_gate
            )
        selective = config.recompute_modules or [] if config.recompute_granularity == "selective" else []
        self._recompute, self._recompute_shared = "moe" in selective, "shared_experts" in selective
        if router == "equimoe":
            self._tell_of_exact_gradient()

    def set_layer_number(self, layer_number: int) -> None:
        """Set the number, from 1, under which losses are logged. Called by the transformer layer around this layer.

        Raises ValueError if that has no norm before this layer.
        """
        _check_norm(inspect.currentframe().f_back.f_locals.get("self"))  # type: ignore[union-attr]
        self.layer_number = layer_number
        if isinstance(self.router, MegatronRouter):
            self.router.set_layer_number(layer_number)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return the output [S, B, D], and None for a bias.

        ``padding_mask`` is bool [B, S], True where a position is padding, as in Megatron-Core's own layer.
        """
        if intermediate_tensors is not None:
            raise ValueError("intermediate_tensors: this layer cannot be captured in part; leave it out")
        x_BSD = hidden_states.transpose(0, 1)
        mask_BS = None if padding_mask is None else ~padding_mask.bool()
        run, shared = super().forward, self.shared_experts
        if self._recompute and self.training:
            # Megatron's router counts whenever gradients are enabled, so its first pass must be without
            of_megatron = isinstance(self.router, MegatronRouter)
            run = partial(checkpoint, run, False) if of_megatron else partial(recompute, run)
        y_SBD = run(x_BSD, mask_BS).transpose(0, 1).contiguous()  # it may be sent on
        if shared is not None and self._recompute_shared and self.training:
            y_SBD = y_SBD + checkpoint(shared, False, hidden_states)
        elif shared is not None:
            y_SBD = y_SBD + shared(hidden_states)
        return y_SBD, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the weights for Megatron-Core's ``dist_checkpointing``."""
        return sharded_layer(self, prefix, sharded_offsets, metadata)

    def _place(self) -> None:
        config, groups = self.megatron, self.groups
        tp, ep = axis_of("tp", groups.tp), axis_of("ep", groups.ep)
        step = MegatronStep(self.balancer, config.calculate_per_token_loss, self._log)
        self.place(
            Placement(
                tokens=axis_of("tokens", groups.tp_dp_cp),
                sequence=axis_of("sequence", groups.tp_cp),
                copies=LOCAL if config.sequence_parallel else tp,
                ep=ep,
                etp=axis_of("etp", groups.expt_tp),
                owners=Owners.consecutive(self.config.num_experts, ep.size),
                gradient_scale=step.scale,
            )
        )
        self.balancer.step, self.balancer.layer = step, step.layers[0]
        if isinstance(self.router, ExactRouter):
            self.router.end_step = step.end
        if tp.size > 1 and not config.sequence_parallel:
            # its gradient covers this rank's part of the tokens, and Megatron takes it for that of all of them
            self.router.weight.register_hook(partial(_summed, tp))

    @torch.no_grad()
    def _create_weights(self) -> None:
        config, moe, placement = self.megatron, self.config, self.balancer.placement
        owned, width, hidden = len(self._owned), moe.intermediate_size, moe.hidden_size
        # of one expert; the second axis is split over etp
        shapes = {"gate_up_proj": (2 if moe.gated else 1, width, hidden), "down_proj": (hidden, width)}
        draws = {"gate_up_proj": config.init_method, "down_proj": config.output_layer_init_method}
        for name, shape in shapes.items():
            weight = torch.empty(owned, shape[0], width // placement.etp.size, *shape[2:], dtype=config.params_dtype)
            if config.perform_initialization:
                self._draw(weight, shape, draws[name])
            parameter: Any = nn.Parameter(weight.flatten(1, 2) if name == "gate_up_proj" else weight)
            parameter.allreduce = False  # tells Megatron that it is a weight of experts
            # else the gradient norm would leave it out on all tp ranks but the first
            set_tensor_model_parallel_attributes(parameter, True, 1 if name == "gate_up_proj" else 2, 1)
            self.experts.register_parameter(name, parameter)
        if isinstance(self.router, ExactRouter):
            if config.perform_initialization:
                config.init_method(self.router.weight)
            self.router.to(config.params_dtype)

    def _draw(self, weight: Tensor, shape: tuple[int, ...], draw: Callable[[Tensor], Any]) -> None:
        """Draw this rank's part of the experts' weights. On a CPU, it depends on neither the rank nor their number."""
        if not self.megatron.use_cpu_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                for of_expert in weight:
                    draw(of_expert.flatten(0, -2))
            return
        etp, owned = self.balancer.placement.etp, self._owned
        for expert in range(self.config.num_experts):
            whole = torch.empty(shape, dtype=torch.float32)
            draw(whole.flatten(0, -2))
            if expert in owned:
                weight[owned.index(expert)] = whole.chunk(etp.size, 1)[etp.rank]

    @property
    def _owned(self) -> list[int]:
        """This rank's experts."""
        return self.balancer.owners.experts_of(self.balancer.placement.ep.rank)

    def _keep_stats(self, routing: Routing, visit: Visit) -> None:
        super()._keep_stats(routing, visit)
        if isinstance(self.router, ExactRouter) and not visit.ahead:
            self.router.count(routing.counts_BE.sum(0))

    def _log(self, visit: Visit, divided_by: int) -> None:
        """Add a micro-batch's losses, without coefficients, to those that Megatron-Core logs."""
        config, placement = self.megatron, self.balancer.placement
        ranks = placement.tokens.size // placement.sequence.size
        layers = config.num_layers + (config.mtp_num_layers or 0)
        over_all = self.config.balance.scope == "global"
        for term in visit.terms:
            if not term.coefficient:
                continue
            of_all = term.name == "global" or (term.name == "z" and over_all)
            save_to_aux_losses_tracker(
                _LOGGED[term.name],
                (term.value * (divided_by if of_all else divided_by * ranks)).float(),
                self.layer_number,
                layers,
                reduce_group=self.groups.tp_dp_cp if of_all else self.groups.tp_cp,
                reduce_group_has_dp=of_all,
            )

    def _tell_of_exact_gradient(self) -> None:
        placement = self.balancer.placement
        ranks = placement.tokens.size // placement.sequence.size
        if ranks > 1 and "global_aux_loss" in loss_types(self.megatron):
            warnings.warn(
                f"global_aux_loss: its gradient is exact here. Megatron-Core divides it by the {ranks} data-parallel "
                f"ranks, so a moe_aux_loss_coeff that was tuned there corresponds to 1/{ranks} of it here; "
                "moe_layer_spec(config, router='megatron') keeps Megatron's gradient",
                stacklevel=2,
            )


def _check_norm(block: Any) -> None:
    """Raise ValueError for a transformer layer of TransformerEngine that leaves the norm to a dense MLP."""
    if not isinstance(getattr(block, "pre_mlp_layernorm", None), IdentityOp):
        return
    if any("transformer_engine" in type(module).__module__ for module in block.modules()):
        raise ValueError(
            "pre_mlp_layernorm: this layer has no norm of its own, unlike a dense MLP of TransformerEngine; pass "
            "num_experts to get_gpt_layer_with_transformer_engine_spec"
        )


def _summed(axis: Axis, grad: Tensor) -> Tensor:
    """Return the sum of a gradient over an axis."""
    total = grad.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=axis.group)
    return total


def _check_groups(config: TransformerConfig, groups: ProcessGroupCollection) -> None:
    """Raise ValueError if the process groups do not fit ``config``."""
    for name, field in _DEGREES.items():
        found, declared = dist.get_world_size(getattr(groups, name)), getattr(config, field)
        if declared is not None and declared != found:
            raise ValueError(
                f"{field}={declared}: the process groups have {found}; give TransformerConfig and "
                "initialize_model_parallel() the same"
            )
    ep, etp = dist.get_world_size(groups.ep), dist.get_world_size(groups.expt_tp)
    experts, width = config.num_moe_experts or 1, config.moe_ffn_hidden_size or 1
    if experts % ep:
        raise ValueError(f"expert_model_parallel_size={ep}: must divide num_moe_experts={experts}; change one of them")
    if width % etp:
        raise ValueError(
            f"expert_tensor_parallel_size={etp}: must divide moe_ffn_hidden_size={width}; change one of them"
        )
