"""Checks who owns which expert against step-by-step references and the best possible owners, on random loads."""

# E experts, P ranks.

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import product
from statistics import fmean

import pytest

from equimoe.moe.placement import Owners, expected_rows, materialize, reshard, reshard_by_sum
from equimoe.moe.placement.moves import NEGLIGIBLE
from tests.helpers.slow import slow_but
from tests.moe.test_placement import CASES, random_loads, random_owners, top


def waits(loads: list[list[int]], owners: list[Owners], overlap: int, memory: int, node: int) -> float:
    """Return the expected rows of the busiest rank of every layer, together."""
    return sum(
        float(expected_rows(of_layer, materialize(of_layer, of, overlap, memory, node)).max())
        for of_layer, of in zip(loads, owners, strict=True)
    )


def held(owners: list[Owners]) -> list[int]:
    return [sum(len(of.experts_of(rank)) for of in owners) for rank in range(owners[0].ranks)]


def busiest_first(loads: list[int]) -> list[int]:
    return sorted(range(len(loads)), key=lambda e: (-loads[e], e))


def evened_one_by_one(loads: list[int], spared: int, room: dict[int, int], node: int) -> list[int]:
    """Place one expert after another, then exchange pairs."""
    ranks, load, on = range(len(room)), dict.fromkeys(room, 0), dict[int, int]()
    for expert in busiest_first(loads):
        if len(on) == spared:
            load = dict.fromkeys(room, 0)
        left = {r: room[r] - list(on.values()).count(r) for r in ranks}
        of_node = {r: sum(load[s] for s in ranks if s // node == r // node) for r in ranks}
        on[expert] = min((r for r in ranks if left[r]), key=lambda r: (load[r], of_node[r], left[r], r))
        load[on[expert]] += loads[expert]
    return exchanged_one_by_one(loads, on, sorted(busiest_first(loads)[spared:]), ranks)


def exchanged_one_by_one(loads: list[int], on: dict[int, int], counted: list[int], ranks: range) -> list[int]:
    for _ in counted:
        total = {r: sum(loads[e] for e in counted if on[e] == r) for r in ranks}
        most = max(ranks, key=lambda r: (total[r], -r))
        tried = [
            (max(total[most] - loads[e] + loads[f], total[on[f]] + loads[e] - loads[f]), e, f)
            for e, f in product(counted, counted)
            if on[e] == most != on[f]
        ]
        if not tried or min(tried)[0] >= total[most]:
            break
        _, e, f = min(tried)
        on[e], on[f] = on[f], most
    return [on[e] for e in range(len(loads))]


def owners_one_by_one(
    loads: list[list[int]], owners: list[Owners], overlap: int, memory: int, node: int
) -> list[Owners]:
    """Let one layer after another take the first of its candidates that is nearly as good as the best."""
    ranks, found = owners[0].ranks, list(owners)
    room = dict.fromkeys(range(ranks), -(-sum(map(len, loads)) // ranks))
    for i in sorted(range(len(loads)), key=lambda i: -max(loads[i])):
        present, all_of_layer = dict(enumerate(owners[i].rank_of_E)), list(range(len(loads[i])))
        better = exchanged_one_by_one(loads[i], present, all_of_layer, range(ranks))
        fits = all(len(owners[i].experts_of(r)) <= room[r] for r in room)
        candidates = [owners[i], Owners.of_ranks(ranks, better)] if fits else []
        for spared in range(overlap + 1):
            candidates.append(Owners.of_ranks(ranks, evened_one_by_one(loads[i], spared, room, node)))
        rows = [waits([loads[i]], [of], overlap, memory, node) for of in candidates]
        enough = min(rows) + NEGLIGIBLE * sum(loads[i]) / ranks
        found[i] = candidates[[r <= enough for r in rows].index(True)]
        room = {r: room[r] - len(found[i].experts_of(r)) for r in room}
    pays = waits(loads, found, overlap, memory, node) < waits(loads, owners, overlap, memory, node)
    return found if pays else owners


def cases(seed: int, ranks: int, number: int) -> Iterator[tuple[list[list[int]], list[Owners], int, int]]:
    """Yield loads, owners, and the budgets of overlap and memory."""
    draw = random.Random(seed)
    for _ in range(number):
        layers, experts = draw.randrange(1, 5), draw.randrange(1, 10)
        overlap, memory = draw.randrange(4), draw.choice((0, 1, 4))
        # with these loads most shares are whole numbers, so that rounding does not decide between equal ones
        loads = [[840 * load for load in random_loads(draw.randrange(999), experts)] for _ in range(layers)]
        before = [random_owners(draw.randrange(999), experts, ranks) for _ in range(layers)]
        if draw.random() < 0.5:
            before = [Owners.spread(experts, ranks)] * layers
        yield loads, before, overlap, memory


@pytest.mark.parametrize(("seed", "ranks", "node"), slow_but(CASES[:6], CASES))
def test_owners_are_those_of_placing_one_after_another(seed: int, ranks: int, node: int) -> None:
    for loads, before, overlap, memory in cases(seed, ranks, 4):
        wanted = owners_one_by_one(loads, before, overlap, memory, node)
        assert reshard(loads, before, overlap, memory, node) == wanted


@pytest.mark.parametrize(("seed", "ranks", "node"), slow_but(CASES[:6], CASES))
def test_new_owners_wait_less_within_their_memory_or_owners_stay(seed: int, ranks: int, node: int) -> None:
    moved = 0
    for loads, before, overlap, memory in cases(seed + 100, ranks, 8):
        found = reshard(loads, before, overlap, memory, node)
        assert [of.num_experts for of in found] == list(map(len, loads))
        if found != before:
            moved += 1
            assert max(held(found)) <= -(-sum(map(len, loads)) // ranks)
            assert waits(loads, found, overlap, memory, node) < waits(loads, before, overlap, memory, node)
    assert moved or ranks == 1


def least(loads: list[list[int]], ranks: int) -> float:
    """Return the least rows for which all layers may wait, of all owners that the ranks have memory for."""
    most = -(-sum(map(len, loads)) // ranks)
    best: dict[tuple[int, ...], int] = {(0,) * ranks: 0}  # experts that each rank owns so far -> rows
    for of_layer in loads:
        after: dict[tuple[int, ...], int] = {}
        for on in product(range(ranks), repeat=len(of_layer)):
            rows = max(sum(load for load, r in zip(of_layer, on, strict=True) if r == rank) for rank in range(ranks))
            own = [on.count(rank) for rank in range(ranks)]
            for before, so_far in best.items():
                key = tuple(a + b for a, b in zip(before, own, strict=True))
                if max(key) <= most:
                    after[key] = min(after.get(key, so_far + rows), so_far + rows)
        best = after
    return min(best.values())


def ratios(ranks: int, layers: int, experts: int, power: float, number: int) -> list[float]:
    """Return how long ranks wait for each other, relative to the best possible, for random loads."""
    draw, found = random.Random(ranks + layers), []
    for _ in range(number):
        loads = [[1 + int(1000 * draw.random() ** power) for _ in range(experts)] for _ in range(layers)]
        owners = reshard(loads, [Owners.spread(experts, ranks)] * layers, 0, 0, ranks)
        found.append(waits(loads, owners, 0, 0, ranks) / least(loads, ranks))
    return found


SIZES = [(2, 2, 4, 1.0), (2, 2, 6, 4.0), (3, 2, 4, 2.0), (2, 4, 6, 2.0), (3, 2, 5, 2.0), (3, 2, 6, 4.0), (4, 2, 4, 4.0)]


@pytest.mark.parametrize(("ranks", "layers", "experts", "power"), slow_but(SIZES[:3:2], SIZES))
def test_owners_are_close_to_the_best_possible(ranks: int, layers: int, experts: int, power: float) -> None:
    found = ratios(ranks, layers, experts, power, 10)
    assert min(found) >= 1.0 and fmean(found) < 1.03 and max(found) < 1.2


def test_a_rank_with_a_busy_expert_owns_few_others_of_its_layer_and_more_of_another() -> None:
    loads = [[900, 100, 100, 100, 100, 100, 100, 100], [10, 11, 10, 9, 10, 10, 11, 9]]
    first, second = found = reshard(loads, [Owners.spread(8, 2)] * 2, 0, 0, 2)
    assert sorted(len(first.experts_of(rank)) for rank in range(2)) == [1, 7]
    assert held(found) == [8, 8]
    busy = first.rank_of_E[0]
    assert len(second.experts_of(busy)) == 7, "memory of all layers is even"
    assert waits(loads, found, 0, 0, 2) < 900 + 70


def test_owners_expect_the_replicas_that_the_next_step_makes() -> None:
    """A third of all choices go to an expert that will be replicated, so its owner gets as much else as others."""
    loads = [[1200] + [100 * (1 + e % 3) for e in range(12)]] * 2
    before = [Owners.spread(13, 4)] * 2
    found = reshard(loads, before, 1, 1, 4)
    mean = sum(map(sum, loads)) / 4
    assert waits(loads, found, 1, 1, 4) < 1.03 * mean
    assert waits(loads, reshard(loads, before, 0, 0, 4), 1, 1, 4) > 1.05 * mean, "these expect no replicas"


@pytest.mark.parametrize("layers", [1, 3])
def test_even_and_empty_loads_leave_owners_alone(layers: int) -> None:
    for loads in ([[0] * 8] * layers, [[5] * 8] * layers):
        before = [Owners.spread(8, 4)] * layers
        assert reshard(loads, before, 2, 2, 4) == before


def test_fewer_experts_than_ranks() -> None:
    loads = [[9, 1, 5], [1, 9, 5]]
    found = reshard(loads, [Owners.of_ranks(4, [0, 0, 0])] * 2, 0, 0, 2)
    assert waits(loads, found, 0, 0, 2) == 18 and max(held(found)) == 2


def evened_sum_one_by_one(
    loads: list[list[int]], owners: list[Owners], overlap: int, node: int
) -> list[dict[int, int]]:
    ranks, layers = range(owners[0].ranks), range(len(loads))
    room = dict.fromkeys(ranks, -(-sum(map(len, loads)) // len(ranks)))
    load: Counter[int] = Counter()
    hot = [top(of_layer, overlap) for of_layer in loads]
    cold = [[e for e in top([x + 1 for x in loads[i]], len(loads[i])) if e not in hot[i]] for i in layers]
    found: list[dict[int, int]] = [{} for _ in layers]
    for layer in sorted(layers, key=lambda i: -max((loads[i][e] for e in cold[i]), default=0)):
        for expert in cold[layer]:
            nodes = {r // node: [s for s in ranks if s // node == r // node] for r in ranks if room[r]}
            best = min(nodes, key=lambda n: (sum(load[r] for r in nodes[n]), -sum(room[r] for r in nodes[n]), n))
            rank = min((r for r in nodes[best] if room[r]), key=lambda r: (load[r], -room[r], r))
            found[layer][expert] = rank
            room[rank] -= 1
            load[rank] += loads[layer][expert]
    for layer in layers:
        for expert in sorted(hot[layer]):
            owner = owners[layer].rank_of_E[expert]
            rank = owner if room[owner] else max(ranks, key=lambda r: (room[r], -r))
            found[layer][expert] = rank
            room[rank] -= 1
    return found


@pytest.mark.parametrize(("seed", "ranks", "node"), CASES)
def test_owners_by_the_sum_of_all_layers_are_those_of_placing_one_after_another(
    seed: int, ranks: int, node: int
) -> None:
    draw = random.Random(seed)
    layers, experts, overlap = draw.randrange(1, 5), draw.randrange(1, 10), draw.randrange(4)
    loads = [random_loads(draw.randrange(999), experts) for _ in range(layers)]
    before = [random_owners(draw.randrange(999), experts, ranks) for _ in range(layers)]
    found = reshard_by_sum(loads, before, overlap, overlap, node)
    wanted = evened_sum_one_by_one(loads, before, overlap, node)
    assert [list(o.rank_of_E) for o in found] == [[of[e] for e in range(experts)] for of in wanted]
    held = [sum(len(o.experts_of(r)) for o in found) for r in range(ranks)]
    assert max(held) <= -(-layers * experts // ranks)
