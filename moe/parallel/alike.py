"""Whether all ranks start from the same weights.  N tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..collectives import Axis

#: elements that are hashed at a time: the memory that this takes is about 20 bytes for each
_CHUNK = 1 << 20


def has_values(model: nn.Module) -> bool:
    """False for weights that have a shape and no values, as in a dry run."""
    return not any(isinstance(p, FakeTensor) or p.is_meta for p in model.parameters())


@torch.no_grad()
def check_alike(model: nn.Module, axis: Axis) -> None:
    """Refuse to start where the ranks of ``axis`` hold different parameters or buffers. Every rank calls it.

    Compares a hash of each tensor's content: nothing is copied, and 16 bytes per tensor are sent. Raises ValueError, on
    every rank, that names the first tensor that differs and a rank.
    """
    if axis.size == 1:
        return
    tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    described = [(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()]
    # tensors that have no values lie on no device that could communicate
    device = torch.device("cuda" if dist.get_backend(axis.group) == "nccl" else "cpu")
    facts = torch.tensor([digest(described), has_values(model)], device=device)
    found = _first_that_differs(facts, axis)
    if found is not None and found[0] == 0:
        raise ValueError(f"model: rank {found[1]} has other parameters than rank 0; build the same model on every rank")
    if found is not None:
        raise ValueError(
            f"model: either rank 0 or rank {found[1]} has it on the meta device; materialize it on every rank"
        )
    if not has_values(model):
        return
    check_trained_alike(tensors, axis)
    hashes_N = torch.stack([content_hash(t) for t in tensors.values()])
    found = _first_that_differs(hashes_N, axis)
    if found is not None:
        raise ValueError(
            f"{list(tensors)[found[0]]}: rank {found[1]} starts from other values than rank 0; "
            "seed every rank alike before building the model, or load the same weights"
        )


def check_trained_alike(parameters: Mapping[str, Tensor], axis: Axis) -> None:
    """Raise ValueError, on every rank of ``axis``, that names the first parameter which only some of them train."""
    device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
    trained_N = torch.tensor([p.requires_grad for p in parameters.values()], dtype=torch.int64, device=device)
    found = _first_that_differs(trained_N, axis)
    if found is not None:
        raise ValueError(
            f"{list(parameters)[found[0]]}: one of the ranks 0 and {found[1]} trains it, and the other does not; set "
            "requires_grad alike on every rank"
        )


def digest(value: object) -> int:
    """A number of 40 bits that depends on ``repr(value)``."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:5], "big")


def content_hash(tensor: Tensor) -> Tensor:
    """int64 scalar that depends on every bit of a tensor, and on their order; computed where the tensor is."""
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    bits = flat if flat.dtype == torch.bool else flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        # odd multipliers, unlike for every place; the arithmetic wraps around
        place = torch.arange(start, start + len(part), device=tensor.device)
        mixed = (part + 1) * (place * 0x5851F42D4C957F2D + 0x14057B7EF767814F).bitwise_or(1)
        total += (mixed ^ (mixed >> 29)).sum()
    return total


_INTEGERS: Mapping[int, torch.dtype] = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _first_that_differs(values_N: Tensor, axis: Axis) -> tuple[int, int] | None:
    """The first place where the ranks' values are not equal, and the lowest rank there that differs from rank 0."""
    extremes = torch.stack((values_N, ~values_N))  # ~ turns the order around, and cannot overflow
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=axis.group)
    different = (extremes[0] != ~extremes[1]).nonzero().flatten().tolist()
    if not different:
        return None
    place = different[0]
    everywhere = [torch.zeros_like(values_N[place]) for _ in range(axis.size)]
    dist.all_gather(everywhere, values_N[place].clone(), group=axis.group)
    return place, next(rank for rank, value in enumerate(everywhere) if int(value) != int(everywhere[0]))
