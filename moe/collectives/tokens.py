"""Splits and gathers rows that all ranks of an axis hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .axes import Axis
from .codec import Plain
from .kept import once
from .rows import RowCollective, all_gathering, check_sizes


def part_sizes(rows: int, axis: Axis) -> list[int]:
    """Return how many of ``rows`` each rank takes; ranks differ by at most one."""
    return [rows // axis.size + (rank < rows % axis.size) for rank in range(axis.size)]


def split_tokens(x_TD: Tensor, axis: Axis) -> Tensor:
    """Take this rank's part of rows that all ranks hold. The backward gathers the gradients of all parts."""
    return x_TD if axis.size == 1 else _Split.apply(x_TD, axis)


def gather_tokens(y_TD: Tensor, tokens: int, axis: Axis) -> Tensor:
    """Gather all ``tokens`` rows from the ranks' parts. The backward takes this rank's part of the gradient.

    The gradient must be the same on all ranks, as it is if all compute the same loss from the rows. Unlike
    :func:`all_gather_rows`, this does not sum the gradients of the ranks.
    """
    sizes = part_sizes(tokens, axis)
    check_sizes(sizes, y_TD.shape[0], axis, [sizes[axis.rank]])
    return y_TD if axis.size == 1 else _Join.apply(y_TD, sizes, axis)


def _own_rows(rows: Tensor, axis: Axis) -> Tensor:
    return rows.split(part_sizes(rows.shape[0], axis))[axis.rank].clone()


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, axis: Axis) -> Tensor:
        ctx.direction = all_gathering(part_sizes(x_TD.shape[0], axis), axis)
        return _own_rows(x_TD, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return RowCollective(grad, ctx.direction, Plain()).wait()[0], None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TD: Tensor, sizes: list[int], axis: Axis) -> Tensor:
        ctx.axis = axis
        return once(lambda: RowCollective(y_TD, all_gathering(sizes, axis), Plain())).wait()[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _own_rows(grad, ctx.axis), None, None
