"""Grows dense models into MoE models: their feed-forwards become experts.

- Sparse upcycling (arXiv 2212.05055): every expert is a copy, and the router is random.
- Fine-grained upcycling (arXiv 2410.07524): a copy is cut into G experts of 1/G of the width. Their rows of the router
  are equal at first ("virtual group"), so that the top K consist of whole copies.
- Drop-Upcycling (arXiv 2502.19261): in every expert, a share of the channels is drawn again, from a normal distribution
  with mean and deviation of the values that it replaces.
- Branch-Train-MiX (arXiv 2403.07816): several models, trained apart, give one expert or more each; their other weights
  are averaged.

E experts, K top-k, D hidden, F expert width, G experts per copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..checkpoint.tools import Reader
from ..config import MoEConfig, RouterConfig
from .architecture import Architecture, canonical
from .computed import Box, Computed, FeedForwards, Kind, generator, inner, mean, normal, router_row, saved, share_of
from .convert import small_files_of_new, write_first
from .hf import Weights
from .merge import same_models


@dataclass(frozen=True)
class Recipe:
    """How dense feed-forwards become experts."""

    num_experts: int
    top_k: int
    #: number of experts into which each copy of a feed-forward is cut
    granularity: int = 1
    #: share of the channels of each expert that is drawn again; 0: none
    ratio: float = 0.0
    #: divide the K gate weights of a token by their sum
    normalize_weights: bool = True
    #: the matrices whose scale makes up for gate weights. linear: up and down, which is exact; all: the gate
    #: projection too, as published, which is exact only for activations like ReLU
    scaled: Literal["linear", "all"] = "linear"
    moe_every: int = 1
    dense_layers: int = 0
    seed: int = 0

    def scale(self) -> float:
        """Return the factor by which experts must exceed a dense model's, so that outputs stay the same.

        A token's K gate weights sum to 1, or to about K / E if they are not normalised, and each copy consists of G
        experts.
        """
        g = self.granularity
        return float(g) if self.normalize_weights else self.num_experts * g / self.top_k

    def factors(self) -> dict[Kind, float]:
        """Return the factor of each matrix. Their product is :meth:`scale`."""
        scale = self.scale()
        if self.scaled == "all":
            return dict.fromkeys(("gate", "up", "down"), scale ** (1 / 3))
        return {"gate": 1.0, "up": math.sqrt(scale), "down": math.sqrt(scale)}

    def grown(self, dense: Architecture, models: int = 1) -> Architecture:
        """Return the architecture that ``models`` dense models become. Raises ValueError if they cannot."""
        g, width = self.granularity, dense.intermediate_size
        if width is None or any(dense.is_moe(block) for block in range(dense.num_layers)):
            raise ValueError("has MoE layers already; give a model whose feed-forwards are all dense")
        if g < 1 or width % g:
            raise ValueError(f"--granularity={g}: must divide the width of the feed-forwards, {width}")
        if self.num_experts < 1:
            raise ValueError(f"--experts={self.num_experts}: must be at least 1; 8 is usual")
        if self.num_experts % (g * models):
            what = f"--granularity={g}" if models == 1 else f"the number of models, {models}, times --granularity={g}"
            raise ValueError(f"--experts={self.num_experts}: must be a multiple of {what}")
        if self.top_k < 1 or self.top_k % g:
            raise ValueError(
                f"--top-k={self.top_k}: must be a multiple of --granularity={g}, so that a token gets whole copies"
            )
        if self.top_k == 1 < self.num_experts and self.normalize_weights:
            raise ValueError("--top-k=1: normalised gate weights would all be 1; use --plain-gates, or more experts")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"--ratio={self.ratio}: must be between 0 and 1; 0.5 is usual")
        if self.top_k > self.num_experts:
            raise ValueError(f"--top-k={self.top_k}: must be at most --experts={self.num_experts}")
        if self.dense_layers < 0:
            raise ValueError(f"--dense-layers={self.dense_layers}: must not be negative")
        if self.moe_every < 1:
            raise ValueError(f"--moe-every={self.moe_every}: must be at least 1; 1 means every block")
        router = RouterConfig(normalize_weights=self.normalize_weights)
        moe = MoEConfig(dense.moe.hidden_size, width // g, self.num_experts, self.top_k, router)
        found = replace(dense, moe=moe, moe_every=self.moe_every, dense_layers=self.dense_layers, expert_bias=False)
        if not any(found.is_moe(block) for block in range(found.num_layers)):
            raise ValueError(
                f"--dense-layers={self.dense_layers}: with --moe-every={self.moe_every}, none of the "
                f"{found.num_layers} blocks becomes MoE; lower one of them"
            )
        return canonical(found)


def upcycle(sources: Sequence[Weights], recipe: Recipe, out: Path, files: int | None = None) -> Path:
    """Grow dense models of one architecture into an MoE model, written as a checkpoint of step 0 in folder ``out``.

    Returns its path. Raises ValueError if the models do not fit together or do not fit the recipe.
    """
    same_models(sources)
    try:
        model = recipe.grown(sources[0].architecture, len(sources))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith("-") else f"{sources[0].path}: {text}") from None
    with ExitStack() as stack:
        readers = [stack.enter_context(source.reader()) for source in sources]
        values = Upcycled(readers, recipe, model)
        return write_first(
            values, values.wanted, model, out, files, str(sources[0].path), small_files_of_new(sources[0], model)
        )


class Upcycled(Computed):
    """The tensors of the grown model."""

    def __init__(self, readers: Sequence[Reader], recipe: Recipe, model: Architecture) -> None:
        self.readers, self.recipe, self.moe = readers, recipe, model.moe
        self.wanted = {}
        experts, hidden, width = model.moe.num_experts, model.moe.hidden_size, model.moe.intermediate_size
        shapes = {
            "router.weight": (experts, hidden),
            "experts.gate_up_proj": (experts, 2 * width, hidden),
            "experts.down_proj": (experts, hidden, width),
        }
        #: name of a tensor of an MoE layer -> what it is, and the prefix of the dense feed-forward's tensors
        self.made: dict[str, tuple[str, str]] = {}
        for name, entry in readers[0].saved.items():
            prefix, mlp, _ = name.partition(".mlp.")
            if not (mlp and model.is_moe(int(prefix.rpartition(".")[2]))):
                self.wanted[name] = saved(entry.shape)
                continue
            for leaf, shape in shapes.items():
                self.wanted[f"{prefix}{mlp}{leaf}"] = saved(shape)
                self.made[f"{prefix}{mlp}{leaf}"] = leaf, prefix + mlp
        self.experts = Experts(readers, recipe, model.moe)

    def box(self, name: str, offsets: Box, sizes: Box) -> Tensor:
        if name not in self.made:
            return mean(self.readers, name, offsets, sizes)
        leaf, prefix = self.made[name]
        numbers = range(offsets[0], offsets[0] + sizes[0])
        part = inner(offsets[1:], sizes[1:])
        if leaf == "router.weight":
            return torch.stack([self.router(prefix, expert)[part] for expert in numbers])
        rows = self.experts.gate_up if leaf == "experts.gate_up_proj" else self.experts.down
        return torch.stack([rows(prefix, expert, part[0])[:, part[1]] for expert in numbers])

    def router(self, prefix: str, expert: int) -> Tensor:
        """Return an expert's row of a router. The experts of a copy have the same."""
        return router_row(self.recipe.seed, prefix, expert // self.recipe.granularity, self.moe.hidden_size)


class Experts:
    """The experts' matrices, row by row.

    Expert e is part ``e % G`` of copy ``e // G``.
    """

    def __init__(self, readers: Sequence[Reader], recipe: Recipe, moe: MoEConfig) -> None:
        self.recipe, self.moe, self.models = recipe, moe, len(readers)
        self.factors, self.dense = recipe.factors(), FeedForwards(readers)

    def gate_up(self, prefix: str, expert: int, rows: slice) -> Tensor:
        """Return rows of an expert's gate and up projection, which follow each other."""
        width = self.moe.intermediate_size
        found = []
        kinds: tuple[Kind, Kind] = ("gate", "up")
        for kind, first in zip(kinds, (0, width), strict=True):
            begin, end = max(rows.start - first, 0), min(rows.stop - first, width)
            if begin < end:
                found.append(self._rows(kind, prefix, expert, begin, end))
        return torch.cat(found)

    def down(self, prefix: str, expert: int, rows: slice) -> Tensor:
        """Return rows of an expert's down projection."""
        return self._rows("down", prefix, expert, rows.start, rows.stop)

    def dropped(self, prefix: str, expert: int) -> Tensor:
        """Return the channels of an expert that are drawn again: the same in its three matrices."""
        width = self.moe.intermediate_size
        draws = generator(self.recipe.seed, f"{prefix}{expert} channels")
        return torch.randperm(width, generator=draws)[: share_of(self.recipe.ratio, width)].sort().values

    def _rows(self, kind: Kind, prefix: str, expert: int, first: int, last: int) -> Tensor:
        dense = self._part(kind, prefix, expert)
        rows = dense[first:last] * self.factors[kind]
        channels = self.dropped(prefix, expert)
        if not len(channels):
            return rows
        by_row = kind != "down"
        replaced = (dense[channels] if by_row else dense[:, channels]).double() * self.factors[kind]
        name = f"{prefix}{expert} {kind}"
        drawn = normal(self.recipe.seed, name, first, last, dense.shape[1]).double()
        drawn = (replaced.mean() + replaced.std(correction=0) * drawn).float()
        if by_row:
            mine = channels[(channels >= first) & (channels < last)] - first
            rows[mine] = drawn[mine]
        else:
            rows[:, channels] = drawn[:, channels]
        return rows

    def _part(self, kind: Kind, prefix: str, expert: int) -> Tensor:
        """Return an expert's part of a dense matrix."""
        part, width = expert % self.recipe.granularity, self.moe.intermediate_size
        copies = self.moe.num_experts // self.recipe.granularity
        model = expert // self.recipe.granularity * self.models // copies
        return self.dense.matrix(kind, prefix, model).narrow(1 if kind == "down" else 0, part * width, width)
