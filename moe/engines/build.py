"""The engine that a mesh asks for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from ..model import Decoder
from ..parallel import Mesh, parallelize
from .data_parallel import DataParallel
from .pipelined import Pipelined


def build_engine(
    model: Decoder,
    mesh: Mesh | None,
    *,
    micro_batches: int,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype | None = None,
    precision: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> DataParallel:
    """Split a model that is whole and the same on every rank over ``mesh``, and make what runs it.

    ``shape`` [B, S] is that of a micro-batch before its sequences are split. ``dtype`` is what FSDP2 computes in;
    ``precision`` makes the context of every forward (autocast).
    """
    if mesh is None:
        return DataParallel(model, None, precision)
    if mesh.degrees.pp == 1:
        return DataParallel(parallelize(model, mesh, dtype), mesh, precision)
    share = (shape[0], shape[1] // mesh["cp"].size)
    return Pipelined(model, mesh, micro_batches, share, device, dtype, precision)
