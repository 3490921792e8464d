"""Checks that all ranks start from the same weights.  N tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..collectives import Axis

#: elements hashed at a time; hashing takes about 20 bytes of memory per element
_CHUNK = 1 << 20


def model_has_values(model: nn.Module) -> bool:
    """Return whether the weights have values; in a dry run they have only shapes."""
    return not any(isinstance(p, FakeTensor) or p.is_meta for p in model.parameters())


@torch.no_grad()
def check_alike(model: nn.Module, axis: Axis) -> None:
    """Raise ValueError if the ranks of ``axis`` hold different parameters or buffers. Every rank must call it.

    Ranks compare a hash of each tensor's content: no tensor is copied, and 16 bytes per tensor are sent. The error, the
    same on every rank, names the first tensor that differs and a rank where it does.
    """
    if axis.size == 1:
        return
    tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    described = [(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()]
    # meta and fake tensors are on a device that cannot communicate
    device = torch.device("cuda" if dist.get_backend(axis.group) == "nccl" else "cpu")
    facts = torch.tensor([digest(described), model_has_values(model)], device=device)
    found = _first_that_differs(facts, axis)
    if found is not None and found[0] == 0:
        raise ValueError(
            f"model: rank {found[1]} has different parameters from rank 0; build the same model on every rank"
        )
    if found is not None:
        raise ValueError(
            f"model: either rank 0 or rank {found[1]} has it on the meta device; materialize it on every rank"
        )
    if not model_has_values(model):
        return
    check_trained_alike(tensors, axis)
    hashes_N = torch.stack([content_hash(t) for t in tensors.values()])
    found = _first_that_differs(hashes_N, axis)
    if found is not None:
        raise ValueError(
            f"{list(tensors)[found[0]]}: rank {found[1]} starts from different values from rank 0; "
            "set the same seed on every rank before building the model, or load the same weights"
        )


def check_trained_alike(parameters: Mapping[str, Tensor], axis: Axis) -> None:
    """Raise ValueError, on every rank of ``axis``, that names the first parameter which only some of them train."""
    device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
    trained_N = torch.tensor([p.requires_grad for p in parameters.values()], dtype=torch.int64, device=device)
    found = _first_that_differs(trained_N, axis)
    if found is not None:
        raise ValueError(
            f"{list(parameters)[found[0]]}: only one of the ranks 0 and {found[1]} trains it; set requires_grad "
            "to the same value on every rank"
        )


def digest(value: object) -> int:
    """A number of 40 bits that depends on ``repr(value)``."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:5], "big")


def content_hash(tensor: Tensor) -> Tensor:
    """Hash a tensor's bits and their order to an int64 scalar, on the tensor's own device."""
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    bits = flat if flat.dtype == torch.bool else flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        # a different odd multiplier for every position; int64 arithmetic wraps around
        place = torch.arange(start, start + len(part), device=tensor.device)
        mixed = (part + 1) * (place * 0x5851F42D4C957F2D + 0x14057B7EF767814F).bitwise_or(1)
        total += (mixed ^ (mixed >> 29)).sum()
    return total


_INTEGERS: Mapping[int, torch.dtype] = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _first_that_differs(values_N: Tensor, axis: Axis) -> tuple[int, int] | None:
    """Return the first index where the ranks' values differ, and the lowest rank that differs from rank 0 there."""
    extremes = torch.stack((values_N, ~values_N))  # one MAX finds both extremes: ~ reverses the order without overflow
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=axis.group)
    different = (extremes[0] != ~extremes[1]).nonzero().flatten().tolist()
    if not different:
        return None
    place = different[0]
    everywhere = [torch.zeros_like(values_N[place]) for _ in range(axis.size)]
    dist.all_gather(everywhere, values_N[place].clone(), group=axis.group)
    return place, next(rank for rank, value in enumerate(everywhere) if int(value) != int(everywhere[0]))
