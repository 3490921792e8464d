"""The contract of fp32 main gradients, to which the experts add the gradients of their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..collectives import local_rows
from .casts import KeptCasts, cast_as


def weight_of(
    parameter: Tensor, dtype: torch.dtype | None, casts: KeptCasts | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return this rank's part of a weight, in ``dtype`` if it is given, and its main gradient if it has one.

    Where ``casts`` keep this part in ``dtype``, it is not cast again.

    A weight with an attribute ``main_grad``, contiguous fp32 of the shape of this rank's part, gets its gradients there
    and not in ``.grad``. This is the convention of Megatron-Core, whose DDP adds the attribute
    ``grad_added_to_main_grad``: it is set, and autograd gets a gradient without values, which DDP's hooks expect and
    discard.
    """
    main_grad = getattr(parameter, "main_grad", None) if parameter.requires_grad else None
    kept = None if casts is None or dtype is None else casts.of(parameter, dtype)
    if main_grad is None or main_grad.dtype != torch.float32:
        weight = local_rows(parameter)
        if kept is not None:
            return cast_as(weight, kept), None
        return (weight if dtype is None else weight.to(dtype)), None
    return _Delivered.apply(parameter, main_grad, dtype, kept), main_grad


class _Delivered(torch.autograd.Function):
    """Returns this rank's part of ``parameter``, for an op that adds its gradient to ``main_grad``.

    A gradient that arrives nevertheless, as from experts that were copied to other ranks, is added by the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, parameter: Tensor, main_grad: Tensor, dtype: torch.dtype | None, kept: Tensor | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.parameter, ctx.main_grad = parameter, main_grad
        if kept is not None:
            return kept.view_as(kept)
        local = local_rows(parameter)
        return local.view_as(local) if dtype is None else local.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grad is not None:
            ctx.main_grad.add_(grad)
        if not hasattr(ctx.parameter, "grad_added_to_main_grad"):
            return None, None, None, None
        ctx.parameter.grad_added_to_main_grad = True
        return torch.empty_like(ctx.parameter), None, None, None
