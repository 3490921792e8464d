"""A decoder of this package as a GPTModel of Megatron-Core, with the same weights and the same MoE layers.

S positions, B sequences, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from ...experts import SwiGLU
from ...layer import MoE
from ...model import Decoder
from ...model.attention import Attention, GroupedAttention
from ...model.decoder import Caller, _run
from ...model.head import NormHead
from ...parallel import Mesh
from ...parallel.expert import apply_expert_parallel
from ...placement import Placement
from .checkpoint import Offsets, sharded_layer


@dataclass(frozen=True)
class Weight:
    """A weight of the decoder, as part of one of the GPTModel's."""

    parameter: nn.Parameter
    #: returns the decoder's weight, a view, from a tensor of the parameter's shape
    view: Callable[[Tensor], Tensor] = lambda t: t
    #: (axis, dimension) along which ranks split the decoder's weight, and the mesh of these axes
    splits: tuple[tuple[str, int], ...] = ()
    mesh: DeviceMesh | None = None

    def logical(self, value: Tensor) -> Tensor:
        """Return ``value``, of the parameter's shape, as part of the decoder's whole weight."""
        own = self.view(value)
        if self.mesh is None:
            return own
        axes = tuple(axis for axis, _ in self.splits)
        return DTensor.from_local(own, self.mesh[axes], [Shard(dim) for _, dim in self.splits], run_check=False)


class GPTStage(GPTModel):
    """A GPTModel, or this rank's pipeline stage of one, whose blocks are numbered as in the decoder."""

    @property
    def blocks(self) -> dict[str, Any]:
        """The transformer layers by the block numbers of the decoder, from 0."""
        return {str(layer.layer_number - 1): layer for layer in self.decoder.layers}


class SequenceFirst(MoE):
    """An MoE layer of a decoder in a GPTModel: its input and output are [S, B, D]."""

    groups: ProcessGroupCollection
    #: Megatron's own; those of the decoder are in ``shared``
    shared_experts = None

    def forward(self, x_SBD: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return the output and None for a bias. ``padding_mask`` [B, S] is True where a position is padding."""
        mask_BS = None if padding_mask is None else ~padding_mask
        return super().forward(x_SBD.transpose(0, 1), mask_BS).transpose(0, 1).contiguous(), None  # it may be sent on

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the weights for Megatron-Core's ``dist_checkpointing``."""
        return sharded_layer(self, prefix, sharded_offsets, metadata)


class _Later(nn.Module):
    """Stands where an MoE layer will be put."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()


def transformer_config(model: Decoder, mesh: Mesh, device: torch.device) -> TransformerConfig:
    """Return the settings of a GPTModel that computes the same as ``model``. Raises ValueError if there is none."""
    degrees, block = mesh.degrees, next(iter(model.blocks.values()))
    attention = block.attention
    if not isinstance(attention, GroupedAttention):
        raise ValueError(
            "attention.kind='latent': the Megatron engine builds grouped-query attention only; use 'grouped', or "
            "engine='torch'"
        )
    _check_attention(model)
    if any(part is not _run for b in model.blocks.values() for part in (b.run_attention, b.run_feed_forward)):
        raise ValueError("recompute.part: the Megatron engine recomputes whole blocks only; use 'block'")
    if model.num_layers % degrees.pp:
        raise ValueError(
            f"model.num_layers={model.num_layers}: must be divisible by parallel.pp={degrees.pp}; change one of them"
        )
    if attention.split_heads % degrees.tp:
        raise ValueError(
            f"attention.num_kv_heads={attention.split_heads}: must be divisible by parallel.tp={degrees.tp}; change "
            "one of them"
        )
    dense = [b.mlp for b in model.blocks.values() if isinstance(b.mlp, SwiGLU)]
    layers = model.moe_layers()
    wide = dense[0].gate_proj.out_features if dense else model.hidden_size
    if dense and wide % degrees.tp:
        raise ValueError(
            f"model.intermediate_size={wide}: must be divisible by parallel.tp={degrees.tp}; change one of them"
        )
    if model.passes_logits:
        raise ValueError(
            "moe.router.gate='residual': Megatron-Core's blocks exchange hidden states only; use 'linear', or "
            "engine='torch'"
        )
    for name in ("zero_computation", "widths"):
        if any(getattr(layer.config, name) is not None for layer in layers):
            raise ValueError(
                f"moe.{name}: the Megatron engine has only experts of one width that ranks own; leave it out, or use "
                "engine='torch'"
            )
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"{name}: is {parameter.dtype}, but the Megatron engine trains fp32 weights; call model.float(), and "
                "give the engine precision=lambda: torch.autocast(...) to compute in 16 bits"
            )
    experts: dict[str, Any] = {}
    if layers:
        # as a list, it tells Megatron's checkpoints that layers differ
        which = [int(isinstance(b.mlp, MoE)) for b in model.blocks.values()]
        experts = {
            "num_moe_experts": layers[0].config.num_experts,
            "moe_ffn_hidden_size": 1,
            "moe_layer_freq": 1 if all(which) else which,
        }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=attention.split_heads * attention.group,
        num_query_groups=attention.split_heads,
        kv_channels=attention.head_width,
        ffn_hidden_size=wide,
        qk_layernorm=isinstance(attention.q_norm, nn.RMSNorm),
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=cast(nn.RMSNorm, block.attention_norm).eps,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=device.type == "cuda",
        tensor_model_parallel_size=degrees.tp,
        pipeline_model_parallel_size=degrees.pp,
        expert_model_parallel_size=degrees.ep,
        expert_tensor_parallel_size=degrees.etp,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=degrees.pp > 1,
        batch_p2p_comm=device.type == "cuda",
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        calculate_per_token_loss=True,
        use_cpu_initialization=device.type == "cpu",
        **experts,
    )


def _check_attention(model: Decoder) -> None:
    """Raise ValueError for attention that the GPTModel would compute without some of its settings."""
    for block in model.blocks.values():
        attention = cast(Attention, block.attention)
        config = attention.config
        refused = {
            "bias": config.bias != "none",
            "qk_norm_over": config.qk_norm and config.qk_norm_over != "head",
            "scaling": config.scaling is not None,
            "window": attention.window is not None,
        }
        for name, given in refused.items():
            if given:
                value = getattr(config, name)
                raise ValueError(f"attention.{name}={value}: the Megatron engine does not have it; use engine='torch'")


def build_stage(model: Decoder, config: TransformerConfig, mesh: Mesh, gradient_scale: Any) -> GPTStage:
    """Build this rank's stage of ``model``, and move its MoE layers into it. :func:`copy_weights` fills the rest.

    ``gradient_scale`` is that of the layers' placement.
    """
    pp = mesh["pp"]
    each = model.num_layers // pp.size
    here = range(pp.rank * each, (pp.rank + 1) * each)
    specs = []
    for number in here:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
        if isinstance(model.blocks[str(number)].mlp, MoE):
            spec.submodules.mlp = ModuleSpec(module=_Later)
        specs.append(spec)
    attention = cast(Attention, next(iter(model.blocks.values())).attention)
    head, embedding = model.head, model.embedding
    assert isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding)
    if head.weight is embedding.weight:
        raise ValueError(
            "model.head: shares its weight with the embedding, which the Megatron engine cannot hold; untie"
        )
    if isinstance(head, NormHead):
        raise ValueError("model.norm_head=True: Megatron-Core's output layer does not have it; use engine='torch'")
    if head.out_features % mesh["tp"].size:
        raise ValueError(
            f"model.vocab_size={head.out_features}: must be divisible by parallel.tp={mesh['tp'].size}; change one of "
            "them"
        )
    norm = specs[0].submodules.input_layernorm
    stage = GPTStage(
        config,
        TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm),
        vocab_size=head.out_features,
        max_sequence_length=attention.cos_SR.shape[0],
        pre_process=pp.rank == 0,
        post_process=pp.rank == pp.size - 1,
        position_embedding_type="rope",
        rotary_base=attention.config.rotary_base,
        share_embeddings_and_output_weights=False,
    )
    for name, block in stage.blocks.items():
        if model.blocks[name].run_block is not _run:
            run = cast(Caller, model.blocks[name].run_block)
            block.forward = partial(_recomputed, run, block.forward)
        layer = model.blocks[name].mlp
        if isinstance(layer, MoE):
            block.mlp = layer
            _adopt(layer, mesh, gradient_scale)
    return stage


def _recomputed(recompute: Caller, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return recompute(partial(forward, **kwargs), *args)


def _adopt(layer: MoE, mesh: Mesh, gradient_scale: Any) -> None:
    """Split a layer's experts, and mark its weights as Megatron-Core needs it."""
    apply_expert_parallel(layer, mesh)
    layer.place(replace(layer.balancer.placed or Placement(), gradient_scale=gradient_scale))
    layer.__class__ = SequenceFirst
    layer.groups = get_default_pg_collection()
    for name, weight in list(layer.experts.named_parameters(recurse=False)):
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        own: Any = nn.Parameter(local.detach().clone(), requires_grad=weight.requires_grad)
        own.allreduce = False
        set_tensor_model_parallel_attributes(own, True, own.dim() - 1, 1)  # counted on every rank in the gradient norm
        layer.experts.register_parameter(name, own)
    tp = mesh["tp"]
    if tp.size > 1:  # each tp rank routes its part of the tokens, and has the gradient of that part
        named = layer.named_parameters()
        dense = [p for name, p in named if p.requires_grad and not name.startswith("experts.")]
        for weight in dense:
            weight.register_hook(partial(_summed, tp.group))


def _summed(group: Any, grad: Tensor) -> Tensor:
    total = grad.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def weights(stage: GPTStage, mesh: Mesh) -> dict[str, Weight]:
    """Return this rank's weights by their names in the decoder."""
    found: dict[str, Weight] = {}
    tp = mesh["tp"]

    def add(name: str, parameter: nn.Parameter, dim: int | None = None, half: int | None = None) -> None:
        found[name] = weight = Weight(parameter)
        if half is not None:
            found[name] = weight = replace(weight, view=partial(_half, half))
        if dim is not None and tp.size > 1:
            found[name] = replace(weight, splits=(("tp", dim),), mesh=mesh.dense)

    if stage.pre_process:
        add("embedding.weight", stage.embedding.word_embeddings.weight, 0)
    for number, block in stage.blocks.items():
        prefix, attention = f"blocks.{number}.", block.self_attention
        add(f"{prefix}attention_norm.weight", block.input_layernorm.weight)
        add(f"{prefix}attention.qkv_proj.weight", attention.linear_qkv.weight, 0)
        add(f"{prefix}attention.out_proj.weight", attention.linear_proj.weight, 1)
        for theirs, ours in (("q_layernorm", "q_norm"), ("k_layernorm", "k_norm")):
            norm = getattr(attention, theirs, None)
            if isinstance(norm, nn.RMSNorm):
                add(f"{prefix}attention.{ours}.weight", norm.weight)
        add(f"{prefix}mlp_norm.weight", block.pre_mlp_layernorm.weight)
        if isinstance(block.mlp, MoE):
            for name, parameter in block.mlp.named_parameters():
                key = f"{prefix}mlp.{name}"
                add(key, parameter)
                if name.startswith("experts."):
                    found[key] = _of_experts(parameter, name, mesh)
            continue
        both = block.mlp.linear_fc1.weight
        for i, name in enumerate(("gate_proj", "up_proj")):
            add(f"{prefix}mlp.{name}.weight", both, 0, i)
        add(f"{prefix}mlp.down_proj.weight", block.mlp.linear_fc2.weight, 1)
    if stage.post_process:
        add("norm.weight", stage.decoder.final_layernorm.weight)
        add("head.weight", stage.output_layer.weight, 0)
    return found


def _of_experts(parameter: nn.Parameter, name: str, mesh: Mesh) -> Weight:
    splits = [("ep", 0)] if mesh["ep"].size > 1 or mesh["etp"].size > 1 else []
    if mesh["etp"].size > 1:
        splits.append(("etp", parameter.dim() - (2 if name.endswith("gate_up_proj") else 1)))
    return Weight(parameter, splits=tuple(splits), mesh=mesh.expert if splits else None)


def _half(i: int, t: Tensor) -> Tensor:
    return t.chunk(2)[i]


@torch.no_grad()
def copy_weights(into: dict[str, Weight], whole: dict[str, Tensor], mesh: Mesh) -> None:
    """Copy this rank's parts of the decoder's ``whole`` weights, and which of them are trained.

    The weights of experts are there already. Raises ValueError if only one half of a parameter is trained.
    """
    tp, trained = mesh["tp"], dict[nn.Parameter, bool]()
    for name, weight in into.items():
        if name not in whole:
            continue
        value = whole[name]
        for _, dim in weight.splits:
            value = value.chunk(tp.size, dim)[tp.rank]
        weight.view(weight.parameter).copy_(value)
        weight.parameter.requires_grad_(value.requires_grad)
        if trained.setdefault(weight.parameter, value.requires_grad) != value.requires_grad:
            raise ValueError(
                f"{name}: Megatron-Core holds gate_proj and up_proj in one parameter; freeze both of them, or neither"
            )
