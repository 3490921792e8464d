"""Decides which rank owns which expert, from loads.

Pure functions: the same loads give the same answer on every rank. L layers, E experts, P ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .owners import Owners
from .plan import busiest, expected_rows, materialize

#: rows of the busiest rank, over the mean, that are not worth a move or a replica: forecasts err by more
NEGLIGIBLE = 0.02


def reshard(
    loads_LE: Sequence[Sequence[float]], owners: Sequence[Owners], overlap: int, memory: int, node_size: int
) -> list[Owners]:
    """Choose new owners for the experts of all layers, so that ranks wait less for each other.

    Ranks exchange tokens in every layer, so a step waits for the busiest rank of every layer: what counts is the sum
    over layers of its rows, with the replicas that :func:`materialize` would make. (An even sum over layers of each
    rank's load, as in :func:`reshard_by_sum`, does not help: a rank that waits in one layer does not catch up in
    another.) A rank may own any number of a layer's experts, but of all layers together at most as many as the others,
    up to one, so that no rank needs more memory.

    Layers choose one after another, that with the busiest expert first: the present owners, these after exchanges of
    single experts, or those that :func:`_evened` finds if 0, 1, ... ``overlap`` experts are replicated. Each takes the
    first that is nearly as good as the best of them, so that experts are neither moved nor replicated for a gain that
    the next load undoes. All owners stay if the result is not better than they are.
    """
    ranks = owners[0].ranks
    room_P = np.full(ranks, -(-sum(of.num_experts for of in owners) // ranks))
    found, rows, rows_now = list(owners), 0.0, 0.0
    for i in sorted(range(len(owners)), key=lambda i: (-max(loads_LE[i]), i)):
        loads_E, present_E = np.asarray(loads_LE[i], dtype=np.float64), np.array(owners[i].rank_of_E)
        evened = [_evened(loads_E, spared, room_P, node_size) for spared in range(overlap + 1)]
        new = (_exchanged(loads_E, present_E, ranks), *evened)
        tried = [owners[i], *(Owners.of_ranks(ranks, rank_E.tolist()) for rank_E in new)]
        costs = [_busiest_rank(loads_LE[i], of, overlap, memory, node_size) for of in tried]
        now = costs[0]
        if (np.bincount(present_E, minlength=ranks) > room_P).any():
            costs[:2] = math.inf, math.inf
        best = next(n for n, cost in enumerate(costs) if cost <= min(costs) + NEGLIGIBLE * sum(loads_E) / ranks)
        found[i] = tried[best]
        room_P -= np.bincount(found[i].rank_of_E, minlength=ranks)
        rows, rows_now = rows + costs[best], rows_now + now
    return found if rows < rows_now else list(owners)


def _busiest_rank(loads_E: Sequence[float], owners: Owners, overlap: int, memory: int, node_size: int) -> float:
    """Return the expected rows of the busiest rank."""
    return float(expected_rows(loads_E, materialize(loads_E, owners, overlap, memory, node_size)).max())


def _evened(loads_E: np.ndarray, spared: int, room_P: np.ndarray, node_size: int) -> np.ndarray:
    """Return a rank for each expert [E], so that the busiest rank has little load: longest processing time first.

    The busiest expert goes first, each to the rank with the least load, then on the node with the least. Among equal
    ranks it goes to the one with the least room: a rank with a busy expert gets few others, and so regains room for
    other layers. The ``spared`` busiest ones will be replicated, so their load does not count. In the end, the busiest
    rank exchanges experts with others as long as that helps.
    """
    order = np.argsort(-loads_E, kind="stable")
    ranks_P = np.arange(len(room_P))
    node_P, room_P, load_P = ranks_P // node_size, room_P.copy(), np.zeros(len(room_P))
    rank_E = np.zeros_like(order)
    for number, expert in enumerate(order):
        if number == spared:
            load_P[:] = 0.0
        node_load_P = np.bincount(node_P, weights=load_P)[node_P]
        able = np.flatnonzero(room_P > 0)
        rank = able[np.lexsort((able, room_P[able], node_load_P[able], load_P[able]))[0]]
        rank_E[expert] = rank
        load_P[rank] += loads_E[expert]
        room_P[rank] -= 1
    counted = np.sort(order[spared:])
    rank_E[counted] = _exchanged(loads_E[counted], rank_E[counted], len(room_P))
    return rank_E


def _exchanged(loads_E: np.ndarray, rank_E: np.ndarray, ranks: int) -> np.ndarray:
    """Exchange pairs of experts, one of them on the busiest rank, as long as both ranks then have less than it had."""
    rank_E = rank_E.copy()
    for _ in loads_E:
        load_P = np.bincount(rank_E, weights=loads_E, minlength=ranks)
        most = load_P.argmax()
        own, others = np.flatnonzero(rank_E == most), np.flatnonzero(rank_E != most)
        if not len(own) or not len(others):
            break
        less_XY = loads_E[own][:, None] - loads_E[others]
        after_XY = np.maximum(load_P[most] - less_XY, load_P[rank_E[others]] + less_XY)
        x, y = np.unravel_index(after_XY.argmin(), after_XY.shape)
        if after_XY[x, y] >= load_P[most]:
            break
        rank_E[own[x]], rank_E[others[y]] = rank_E[others[y]], most
    return rank_E


def reshard_by_sum(
    loads_LE: Sequence[Sequence[float]], owners: Sequence[Owners], overlap: int, memory: int, node_size: int
) -> list[Owners]:
    """Choose new owners so that the sum of all layers' loads is even: Hecate's Algorithm 2.

    The ``overlap`` busiest experts of a layer are replicated anyway, so who owns them matters little. The others go to
    the node with the least load, and to its rank with the least, beginning with the layer that has the busiest of them.
    Ranks own equally many experts of all layers together, up to one. The replicated ones keep their owner if it has
    room.
    """
    layers, ranks = range(len(owners)), owners[0].ranks
    nodes = -(-ranks // node_size)
    room_P = np.full(ranks, -(-sum(len(loads) for loads in loads_LE) // ranks))
    load_P = np.zeros(ranks)
    node_P = np.arange(ranks) // node_size
    hot = [set(busiest(loads, overlap)) for loads in loads_LE]
    cold = [sorted(set(range(len(loads_LE[i]))) - hot[i], key=lambda e: (-loads_LE[i][e], e)) for i in layers]
    found: list[dict[int, int]] = [{} for _ in layers]

    def give(layer: int, expert: int, rank: int, load: float) -> None:
        found[layer][expert] = rank
        room_P[rank] -= 1
        load_P[rank] += load

    for layer in sorted(layers, key=lambda i: (-loads_LE[i][cold[i][0]] if cold[i] else 0.0, i)):
        for expert in cold[layer]:
            node_load_N = np.bincount(node_P, weights=load_P, minlength=nodes)
            node_room_N = np.bincount(node_P, weights=room_P, minlength=nodes)
            node_load_N[node_room_N == 0] = np.inf
            node = np.lexsort((np.arange(nodes), -node_room_N, node_load_N))[0]
            members = np.flatnonzero((node_P == node) & (room_P > 0))
            rank = members[np.lexsort((members, -room_P[members], load_P[members]))[0]]
            give(layer, expert, int(rank), float(loads_LE[layer][expert]))
    for layer in layers:
        for expert in sorted(hot[layer]):
            owner = owners[layer].rank_of_E[expert]
            give(layer, expert, owner if room_P[owner] > 0 else int(np.argmax(room_P)), 0.0)
    return [Owners.of_ranks(ranks, [found[i][e] for e in range(len(loads_LE[i]))]) for i in layers]
