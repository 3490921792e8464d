"""Merges the weights of models of one architecture: averages, and Assembly of Experts (arXiv 2506.14794).

E experts, F expert width, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..checkpoint.tools import Reader
from .computed import Box, Computed, inner, saved
from .convert import small_files, write_first
from .hf import Weights


@dataclass(frozen=True)
class Assembly:
    """Which tensors of a model become a weighted sum of those of several models; the others are the first model's."""

    #: a weight per model; they sum to 1
    weights: Sequence[float]
    #: the tensors that are merged: those of the routed experts, or all but the routers'
    tensors: Literal["experts", "all"] = "experts"
    #: merge the routers too
    routers: bool = False
    #: merge only the matrices in which some model's root mean square difference from the first model is larger. An
    #: expert's gate, up and down projections are matrices of their own. None: merge all
    threshold: float | None = None

    def check(self, models: int) -> None:
        """Raise ValueError unless the assembly fits the number of models."""
        if models < 2:
            raise ValueError(f"{models} model: give at least two models to merge")
        given = " ".join(f"{weight:g}" for weight in self.weights)
        if len(self.weights) != models:
            raise ValueError(f"--weights={given}: must be one per model, {models}")
        if not abs(math.fsum(self.weights) - 1) < 1e-6:
            raise ValueError(f"--weights={given}: must sum to 1")
        if self.threshold is not None and not self.threshold >= 0:
            raise ValueError(f"--threshold={self.threshold}: must not be negative")

    def merges(self, name: str) -> bool:
        """Return whether a tensor is merged."""
        if ".mlp.router." in name:
            return self.routers
        return self.tensors == "all" or ".mlp.experts." in name


def average(models: int) -> Assembly:
    """Return the assembly that averages all tensors of models (Branch-Train-Merge, arXiv 2208.03306)."""
    return Assembly((1 / models,) * models, "all", routers=True)


def merge(sources: Sequence[Weights], how: Assembly, out: Path, files: int | None = None) -> Path:
    """Write a merged model as a checkpoint of step 0 in folder ``out``; return its path.

    ``out`` also gets the small files of the first model, for an export.
    """
    how.check(len(sources))
    same_models(sources)
    base = sources[0]
    if how.tensors == "experts" and not any(map(how.merges, base.tensors)):
        raise ValueError(f"{base.path}: has no MoE layers; use --tensors all")
    with ExitStack() as stack:
        values = Merged([stack.enter_context(source.reader()) for source in sources], how)
        return write_first(values, values.wanted, base.architecture, out, files, str(base.path), small_files(base))


def same_models(sources: Sequence[Weights]) -> None:
    """Raise ValueError unless all models have the same architecture."""
    first = sources[0]
    for other in sources[1:]:
        if other.architecture == first.architecture:
            continue
        mine, theirs = _facts(first.architecture), _facts(other.architecture)
        name = next(name for name, value in mine.items() if theirs[name] != value)
        raise ValueError(
            f"{other.path}: has {name}={theirs[name]}, but {first.path} has {mine[name]}; give models of equal "
            "architecture"
        )


def _facts(architecture: object) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in vars(architecture).items():
        found |= {f"{name}.{n}": v for n, v in vars(value).items()} if name in ("moe", "attention") else {name: value}
    return found


class Merged(Computed):
    """The tensors of a merged model."""

    def __init__(self, readers: Sequence[Reader], how: Assembly) -> None:
        self.readers, self.how = readers, how
        self.wanted = {name: saved(entry.shape) for name, entry in readers[0].saved.items()}
        self._differs: dict[tuple[str, Box], bool] = {}

    def box(self, name: str, offsets: Box, sizes: Box) -> Tensor:
        if not self.how.merges(name):
            return self.readers[0].box(name, offsets, sizes).float()
        if self.how.threshold is None:
            return self._sum(name, offsets, sizes)
        found = torch.empty(sizes)
        for at, count in _matrices(name, self.wanted[name].shape):
            first = tuple(map(max, offsets, at))
            last = tuple(min(o + n, a + c) for o, n, a, c in zip(offsets, sizes, at, count, strict=True))
            if not all(begin < end for begin, end in zip(first, last, strict=True)):
                continue
            part = tuple(end - begin for begin, end in zip(first, last, strict=True))
            within = inner(tuple(begin - o for begin, o in zip(first, offsets, strict=True)), part)
            if self._different(name, at, count):
                found[within] = self._sum(name, first, part)
            else:
                found[within] = self.readers[0].box(name, first, part).float()
        return found

    def _sum(self, name: str, offsets: Box, sizes: Box) -> Tensor:
        total = torch.zeros(sizes, dtype=torch.float64)
        for reader, weight in zip(self.readers, self.how.weights, strict=True):
            if weight:
                total += weight * reader.box(name, offsets, sizes).double()
        return total.float()

    def _different(self, name: str, offsets: Box, sizes: Box) -> bool:
        """Return whether any model's matrix differs from the first model's by more than the threshold."""
        if (name, offsets) not in self._differs:
            largest = max(self._difference(reader, name, offsets, sizes) for reader in self.readers[1:])
            self._differs[name, offsets] = self.how.threshold is not None and largest > self.how.threshold
        return self._differs[name, offsets]

    def _difference(self, reader: Reader, name: str, offsets: Box, sizes: Box) -> float:
        squares = (
            float((other.double() - base.double()).square().sum())
            for other, base in zip(
                reader.blocks(name, offsets, sizes), self.readers[0].blocks(name, offsets, sizes), strict=True
            )
        )
        return math.sqrt(math.fsum(squares) / max(1, math.prod(sizes)))


def _matrices(name: str, shape: Box) -> Iterator[tuple[Box, Box]]:
    """Yield the boxes of a tensor that are compared as a whole: an expert's projections are matrices of their own."""
    if ".mlp.experts." not in name:
        yield (0,) * len(shape), shape
        return
    experts, rows, columns = shape
    parts = 2 if name.endswith("gate_up_proj") else 1
    for expert in range(experts):
        for part in range(parts):
            yield (expert, part * rows // parts, 0), (1, rows // parts, columns)
