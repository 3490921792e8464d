"""Tensor parallelism of attention, dense feed-forwards, embedding, head and loss, with DTensor.

Linear and embedding weights become DTensors sharded over the mesh. Norms, routers and shared experts stay plain tensors
that are the same on all ranks. Outside the split layers, a rank holds its part of the positions under sequence
parallelism, and all positions without it.  B sequences, S positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from ..experts import SwiGLU
from ..layer import MoE
from ..model import Attention, Decoder, GroupedAttention, JointNorm, LatentAttention


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Shard the dense weights over a one-dimensional mesh. They must be the same on all ranks.

    Raises ValueError for sizes that cannot be split.
    """
    check_divisible(model, mesh.size())
    outside = Shard(1) if sequence_parallel else Replicate()
    column, row = ColwiseParallel(input_layouts=outside), RowwiseParallel(output_layouts=outside)
    # projections to latents are narrow: every rank holds them whole, and only the latents are gathered
    by_latent = {"q_up_proj": column, "kv_up_proj": column, "common_key": _ForAllHeads(outside), "out_proj": row}
    attention: dict[type, dict[str, ParallelStyle]] = {
        GroupedAttention: {"qkv_proj": column, "out_proj": row},
        LatentAttention: by_latent,
    }
    feed_forward: dict[str, ParallelStyle] = {"gate_proj": column, "up_proj": column, "down_proj": row}
    # a module that several blocks share is split once
    modules = {part for block in model.blocks.values() for part in (block.attention, block.mlp)}
    for module in [m for m in model.modules() if m in modules]:
        if isinstance(module, Attention):
            parallelize_module(module, mesh, attention[type(module)])
        elif isinstance(module, SwiGLU):
            parallelize_module(module, mesh, feed_forward)
    ends: dict[str, ParallelStyle] = {}
    if model.embedding is not None:
        ends["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=outside)
    if model.head is not None:
        ends["head"] = ColwiseParallel(input_layouts=outside, output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, ends)


class _ForAllHeads(ParallelStyle):
    """Gathers the output's positions on every rank; the backward sums the gradients of all ranks' heads."""

    def __init__(self, outside: Placement) -> None:
        self.outside = outside

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(_module: nn.Module, _args: Any, part: Tensor) -> Tensor:
            split = DTensor.from_local(part, device_mesh, (self.outside,), run_check=False)
            return split.redistribute(placements=(Replicate(),)).to_local(grad_placements=(Partial(),))

        module.register_forward_hook(gather)
        return module


def check_divisible(model: Decoder, tp: int) -> None:
    """Raise ValueError for sizes that cannot be split over ``tp`` ranks.

    Heads and widths must divide evenly. The vocabulary need not, but every rank must get at least one entry.
    """
    whole = {part for layer in model.modules() if isinstance(layer, MoE) for part in layer.modules()}
    for name, module in model.named_modules():
        split = hasattr(module, "get_base_layer")
        if hasattr(module, "original_module"):  # PEFT trains a copy of it (modules_to_save)
            parts = module.original_module.modules()
            split = any(isinstance(part, (nn.Linear, nn.Embedding)) and part not in whole for part in parts)
        if split and module not in whole:
            raise ValueError(
                f"parallel.tp={tp}: {name} has an adapter of PEFT, which tensor parallelism cannot split; set "
                "parallel.tp=1, or adapt other modules"
            )
        if isinstance(module, Attention):
            grouped = isinstance(module, GroupedAttention) and module.group > 1
            _divided("attention.num_kv_heads" if grouped else "model.num_heads", module.split_heads, tp)
            if any(isinstance(part, JointNorm) for part in module.children()):
                raise ValueError(
                    "attention.qk_norm_over='all_heads': tensor parallelism gives each rank some of the heads; set "
                    "parallel.tp=1"
                )
        elif isinstance(module, SwiGLU) and ".shared." not in name:
            _divided("model.intermediate_size", module.down_proj.weight.shape[1], tp)
        elif isinstance(module, nn.Embedding) and -(-module.num_embeddings // tp) * (tp - 1) >= module.num_embeddings:
            size = module.num_embeddings
            raise ValueError(f"parallel.tp={tp}: some rank would get no entry of model.vocab_size={size}; lower it")


def _divided(field: str, size: int, tp: int) -> None:
    if size % tp:
        fitting = ", ".join(str(degree) for degree in range(1, min(size, 64) + 1) if size % degree == 0)
        raise ValueError(f"parallel.tp={tp}: must divide {field}={size}; use one of {fitting}, or set {field}")
