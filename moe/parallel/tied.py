"""Keeps tied weights (one weight used in several places) tied when a model is split, or raises."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def tied_weights(model: nn.Module) -> list[list[str]]:
    """Return the names of each weight that has more than one name."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return [found for found in names.values() if len(found) > 1]


def check_stages(tied: Iterable[list[str]], stages: list[nn.Module]) -> None:
    """Raise ValueError for a tied weight that is in several pipeline ``stages``: each would train its own copy."""
    owned = [dict(stage.named_parameters(remove_duplicate=False)) for stage in stages]
    for names in tied:
        where = {name: next(i for i, stage in enumerate(owned) if name in stage) for name in names}
        first, number = next(iter(where.items()))
        other = next((name for name, stage in where.items() if stage != number), None)
        if other is not None:
            raise ValueError(
                f"{first} and {other} are one weight, in stages {number} and {where[other]} of a pipeline, which would "
                f"train two copies of it; give each its own weight, or set parallel.pp=1"
            )


def tie_again(model: nn.Module, tied: Iterable[list[str]]) -> None:
    """Tie weights again after each place where they are used has been split separately.

    Raises ValueError if the places were split in different ways.
    """
    for first, *others in tied:
        if first not in (own := dict(model.named_parameters(remove_duplicate=False))):
            continue  # in another pipeline stage
        weight = own[first]
        for name in others:
            if own[name] is weight:
                continue
            if not _split_alike(weight, own[name]):
                raise ValueError(
                    f"{first} and {name} are one weight, and tensor or expert parallelism splits them in different "
                    "ways; give each its own weight, or set parallel.tp=1, parallel.ep=1 and parallel.etp=1"
                )
            _put(model, name, weight)


def materialize(parts: Sequence[nn.Module], device: torch.device) -> None:
    """Move model parts from the meta device, where they were built and split, to ``device``.

    They get the random weights that a whole model gets if it is built in the present state of torch's random generator
    for CPUs. Raises ValueError for a part without ``reset_parameters``, which fills its weights.
    """
    state = torch.get_rng_state()
    for part in parts:
        fill = getattr(part, "reset_parameters", None)
        if not callable(fill):
            what = f"{type(part).__name__} is on the meta device and has no method reset_parameters"
            raise ValueError(f"model: {what}; build it on the device, or add the method, which fills all weights")
        allocate(part, device)
        torch.set_rng_state(state)
        fill()


def allocate(part: nn.Module, device: torch.device) -> None:
    """Move a model part from the meta device to ``device``, with any values; a tied weight stays one weight."""
    tied = tied_weights(part)
    part.to_empty(device=device)
    for first, *others in tied:
        for name in others:
            _put(part, name, dict(part.named_parameters(remove_duplicate=False))[first])


def check_units(model: nn.Module, tied: Iterable[list[str]], units: Iterable[nn.Module]) -> None:
    """Raise ValueError for a tied weight that is in several of the ``units`` that FSDP gathers separately.

    A weight belongs to the innermost unit that contains it, and to ``model`` if no unit does.
    """
    ids = {id(unit) for unit in units}
    named = [(f"{name}.", id(m)) for name, m in model.named_modules(remove_duplicate=False) if id(m) in ids]
    named.sort(key=lambda of: -len(of[0]))
    for first, *others in tied:
        unit_of = {n: next((unit for prefix, unit in named if n.startswith(prefix)), 0) for n in (first, *others)}
        other = next((name for name in others if unit_of[name] != unit_of[first]), None)
        if other is not None:
            raise ValueError(
                f"{first} and {other} are one weight, but FSDP gathers and frees the two places separately; "
                "give each its own weight, or set parallel.data_parallel='ddp'"
            )


def _put(model: nn.Module, name: str, weight: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, weight)


def _split_alike(one: torch.Tensor, two: torch.Tensor) -> bool:
    if not (isinstance(one, DTensor) and isinstance(two, DTensor)):
        return False  # two plain weights would still be tied; a plain and a split one cannot be compared
    return one.device_mesh == two.device_mesh and one.placements == two.placements and one.shape == two.shape
