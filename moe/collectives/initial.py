"""Initializes weights that may be sharded over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

#: elements that share a generator; a block has at least one row
BLOCK = 1 << 20
#: torch's generator for CPUs uses 32 bits of its seed
SEEDS = 1 << 32


@torch.no_grad()
def fill(weight: Tensor, draw: Callable[..., object]) -> None:
    """Fill a weight in place with random numbers: ``draw(block, generator=...)`` fills a block of consecutive rows.

    Every block has a generator of its own. A rank with a part of a sharded weight (DTensor) therefore gets the values
    that one process gets there, and draws only the blocks of which it holds something. Whatever the weight, this draws
    one number from torch's global generator for CPUs.
    """
    if weight.is_meta or isinstance(weight, FakeTensor):
        return
    key = draw_seed()
    rows = max(1, BLOCK // max(math.prod(weight.shape[1:]), 1))
    part, held = (weight, None) if not hasattr(weight, "device_mesh") else (weight.to_local(), _held(weight))  # type: ignore[attr-defined]
    if not part.numel():
        return
    generator = torch.Generator(part.device)
    if held is None:
        for number, block in enumerate(weight.split(rows)):
            draw(block, generator=generator.manual_seed((key + number) % SEEDS))
        return
    for number in torch.unique(held[0] // rows).tolist():
        first, last = rows * number, min(rows * (number + 1), weight.shape[0])
        whole = torch.empty((last - first, *weight.shape[1:]), dtype=part.dtype, device=part.device)
        draw(whole, generator=generator.manual_seed((key + number) % SEEDS))
        mine = (held[0] >= first) & (held[0] < last)
        for dim, indices in enumerate((held[0][mine] - first, *held[1:])):
            whole = whole.index_select(dim, indices)
        part[mine] = whole


def fill_normal(weight: Tensor, std: float) -> None:
    """Fill a weight, which may be sharded, from a normal distribution with mean 0."""
    fill(weight, partial(nn.init.normal_, std=std))


def reset(module: nn.Module) -> None:
    """Initialize a module's parameters and buffers as its constructor does, with the same draws of random numbers.

    torch's linear layers and embeddings are filled here. Other modules use their own ``reset_parameters``, if they have
    one.
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


def draw_seed() -> int:
    """Draw a seed from torch's global generator for CPUs."""
    with unset_fake_temporarily():  # in a dry run, too, this is a number
        return int(torch.randint(SEEDS, (), device="cpu"))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block, seed torch's global generator for CPUs; afterwards, put its state back."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _held(weight: Tensor) -> list[Tensor]:
    """Return the indices of a sharded weight that this rank holds, for every dimension."""
    from torch.distributed.tensor import DTensor, Replicate  # imported late because it is slow

    mesh, placements, held = weight.device_mesh, weight.placements, []  # type: ignore[attr-defined]
    for dim, size in enumerate(weight.shape):
        shape = [size if other == dim else 1 for other in range(weight.dim())]
        indices = torch.arange(size, device=mesh.device_type).view(shape)
        own = [p if getattr(p, "dim", None) == dim else Replicate() for p in placements]
        whole = DTensor.from_local(indices, mesh, [Replicate()] * mesh.ndim, run_check=False)
        held.append(whole.redistribute(placements=own).to_local().flatten())
    return held
