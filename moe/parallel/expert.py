"""Expert parallelism: each ep rank owns num_experts / ep experts; the etp ranks split the width of each."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..collectives import LOCAL
from ..experts import LoRAExperts
from ..layer import MoE
from ..placement import Owners, Placement
from .mesh import Mesh


def apply_expert_parallel(layer: MoE, mesh: Mesh, positions_S: Tensor | None = None) -> None:
    """Split a layer's experts over ``mesh``. The full weights must be the same on all ranks.

    Each rank keeps its part of the experts as DTensors, so that gradient norms, optimizers and checkpoints know the
    split. ``positions_S``, int64, are the positions of each sequence that this rank holds; None means that ranks hold
    consecutive parts in rank order. Raises ValueError for sizes that the degrees do not divide.
    """
    config, degrees, ep, etp = layer.config, mesh.degrees, mesh["ep"], mesh["etp"]
    uneven, unequal = degrees.experts == "fssdp", config.widths is not None
    if uneven and unequal:
        raise ValueError(f"moe.widths={config.widths}: parallel.experts='fssdp' moves equal experts; use 'ep'")
    if config.num_experts % ep.size and not uneven and not unequal:
        number = config.num_experts
        raise ValueError(f"moe.num_experts={number}: must be divisible by parallel.ep={ep.size}; change one of them")
    if config.row_width % etp.size:
        width = config.row_width
        what = f"must be divisible by parallel.etp={etp.size}; change one of them"
        raise ValueError(f"moe.intermediate_size={width}: {what}")
    experts = getattr(layer, "experts", None)
    if ep.size * etp.size > 1 and (hasattr(experts, "get_base_layer") or hasattr(experts, "original_module")):
        raise ValueError(
            f"parallel.ep={ep.size}, parallel.etp={etp.size}: the experts have an adapter of PEFT, which cannot be "
            "split over ranks; set both to 1, or adapt other modules"
        )
    if isinstance(experts, LoRAExperts) and (etp.size > 1 or uneven):
        raise ValueError(
            f"parallel.etp={etp.size}, parallel.experts={degrees.experts!r}: LoRA experts are whole on their rank; use "
            "etp=1 and experts='ep'"
        )
    assign = Owners.spread if uneven else Owners.consecutive
    owners = Owners.even(config.expert_widths, ep.size) if unequal else assign(config.num_experts, ep.size)
    layer.place(
        Placement(
            tokens=mesh["stage"],
            sequence=mesh["sequence"],
            copies=LOCAL if degrees.sequence_parallel else mesh["tp"],
            ep=ep,
            etp=etp,
            owners=owners,
            positions_S=positions_S,
        )
    )
    own_weights = list(layer.experts.named_parameters(recurse=False))
    if ep.size * etp.size == 1 or isinstance(own_weights[0][1], DTensor):  # alone, or shared with another layer
        return
    own_rows = config.rows_of(owners.experts_of(ep.rank))  # as DTensor shards them, and checkpoints store them
    if etp.size > 1:  # separate gate and up, so that a slice of the width contains both
        stacked = layer.experts.gate_up_proj.unflatten(1, (2 if config.gated else 1, -1))
        layer.experts.gate_up_proj = nn.Parameter(stacked.detach(), layer.experts.gate_up_proj.requires_grad)
    for name, weight in list(layer.experts.named_parameters(recurse=False)):
        own, axes, placements = weight.detach()[own_rows], mesh.expert["ep"], [Shard(0)]
        if etp.size > 1:
            width = weight.dim() - (2 if name == "gate_up_proj" else 1)
            own, axes = own.chunk(etp.size, width)[etp.rank], mesh.expert["ep", "etp"]
            placements.append(Shard(width))
        split = DTensor.from_local(
            own.clone(), axes, placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )
        layer.experts.register_parameter(name, nn.Parameter(split, requires_grad=weight.requires_grad))
