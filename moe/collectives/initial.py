"""Initial values of weights that may be split over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


@torch.no_grad()
def fill(weight: Tensor, values: Callable[[Tensor], object]) -> None:
    """Let ``values`` fill a weight in place. A split weight (DTensor) gets its part of what it would get whole.

    So ranks that have seeded alike agree with one process. The whole weight is in memory meanwhile, on every rank.
    """
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        values(weight)
        return
    from torch.distributed.tensor import DTensor, Replicate  # only here: slow to import

    whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.to_local().device)  # type: ignore[attr-defined]
    values(whole)
    same = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    weight.copy_(same.redistribute(placements=weight.placements))  # type: ignore[attr-defined]


def fill_normal(weight: Tensor, std: float) -> None:
    """Values of a normal distribution around 0."""
    fill(weight, partial(nn.init.normal_, std=std))


def reset(module: nn.Module) -> None:
    """What the module's constructor did to its parameters and buffers, with the same random numbers.

    Of linear layers and embeddings of torch, which draw from the random stream even where other values follow; of
    others, their own ``reset_parameters``, if they have any.
    """
    if isinstance(module, nn.Linear):
        fill(module.weight, partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
    elif isinstance(module, nn.Embedding):
        fill(module.weight, nn.init.normal_)
    elif callable(own := getattr(module, "reset_parameters", None)):
        own()
