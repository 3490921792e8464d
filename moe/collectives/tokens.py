"""Ranks that all hold the same rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .axes import Axis
from .kept import once
from .rows import Flight, check_sizes, gathering
from .wire import Plain


def shares(rows: int, axis: Axis) -> list[int]:
    """How many of ``rows`` each rank takes, differing by one at most."""
    return [rows // axis.size + (rank < rows % axis.size) for rank in range(axis.size)]


def split_tokens(x_TD: Tensor, axis: Axis) -> Tensor:
    """This rank's share of rows that all ranks hold; its backward gathers the shares' gradients."""
    return x_TD if axis.size == 1 else _Split.apply(x_TD, axis)


def gather_tokens(y_TD: Tensor, tokens: int, axis: Axis) -> Tensor:
    """All ``tokens`` rows from the ranks' shares of them; its backward takes this rank's share of the gradient.

    For a gradient that is the same on all ranks, as it is where all compute the same loss from the rows: unlike
    :func:`gather_rows` it does not add the ranks' gradients up.
    """
    sizes = shares(tokens, axis)
    check_sizes(sizes, y_TD.shape[0], axis, [sizes[axis.rank]])
    return y_TD if axis.size == 1 else _Join.apply(y_TD, sizes, axis)


def _share(rows: Tensor, axis: Axis) -> Tensor:
    return rows.split(shares(rows.shape[0], axis))[axis.rank].clone()


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, axis: Axis) -> Tensor:
        ctx.way = gathering(shares(x_TD.shape[0], axis), axis)
        return _share(x_TD, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return Flight(grad, ctx.way, Plain()).land(), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TD: Tensor, sizes: list[int], axis: Axis) -> Tensor:
        ctx.axis = axis
        return once(lambda: Flight(y_TD, gathering(sizes, axis), Plain())).land()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _share(grad, ctx.axis), None, None
