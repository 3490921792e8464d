"""Initializes weights that may be sharded over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


@torch.no_grad()
def fill(weight: Tensor, values: Callable[[Tensor], object]) -> None:
    """Call ``values`` to fill a weight in place. A sharded weight (DTensor) gets its part of the whole weight's values.

    Ranks with the same seed therefore get the same weights as one process. Every rank temporarily holds the whole
    weight in memory.
    """
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        values(weight)
        return
    from torch.distributed.tensor import DTensor, Replicate  # imported late because it is slow

    whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.to_local().device)  # type: ignore[attr-defined]
    values(whole)
    same = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    weight.copy_(same.redistribute(placements=weight.placements))  # type: ignore[attr-defined]


def fill_normal(weight: Tensor, std: float) -> None:
    """Fill a weight, which may be sharded, from a normal distribution with mean 0."""
    fill(weight, partial(nn.init.normal_, std=std))


def reset(module: nn.Module) -> None:
    """Initialize a module's parameters and buffers as its constructor does, with the same draws of random numbers.

    torch's linear layers and embeddings are filled here, even if the caller overwrites the values, because their
    constructors draw random numbers too. Other modules use their own ``reset_parameters``, if they have one.
    """
    if isinstance(module, nn.Linear):
        fill(module.weight, partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
        if module.bias is not None:
            bound = module.in_features**-0.5
            fill(module.bias, partial(nn.init.uniform_, a=-bound, b=bound))
    elif isinstance(module, nn.Embedding):
        fill(module.weight, nn.init.normal_)
    elif callable(own := getattr(module, "reset_parameters", None)):
        own()
