"""Replays recorded loads on any number of ranks, under several ways to place experts.

S steps, L layers, E experts, P ranks. Every rank's tokens are taken to have the recorded load, so that only the
placement of experts makes ranks uneven; loads of real ranks differ more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import PlacementConfig
from ..placement import (
    Forecast,
    Owners,
    Replicas,
    busiest,
    calibrate,
    materialize,
    replicate,
    reshard,
    reshard_by_sum,
    rows_by_rank,
)


@dataclass(frozen=True)
class Machine:
    """Ranks, and what computing and sending cost them."""

    ranks: int
    node_size: int
    #: seconds to compute a routed row, forward and backward
    seconds_per_row: float
    #: bytes of an expert's weights; a copy travels once as weights and once as gradients
    expert_bytes: int
    #: bytes per second and rank, and seconds per message (the alpha-beta model)
    bandwidth: float
    latency: float

    @property
    def seconds_per_copy(self) -> float:
        """Time to send an expert's weights, and to get the gradients back."""
        return 2 * (self.latency + self.expert_bytes / self.bandwidth)

    @property
    def rows_per_copy(self) -> float:
        """Rows that are computed in the time of a copy."""
        return self.seconds_per_copy / self.seconds_per_row


class Placed(NamedTuple):
    """How a layer's experts are placed in a step, and how much of it delays the layer."""

    replicas: Replicas
    #: copies on the way before the layer needs them, whose transfer hides behind other work; None: all of them
    planned: Replicas | None = None


class Layer(NamedTuple):
    """What a method knows when it places a layer's experts in a step."""

    owners: Owners
    #: the load that is expected, and the one that comes; methods that act before routing may not look at it
    expected_E: Sequence[float] | None
    counts_PE: Tensor
    machine: Machine
    config: PlacementConfig
    #: replicas of a layer that a rank has room for
    room: int


def plain(layer: Layer) -> Placed:
    """Expert parallelism: every expert is computed by its owner."""
    return Placed(Replicas(layer.owners, node_size=layer.machine.node_size))


def to_all(layer: Layer) -> Placed:
    """FasterMoE: after routing, replicate the busiest experts on all ranks, one by one, as long as it pays."""
    best, ranks = plain(layer).replicas, range(layer.owners.ranks)
    loads_E, on = layer.counts_PE.sum(0), [list(r) for r in best.ranks_of_E]
    least = cost_of(layer, Placed(best, None))
    for expert in loads_E.argsort(descending=True, stable=True)[: layer.room].tolist():
        on[expert] = [rank for rank in ranks if rank != layer.owners.rank_of_E[expert]]
        tried = Replicas(layer.owners, on, layer.machine.node_size)
        cost = cost_of(layer, Placed(tried, plain(layer).replicas))
        if cost >= least:
            break
        best, least = tried, cost
    return Placed(best, plain(layer).replicas)


def least_loaded(layer: Layer) -> Placed:
    """Least-loaded expert parallelism (arXiv 2601.17111): after routing, busy ranks spill experts to idle ones.

    The busiest expert of the busiest rank gets a replica on the least busy rank, as long as it pays.
    """
    owned = plain(layer).replicas
    best, least = owned, cost_of(layer, Placed(owned, None))
    on, free_P = [list(r) for r in owned.ranks_of_E], [layer.room] * layer.owners.ranks
    loads_E = layer.counts_PE.sum(0).tolist()
    for _ in range(layer.room * layer.owners.ranks):
        rows_P = rows_by_rank(layer.counts_PE, best).tolist()
        busiest = max(range(len(rows_P)), key=lambda r: rows_P[r])
        expert = max(best.experts_of(busiest), key=lambda e: loads_E[e] / len(best.holders_of(e)))
        idle = [r for r in range(len(rows_P)) if free_P[r] and r not in best.holders_of(expert)]
        if not idle:
            break
        rank = min(idle, key=lambda r: rows_P[r])
        on[expert].append(rank)
        free_P[rank] -= 1
        tried = Replicas(layer.owners, on, layer.machine.node_size)
        cost = cost_of(layer, Placed(tried, owned))
        if cost >= least:
            break
        best, least = tried, cost
    return Placed(best, owned)


def sparse(layer: Layer) -> Placed:
    """FSSDP: before routing, replicate experts so that the busiest rank is expected to have the fewest rows."""
    if layer.expected_E is None:
        return plain(layer)
    found = materialize(layer.expected_E, layer.owners, layer.config.overlap, layer.room, layer.machine.node_size)
    return Placed(found, found)


def most_loaded(layer: Layer) -> Placed:
    """Hecate's Algorithm 1: before routing, replicate the experts that are expected to be the busiest."""
    if layer.expected_E is None:
        return plain(layer)
    chosen = busiest(layer.expected_E, layer.config.overlap)
    found = replicate(chosen, layer.expected_E, layer.owners, layer.room, layer.machine.node_size)
    return Placed(found, found)


def calibrated(layer: Layer) -> Placed:
    """FSSDP with calibration: after routing, add replicas where there is room, if that pays."""
    planned = sparse(layer).replicas
    overlap, per_copy = layer.config.overlap, layer.machine.rows_per_copy
    return Placed(calibrate(layer.counts_PE, planned, overlap, layer.room, per_copy), planned)


def exchanged(
    expected_LE: Sequence[Sequence[float]], owners: Sequence[Owners], overlap: int, memory: int, node_size: int
) -> list[Owners]:
    """SmartMoE: exchange the positions of experts, so that the expected load of ranks is even.

    The busiest expert goes first, each to the least busy rank. All ranks own equally many experts of a layer, up to
    one.
    """
    found = []
    for loads_E, before in zip(expected_LE, owners, strict=True):
        most = -(-len(loads_E) // before.ranks)
        load_P, number_P, rank_of_E = np.zeros(before.ranks), np.zeros(before.ranks, dtype=int), [0] * len(loads_E)
        for expert in sorted(range(len(loads_E)), key=lambda e: (-loads_E[e], e)):
            able = np.flatnonzero(number_P < most)
            rank = int(able[np.argmin(load_P[able])])
            rank_of_E[expert] = rank
            load_P[rank] += loads_E[expert]
            number_P[rank] += 1
        found.append(Owners.of_ranks(before.ranks, rank_of_E))
    return found


class Method(NamedTuple):
    """A way to place experts."""

    #: chooses replicas in every step
    place: Callable[[Layer], Placed]
    #: chooses new owners every ``reshard_every`` steps, as :func:`equimoe.moe.placement.reshard` does
    move: Callable[..., list[Owners]] | None = None


METHODS: dict[str, Method] = {
    "expert parallel": Method(plain),
    "replicate to all (FasterMoE)": Method(to_all),
    "exchange positions (SmartMoE)": Method(plain, exchanged),
    "least loaded (LLEP)": Method(least_loaded),
    "replicate the busiest (Hecate)": Method(most_loaded, reshard_by_sum),
    "FSSDP": Method(sparse, reshard),
    "FSSDP, calibrated": Method(calibrated, reshard),
}


@dataclass(frozen=True)
class Outcome:
    """What a method costs, on average over steps and layers."""

    #: rows of the busiest rank over the mean, and its largest value
    straggler: float
    straggler_max: float
    #: bytes of copies between all ranks, per layer and step
    copied_bytes: float
    #: bytes of replicas on the rank with the most, the largest value
    replica_bytes: float
    #: bytes of weights and moments that new owners get, per layer and step
    moved_bytes: float
    #: seconds of the experts of a layer in a step, with the copies that delay it
    seconds: float
    #: the first of these for each step, the mean over layers
    curve: list[float]
    #: owners of each layer's experts after the last step
    owners: list[Owners]


def replay(
    counts_SLE: Tensor, method: Method, machine: Machine, config: PlacementConfig, states: float = 4.0
) -> Outcome:
    """Replay recorded choices int64 [S, L, E] of all ranks. An owner holds ``states`` times an expert's weights."""
    forecast = Forecast(config.window)
    layers, experts = counts_SLE.shape[1:]
    owners = [Owners.spread(experts, machine.ranks)] * layers
    room = config.replicas_per_rank(machine.expert_bytes)
    rows: list[tuple[float, float, float, float]] = []
    moved = 0.0
    for step, counts_LE in enumerate(counts_SLE):
        expected_LE = None if forecast.loads_LE is None else forecast.loads_LE.tolist()
        if method.move and expected_LE is not None and config.reshard_every and step % config.reshard_every == 0:
            before, owners = owners, method.move(expected_LE, owners, config.overlap, room, machine.node_size)
            ranks = ([rank for of in layers for rank in of.rank_of_E] for layers in (before, owners))
            moved += sum(a != b for a, b in zip(*ranks, strict=True)) * machine.expert_bytes * states
        for i, counts_E in enumerate(counts_LE):
            expected_E = None if expected_LE is None else expected_LE[i]
            layer = Layer(owners[i], expected_E, divided(counts_E, machine.ranks), machine, config, room)
            placed = method.place(layer)
            rows_P = rows_by_rank(layer.counts_PE, placed.replicas).double()
            factor = float(rows_P.max() / rows_P.mean().clamp_min(1e-300))
            held = [len(placed.replicas.experts_of(r)) - len(owners[i].experts_of(r)) for r in range(machine.ranks)]
            copied = 2.0 * len(placed.replicas) * machine.expert_bytes
            rows.append((factor, copied, max(held) * machine.expert_bytes, cost_of(layer, placed)))
        forecast.observe(counts_LE)
    table = np.array(rows)
    straggler, copied_bytes, _, seconds = table.mean(0)
    return Outcome(
        float(straggler),
        float(table[:, 0].max()),
        float(copied_bytes),
        float(table[:, 2].max()),
        moved / len(table),
        float(seconds),
        table[:, 0].reshape(len(counts_SLE), layers).mean(1).tolist(),
        owners,
    )


def divided(counts_E: Tensor, ranks: int) -> Tensor:
    """Divide choices evenly over ranks: int64 [P, E]. What remains goes to different ranks for different experts."""
    rank_P1, expert_E = torch.arange(ranks)[:, None], torch.arange(len(counts_E))
    return (counts_E + (expert_E - rank_P1) % ranks) // ranks


def cost_of(layer: Layer, placed: Placed) -> float:
    """Return the seconds of a layer's experts in a step: those of the busiest rank, and of copies that delay it.

    A rank's copies, sent or received, follow each other. ``overlap`` of those that were planned hide behind other work;
    copies that were chosen after routing hide behind nothing.
    """
    replicas, machine = placed.replicas, layer.machine
    planned = replicas if placed.planned is None else placed.planned
    early, all_copies = _copies(planned), _copies(replicas)
    exposed = float((np.maximum(early - layer.config.overlap, 0) + (all_copies - early)).max())
    busiest = float(rows_by_rank(layer.counts_PE, replicas).max())
    return busiest * machine.seconds_per_row + exposed * machine.seconds_per_copy


def _copies(replicas: Replicas) -> np.ndarray:
    """Return how many copies each rank sends or receives, whichever is more."""
    ranks = replicas.owners.ranks
    sent, received = np.zeros(ranks), np.zeros(ranks)
    for expert, holders in enumerate(replicas.ranks_of_E):
        sent[replicas.owners.rank_of_E[expert]] += len(holders)
        received[list(holders)] += 1
    return np.maximum(sent, received)
