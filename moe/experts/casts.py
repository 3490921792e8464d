"""Casts of weights that are kept while the weights stay the same, as over the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from ..collectives import local_rows

#: modes of selective checkpointing, in the forward and in the recomputation
_SELECTIVE = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)


@dataclass
class _Kept:
    """A weight's last cast, and what it was made of."""

    #: keeping it ensures that no other storage takes its place in memory
    storage: torch.UntypedStorage
    cast: Tensor | None = None
    made_of: tuple[Any, ...] = ()


class KeptCasts:
    """Casts this rank's parts of ``weights`` once, and again after a change.

    A change is what torch counts (``Tensor._version``), and what the caller reports by :meth:`forget`, as it must after
    a step of an optimizer: torch does not count what fused optimizers do. A weight whose memory is another than when
    this was created is not kept: whoever gathers it or replaces it may change it at any time.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._kept = {weight: _Kept(_local(weight).untyped_storage()) for weight in weights}

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return this rank's part of ``weight`` in ``dtype``, without a gradient; None if it cannot be kept."""
        kept, local = self._kept.get(weight), _local(weight)
        if kept is None or local.dtype == dtype or local.untyped_storage() is not kept.storage:
            return None
        if weight.is_inference() or local.is_inference():
            return None  # torch does not count their changes
        if any(isinstance(mode, _SELECTIVE) for mode in _get_current_dispatch_mode_stack()):
            return None  # a recomputation must run the same ops as its forward, which may have made the cast
        stream = None
        if local.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return None  # a graph has its own memory, and reads what it reads at every replay
            stream = torch.cuda.current_stream(local.device)  # another stream would have to wait for the cast
        place = local.storage_offset(), local.shape, local.stride()
        made_of = (dtype, stream, weight._version, local._version, *place)
        if kept.made_of != made_of:
            kept.cast = None  # frees its memory first
            with torch.inference_mode(False), torch.no_grad():  # a backward may need it
                kept.cast, kept.made_of = local.detach().to(dtype), made_of
        return kept.cast

    def forget(self) -> None:
        """Free all casts, because weights have changed."""
        for kept in self._kept.values():
            kept.cast, kept.made_of = None, ()


@torch.no_grad()
def _local(weight: Tensor) -> Tensor:
    return local_rows(weight)


def cast_as(weight: Tensor, cast: Tensor) -> Tensor:
    """Return ``cast``, differentiable as what it is: ``weight`` in another dtype."""
    return _Cast.apply(weight, cast)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, cast: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.dtype = weight.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return None if grad is None else grad.to(ctx.dtype), None
