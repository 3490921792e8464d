"""Tensor parallelism of the dense part: attention, dense feed-forwards, embedding, head and loss, on DTensor.

Between the split layers a rank holds, under sequence parallelism, its part of the positions, else all of them. Linear
and embedding weights become DTensors split over the mesh; norms, routers and shared experts stay plain and the same on
all ranks.  B sequences, S positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from ..experts import SwiGLU
from ..model import Attention, Block, Decoder


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Split the dense weights, which are the same on all ranks, over a mesh of one dimension.

    Raises ValueError for sizes that the mesh's size does not divide.
    """
    check_sizes(model, mesh.size())
    outside = Shard(1) if sequence_parallel else Replicate()
    column, row = ColwiseParallel(input_layouts=outside), RowwiseParallel(output_layouts=outside)
    attention: dict[str, ParallelStyle] = {"qkv_proj": column, "out_proj": row}
    feed_forward: dict[str, ParallelStyle] = {"gate_proj": column, "up_proj": column, "down_proj": row}
    for block in model.blocks.values():
        assert isinstance(block, Block)
        parallelize_module(block.attention, mesh, attention)
        if isinstance(block.mlp, SwiGLU):
            parallelize_module(block.mlp, mesh, feed_forward)
    ends: dict[str, ParallelStyle] = {}
    if model.embedding is not None:
        ends["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=outside)
    if model.head is not None:
        ends["head"] = ColwiseParallel(input_layouts=outside, output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, ends)


def check_sizes(model: Decoder, tp: int) -> None:
    """Refuse sizes that tensor parallelism of this degree cannot split evenly."""
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            heads = module.qkv_proj.weight.shape[0] // (3 * module.head_width)
            if heads % tp:
                raise ValueError(f"parallel.tp={tp}: must divide model.num_heads={heads}")
        elif isinstance(module, SwiGLU) and ".shared." not in name and module.down_proj.weight.shape[1] % tp:
            width = module.down_proj.weight.shape[1]
            raise ValueError(f"parallel.tp={tp}: must divide model.intermediate_size={width}")
        elif isinstance(module, nn.Embedding) and module.num_embeddings % tp:
            size = module.num_embeddings
            raise ValueError(f"model.vocab_size={size}: give a multiple of parallel.tp={tp}; unused entries do no harm")
