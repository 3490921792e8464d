"""Attaches a loss to a tensor in the autograd graph, so that users need not add it to theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: returns the gradients of the loss with respect to ``prob_sums_BE`` ([E] or [B, E]), and to ``z_sum`` and
#: ``entropy_sum`` (scalars)
Gradients = Callable[[], tuple[Tensor, Tensor, Tensor]]


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        carrier: Tensor,
        prob_sums_BE: Tensor,
        z_sum: Tensor,
        entropy_sum: Tensor | None,
        gradients: Gradients,
    ) -> Tensor:
        ctx.gradients, ctx.has_entropy = gradients, entropy_sum is not None
        ctx.shape, ctx.dtype = prob_sums_BE.shape, prob_sums_BE.dtype
        return carrier.view_as(carrier)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_BE, grad_z, grad_entropy = ctx.gradients()
        last = grad_entropy.to(ctx.dtype) if ctx.has_entropy else None
        return grad, grad_BE.expand(ctx.shape).to(ctx.dtype), grad_z.to(ctx.dtype), last, None


def attach(
    carrier: Tensor, prob_sums_BE: Tensor, z_sum: Tensor, entropy_sum: Tensor | None, gradients: Gradients
) -> Tensor:
    """Return ``carrier`` unchanged; its backward also sends ``gradients()`` to the sums.

    ``gradients`` is called in the backward, so it can use counts that arrive after the forward.
    """
    return _Attach.apply(carrier, prob_sums_BE, z_sum, entropy_sum, gradients)
