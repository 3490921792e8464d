"""Decides which experts are replicated in a step, from loads.

Pure functions: the same loads give the same answer on every rank. From Hecate, "Unlocking Efficient Sparse Model
Training via Fully Sharded Sparse Data Parallelism". L layers, E experts, P ranks, W steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..transfer import Reading
from .owners import Owners
from .replicas import Replicas


class Forecast:
    """The load that the next step is expected to have: the mean of the last ``window`` steps."""

    def __init__(self, window: int) -> None:
        self._steps: deque[Reading] = deque(maxlen=window)

    def observe(self, counts_LE: Tensor) -> None:
        """Add the choices of a step on all ranks, int64 [L, E]. The host waits for them when they are first needed."""
        self._steps.append(Reading(counts_LE))

    @property
    def steps(self) -> list[Tensor]:
        """The choices of the last steps, int64 [L, E] each, on the host."""
        return [step.get() for step in self._steps]

    @property
    def loads_LE(self) -> Tensor | None:
        """fp64 [L, E]; None before the first step. Sums are of integers, so all ranks have the same bits."""
        return torch.stack(self.steps).sum(0).double() / len(self._steps) if self._steps else None


def busiest(loads_E: Sequence[float], number: int) -> list[int]:
    """Return the ``number`` busiest experts, the busiest first, ties by number; those without load are left out."""
    order = sorted(range(len(loads_E)), key=lambda expert: (-loads_E[expert], expert))
    return [expert for expert in order[:number] if loads_E[expert] > 0]


def materialize(loads_E: Sequence[float], owners: Owners, overlap: int, memory: int, node_size: int) -> Replicas:
    """Choose the replicas of a layer in a step.

    ``overlap`` is the number of experts whose transfer hides behind other work of the layer, ``memory`` the number of
    replicas that a rank has room for. One expert after another is replicated: the busiest of the rank that is then
    expected to be the busiest. The number with which the busiest rank gets the fewest rows is kept, so an even load is
    left alone. Hecate's Algorithm 1 replicates the ``overlap`` busiest experts instead, whether that helps or not.
    """
    best = Replicas(owners, None, node_size, loads_E)
    rows_P, chosen = expected_rows(loads_E, best), list[int]()
    least = rows_P.max()
    for _ in range(overlap):
        candidates = [e for e in owners.experts_of(int(rows_P.argmax())) if loads_E[e] > 0 and e not in chosen]
        if not candidates:
            break
        chosen.append(max(candidates, key=lambda expert: (loads_E[expert], -expert)))
        tried = replicate(chosen, loads_E, owners, memory, node_size)
        rows_P = expected_rows(loads_E, tried)
        if rows_P.max() < least:
            best, least = tried, rows_P.max()
    return best


def replicate(chosen: Sequence[int], loads_E: Sequence[float], owners: Owners, memory: int, node_size: int) -> Replicas:
    """Choose the ranks that get replicas of the ``chosen`` experts: Algorithm 1.

    All do if they have room for all of these experts. Otherwise, replicas are divided in proportion to the load, the
    first expert's first, and nodes that lack an expert come first.
    """
    ranks, memory = owners.ranks, min(memory, len(chosen))
    on: list[list[int]] = [[] for _ in loads_E]
    if len(chosen) <= memory:
        for expert in chosen:
            on[expert] = [rank for rank in range(ranks) if rank != owners.rank_of_E[expert]]
        return Replicas(owners, on, node_size, loads_E)
    free_P = np.full(ranks, memory)
    total = sum(loads_E[expert] for expert in chosen)
    for expert in chosen:
        number = int(ranks * memory * loads_E[expert] / total + 0.5)
        on[expert] = spread(number, owners.rank_of_E[expert], free_P, node_size)
        free_P[on[expert]] -= 1
    return Replicas(owners, on, node_size, loads_E)


def expected_rows(loads_E: Sequence[float], replicas: Replicas) -> np.ndarray:
    """Return how many rows each rank computes, fp64 [P], if the tokens of all ranks have the same load."""
    owners, node_size = replicas.owners, replicas.node_size
    rows_P = np.bincount(owners.rank_of_E, weights=loads_E, minlength=owners.ranks)
    node_P = np.arange(owners.ranks) // node_size
    ranks_N = np.bincount(node_P)
    for expert, others in enumerate(replicas.ranks_of_E):
        if others:
            holders = np.array(replicas.holders_of(expert))
            holders_N = np.bincount(node_P[holders], minlength=len(ranks_N))
            far = ranks_N[holders_N == 0].sum() / len(holders)  # ranks whose node has no holder go to all of them
            near = (ranks_N / np.maximum(holders_N, 1))[node_P[holders]]
            rows_P[owners.rank_of_E[expert]] -= loads_E[expert]
            rows_P[holders] += (near + far) * (loads_E[expert] / owners.ranks)
    return rows_P


def spread(number: int, owner: int, free_P: np.ndarray, node_size: int) -> list[int]:
    """Choose up to ``number`` ranks with a free slot for replicas of an expert.

    Nodes that lack the expert come first, then those with the most free slots; within a node, ranks with the most.
    """
    ranks_P = np.arange(len(free_P))
    node_P = ranks_P // node_size
    possible_P = (free_P > 0) & (ranks_P != owner)
    node_free_P = np.bincount(node_P, weights=free_P)[node_P]
    within = np.lexsort((ranks_P, -free_P, ~possible_P, node_P))  # by node, and within it by free slots
    round_P = np.empty_like(ranks_P)
    round_P[within] = ranks_P - node_P * node_size  # how many of its node come before it
    round_P += node_P == owner // node_size
    order = np.lexsort((ranks_P, node_P, -node_free_P, round_P))
    return [int(rank) for rank in order if possible_P[rank]][:number]


def rows_by_rank(counts_PE: Tensor, replicas: Replicas) -> Tensor:
    """Return how many rows each rank computes, int64 [P], if rank p's tokens make ``counts_PE[p]`` choices."""
    counts, owners = counts_PE.cpu().numpy(), replicas.owners
    ranks_P = np.arange(owners.ranks)
    same_node_PP = ranks_P[:, None] // replicas.node_size == ranks_P // replicas.node_size
    rows_P = np.bincount(owners.rank_of_E, weights=counts.sum(0), minlength=owners.ranks).astype(np.int64)
    for expert, others in enumerate(replicas.ranks_of_E):
        if not others:
            continue
        counts_P = counts[:, expert]
        rows_P[owners.rank_of_E[expert]] -= counts_P.sum()
        # [source, holder]: the rules of Replicas.choices_of
        holds_P = np.isin(ranks_P, replicas.holders_of(expert))
        near_PP = same_node_PP & holds_P
        to_PP = np.where(near_PP.any(1)[:, None], near_PP, holds_P)
        to_PP[holds_P] = np.eye(owners.ranks, dtype=bool)[holds_P]
        number_P1 = to_PP.sum(1)[:, None]
        turn_PP = (to_PP.cumsum(1) - 1 - ranks_P[:, None]) % number_P1
        rows_P += (to_PP * ((counts_P[:, None] + number_P1 - 1 - turn_PP) // number_P1)).sum(0)
    return torch.from_numpy(rows_P)


def calibrate(counts_PE: Tensor, planned: Replicas, overlap: int, memory: int, rows_per_expert: float) -> Replicas:
    """Return the replicas for the load that a layer's routing really has, or ``planned`` if they are not worth it.

    ``counts_PE`` are the choices that each rank's tokens made. The planned replicas stay; where ranks have room left,
    further ones are chosen for the load per holder. They delay the layer, because their transfer hides behind nothing:
    they are accepted if the busiest rank saves more rows than it could compute during that, ``rows_per_expert`` for
    each replica that a rank sends or receives.
    """
    owners, loads_E = planned.owners, counts_PE.sum(0).tolist()
    shares_E = [load / len(planned.holders_of(expert)) for expert, load in enumerate(loads_E)]
    free_P = np.full(owners.ranks, memory)
    on = [list(ranks) for ranks in planned.ranks_of_E]
    for ranks in on:
        free_P[ranks] -= 1
    best, least = planned, int(rows_by_rank(counts_PE, planned).max())
    moved_P = np.zeros(owners.ranks)
    for expert in busiest(shares_E, overlap):
        possible_P = free_P * ~np.isin(np.arange(owners.ranks), on[expert])
        new = spread(owners.ranks, owners.rank_of_E[expert], possible_P, planned.node_size)
        on[expert] += new
        free_P[new] -= 1
        moved_P[new] += 1
        moved_P[owners.rank_of_E[expert]] += len(new)
        tried = Replicas(owners, on, planned.node_size, planned.expected_E, planned)
        cost = int(rows_by_rank(counts_PE, tried).max()) + rows_per_expert * float(moved_P.max())
        if cost < least:
            best, least = tried, int(cost)
    return best
