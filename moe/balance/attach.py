"""Attaches a loss to a tensor in the autograd graph, so that users need not add it to theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: returns the gradients of the loss with respect to ``prob_sums_BE`` ([E] or [B, E]), and to ``z_sum`` and
#: ``entropy_sum`` (scalars; None: zero)
Gradients = Callable[[], tuple[Tensor, Tensor | None, Tensor | None]]


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
        ctx.gradients, ctx.shape, ctx.dtype = gradients, prob_sums_BE.shape, prob_sums_BE.dtype
        return carrier.view_as(carrier)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_BE, *of_tokens = ctx.gradients()
        grad_z, grad_entropy = (None if g is None else g.to(ctx.dtype) for g in of_tokens)
        return grad, grad_BE.to(ctx.dtype).expand(ctx.shape), grad_z, grad_entropy, None


def attach(
    carrier: Tensor, prob_sums_BE: Tensor, z_sum: Tensor, entropy_sum: Tensor | None, gradients: Gradients
) -> Tensor:
    """Return ``carrier`` unchanged; its backward also sends ``gradients()`` to the sums.

    ``gradients`` is called in the backward, so it can use counts that arrive after the forward.
    """
    return _Attach.apply(carrier, prob_sums_BE, z_sum, entropy_sum, gradients)
