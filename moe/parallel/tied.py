"""Weights that a model uses in several places: they stay one weight when the model is split, or are refused."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def tied_weights(model: nn.Module) -> list[list[str]]:
    """The names of each weight that has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return [found for found in names.values() if len(found) > 1]


def check_stages(tied: Iterable[list[str]], stages: list[nn.Module]) -> None:
    """Refuse weights that lie in several ``stages`` of a pipeline: each would train a copy of its own."""
    owned = [dict(stage.named_parameters(remove_duplicate=False)) for stage in stages]
    for names in tied:
        where = {name: next(i for i, stage in enumerate(owned) if name in stage) for name in names}
        first, number = next(iter(where.items()))
        other = next((name for name, stage in where.items() if stage != number), None)
        if other is not None:
            raise ValueError(
                f"{first} and {other} are one weight, in stages {number} and {where[other]} of a pipeline, which would "
                f"train them apart; give each its own weight, or set parallel.pp=1"
            )


def tie_again(model: nn.Module, tied: Iterable[list[str]]) -> None:
    """Make one weight of each again, after every place has been split for itself.

    Raises ValueError where they were not split alike.
    """
    for first, *others in tied:
        if first not in (there := dict(model.named_parameters(remove_duplicate=False))):
            continue  # of another stage
        weight = there[first]
        for name in others:
            if there[name] is weight:
                continue
            if not _split_alike(weight, there[name]):
                raise ValueError(
                    f"{first} and {name} are one weight, and tensor or expert parallelism splits them in different "
                    "ways; give each its own weight, or set parallel.tp=1, parallel.ep=1 and parallel.etp=1"
                )
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, weight)


def check_units(model: nn.Module, tied: Iterable[list[str]], units: Iterable[nn.Module]) -> None:
    """Refuse weights in several of the ``units`` that FSDP gathers apart (an inner one wins).

    ``model`` itself is the unit of what lies in no other.
    """
    ids = {id(unit) for unit in units}
    named = [(f"{name}.", id(m)) for name, m in model.named_modules(remove_duplicate=False) if id(m) in ids]
    named.sort(key=lambda of: -len(of[0]))
    for first, *others in tied:
        unit_of = {n: next((unit for prefix, unit in named if n.startswith(prefix)), 0) for n in (first, *others)}
        other = next((name for name in others if unit_of[name] != unit_of[first]), None)
        if other is not None:
            raise ValueError(
                f"{first} and {other} are one weight, which FSDP would gather for the one and free for the other; "
                "give each its own weight, or set parallel.data_parallel='ddp'"
            )


def _split_alike(one: torch.Tensor, two: torch.Tensor) -> bool:
    if not (isinstance(one, DTensor) and isinstance(two, DTensor)):
        return False  # plain weights are still one; of a plain and a split one there is no telling
    return one.device_mesh == two.device_mesh and one.placements == two.placements and one.shape == two.shape
