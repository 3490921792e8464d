"""The part of a weight that this rank holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor, whose import takes a second that a run of one process does not need."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_rows(weight: Tensor) -> Tensor:
    """Return this rank's part of a weight, differentiable. Ranks may hold different numbers of rows."""
    if not is_dtensor(weight):
        return weight
    even = weight._local_tensor.shape[0] * weight.device_mesh.size(0) == weight.shape[0]
    return weight.to_local() if even or not weight.requires_grad else _Uneven.apply(weight)


def first_row(weight: Tensor) -> int:
    """Return the first row that this rank holds of a weight that ranks hold equally many rows of."""
    if not is_dtensor(weight):
        return 0
    return weight.device_mesh.get_local_rank(0) * weight._local_tensor.shape[0]


class _Uneven(torch.autograd.Function):
    """This rank's rows of an unevenly divided weight; the backward adds to ``weight.grad`` itself.

    Autograd sometimes copies a gradient instead of keeping it, and allocates the copy as if the rows were divided
    evenly (``new_empty_strided`` of a DTensor), which fails. Hooks on the weight are not called.
    """

    @staticmethod
    def forward(ctx: Any, weight: DTensor) -> Tensor:
        ctx.weight = weight
        return weight._local_tensor.view_as(weight._local_tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> None:
        from torch.distributed.tensor import DTensor

        weight: DTensor = ctx.weight
        if weight.grad is not None:
            cast(DTensor, weight.grad)._local_tensor.add_(grad)
            return
        mesh, places = weight.device_mesh, weight.placements
        weight.grad = DTensor.from_local(
            grad.contiguous(), mesh, places, run_check=False, shape=weight.shape, stride=weight.stride()
        )
