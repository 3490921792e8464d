"""Checks which experts are replicated against step-by-step references, on random loads."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch

from equimoe.moe.placement import (
    Forecast,
    Owners,
    Replicas,
    busiest,
    calibrate,
    expected_rows,
    materialize,
    replicate,
    rows_by_rank,
)

CASES = [(seed, ranks, node) for seed in range(12) for ranks, node in ((1, 1), (2, 2), (4, 2), (8, 4), (6, 2), (8, 8))]


def random_loads(seed: int, experts: int) -> list[int]:
    """Return loads with ties and experts without load."""
    draw = random.Random(seed)
    return [draw.choice((0, 1, 5, 5, draw.randrange(1000))) for _ in range(experts)]


def random_owners(seed: int, experts: int, ranks: int) -> Owners:
    draw = random.Random(seed + 1)
    return Owners.of_ranks(ranks, [draw.randrange(ranks) for _ in range(experts)])


def random_replicas(seed: int, experts: int, ranks: int, node: int) -> Replicas:
    draw, owners = random.Random(seed + 2), random_owners(seed, experts, ranks)
    on = [[r for r in range(ranks) if r != o and draw.random() < 0.3] for o in owners.rank_of_E]
    return Replicas(owners, on, node)


def top(loads: Sequence[float], number: int) -> list[int]:
    left, found = dict(enumerate(loads)), []
    while left and len(found) < number:
        best = max(left, key=lambda expert: (left[expert], -expert))
        if left.pop(best) > 0:
            found.append(best)
    return found


def replicas_one_by_one(loads: list[int], owners: Owners, chosen: list[int], memory: int, node: int) -> list[set[int]]:
    """Place one replica after another. A node's free slots are those before the expert's first replica is placed."""
    ranks = range(owners.ranks)
    on: list[set[int]] = [set() for _ in loads]
    memory = min(memory, len(chosen))
    free = dict.fromkeys(ranks, memory)
    everywhere = len(chosen) <= memory
    total = sum(loads[e] for e in chosen)
    for expert in chosen:
        number = owners.ranks if everywhere else int(owners.ranks * memory * loads[expert] / total + 0.5)
        of_node = Counter(dict.fromkeys(range(-(-owners.ranks // node)), 0))
        for rank in ranks:
            of_node[rank // node] += free[rank]
        held = Counter({owners.rank_of_E[expert] // node: 1})
        for _ in range(number):
            able = [r for r in ranks if free[r] and r != owners.rank_of_E[expert] and r not in on[expert]]
            if not able:
                break
            rank = min(able, key=lambda r: (held[r // node], -of_node[r // node], r // node, -free[r], r))
            on[expert].add(rank)
            held[rank // node] += 1
        for rank in on[expert]:
            free[rank] -= 1
    return on


@pytest.mark.parametrize(("seed", "ranks", "node"), CASES)
def test_replicas_are_those_of_placing_one_after_another(seed: int, ranks: int, node: int) -> None:
    draw = random.Random(seed)
    for _ in range(8):
        experts, overlap, memory = draw.randrange(1, 12), draw.randrange(6), draw.randrange(5)
        loads, owners = random_loads(draw.randrange(999), experts), random_owners(draw.randrange(999), experts, ranks)
        chosen = busiest(loads, overlap)
        assert chosen == top(loads, overlap)
        found = replicate(chosen, loads, owners, memory, node)
        assert [set(r) for r in found.ranks_of_E] == replicas_one_by_one(loads, owners, chosen, memory, node)
        extra = [len(found.experts_of(r)) - len(owners.experts_of(r)) for r in range(ranks)]
        assert max(extra) <= min(memory, overlap)
        assert all(not ranks for load, ranks in zip(loads, found.ranks_of_E, strict=True) if not load)


def rows_if_all_ranks_route_alike(loads: list[int], replicas: Replicas) -> list[Fraction]:
    """Send every rank's share of a load to its choices, one after another."""
    ranks = replicas.owners.ranks
    rows = [Fraction(0)] * ranks
    for source in range(ranks):
        for load, choices in zip(loads, replicas.choices_of(source), strict=True):
            for rank in choices:
                rows[rank] += Fraction(load, ranks * len(choices))
    return rows


@pytest.mark.parametrize(("seed", "ranks", "node"), [*CASES, (0, 5, 2)])
def test_expected_rows_are_those_of_ranks_that_route_alike(seed: int, ranks: int, node: int) -> None:
    loads, replicas = random_loads(seed, 9), random_replicas(seed, 9, ranks, node)
    wanted = rows_if_all_ranks_route_alike(loads, replicas)
    assert expected_rows(loads, replicas).tolist() == pytest.approx([float(rows) for rows in wanted])


def relieved_one_by_one(loads: list[int], owners: Owners, overlap: int, memory: int, node: int) -> list[set[int]]:
    """Relieve the busiest rank of its busiest expert ``overlap`` times, and return the best of these states."""
    chosen: list[int] = []
    states = []
    for _ in range(overlap + 1):
        on = replicas_one_by_one(loads, owners, chosen, memory, node)
        rows = rows_if_all_ranks_route_alike(loads, Replicas(owners, on, node))
        states.append((max(rows), on))
        rank = rows.index(max(rows))
        left = [e for e in owners.experts_of(rank) if e not in chosen and loads[e]]
        if not left:
            break
        chosen.append(max(left, key=lambda e: (loads[e], -e)))
    return min(states, key=lambda state: state[0])[1]


@pytest.mark.parametrize(("seed", "ranks", "node"), CASES)
def test_replicas_relieve_the_busiest_rank_and_are_not_made_otherwise(seed: int, ranks: int, node: int) -> None:
    draw = random.Random(seed)
    for _ in range(8):
        experts, overlap, memory = draw.randrange(1, 12), draw.randrange(6), draw.randrange(5)
        # with these loads most shares are whole numbers, so that rounding does not decide between equal ones
        loads = [840 * load for load in random_loads(draw.randrange(999), experts)]
        owners = random_owners(draw.randrange(999), experts, ranks)
        found = materialize(loads, owners, overlap, memory, node)
        assert [set(r) for r in found.ranks_of_E] == relieved_one_by_one(loads, owners, overlap, memory, node)
        extra = [len(found.experts_of(r)) - len(owners.experts_of(r)) for r in range(ranks)]
        assert max(extra) <= min(memory, overlap)


def test_an_even_load_is_left_alone() -> None:
    assert len(materialize([10, 11, 10, 11], Owners.consecutive(4, 2), 2, 2, 2)) == 0


@pytest.mark.parametrize(("overlap", "memory"), [(0, 3), (3, 0), (0, 0)])
def test_without_a_budget_nothing_is_replicated(overlap: int, memory: int) -> None:
    assert len(materialize([5, 3, 2, 9], Owners.consecutive(4, 2), overlap, memory, 2)) == 0


def test_one_hot_expert_on_32_ranks() -> None:
    """Half of all choices go to one expert: card B1, AT-2."""
    ranks, experts, choices = 32, 64, 64 * 63
    owners = Owners.consecutive(experts, ranks)
    counts_PE = torch.full((ranks, experts), choices // (experts - 1))
    counts_PE[:, 0] = choices
    loads = counts_PE.sum(0).tolist()

    def imbalance(replicas: Replicas) -> float:
        rows_P = rows_by_rank(counts_PE, replicas).double()
        return float(rows_P.max() / rows_P.mean())

    assert 16.0 <= imbalance(Replicas(owners)) <= 16.3
    assert imbalance(materialize(loads, owners, 1, 1, 8)) <= 1.02


@pytest.mark.parametrize(("seed", "ranks", "node"), CASES)
def test_every_choice_goes_to_a_holder_and_near_ones_first(seed: int, ranks: int, node: int) -> None:
    experts = 7
    replicas = random_replicas(seed, experts, ranks, node)
    counts_PE = torch.zeros(ranks, experts, dtype=torch.int64)
    rows: Counter[int] = Counter()
    for source in range(ranks):
        ids_TK = torch.randint(-1, experts, (40, 2))
        seen = replicas.seen_from(source)
        slots_TK = seen.to_slots(ids_TK)
        used: dict[int, Counter] = {e: Counter() for e in range(experts)}
        for expert, slot in zip(ids_TK.flatten().tolist(), slots_TK.flatten().tolist(), strict=True):
            if expert < 0:
                assert slot == -1
                continue
            rank = slot // seen.slots
            assert replicas.experts_of(rank)[slot % seen.slots] == expert
            used[expert][rank] += 1
            counts_PE[source, expert] += 1
        for expert, found in used.items():
            holders = replicas.holders_of(expert)
            near = [r for r in holders if r // node == source // node]
            allowed = [source] if source in holders else near or holders
            assert set(found) <= set(allowed)
            assert max(found.values(), default=0) - min((found[r] for r in allowed), default=0) <= 1
            rows += found
    assert rows_by_rank(counts_PE, replicas).tolist() == [rows[r] for r in range(ranks)]


@pytest.mark.parametrize("seed", range(6))
def test_what_is_sent_is_what_is_received(seed: int) -> None:
    ranks, experts = 5, 9
    replicas = random_replicas(seed, experts, ranks, 2)
    for to in range(ranks):
        arrived = [
            replicas.owners.experts_of(source)[slot] for source in range(ranks) for slot in replicas.sent_by(source)[to]
        ]
        assert replicas.experts_of(to) == [*replicas.owners.experts_of(to), *arrived]
        assert replicas.received_by(to) == [len(replicas.sent_by(source)[to]) for source in range(ranks)]
    assert len(replicas) == sum(sum(map(len, replicas.sent_by(source))) for source in range(ranks))


def test_calibration_recovers_from_a_forecast_that_is_wrong() -> None:
    ranks, experts = 8, 16
    owners = Owners.consecutive(experts, ranks)
    counts_PE = torch.full((ranks, experts), 10)
    counts_PE[:, 3] = 200
    planned = materialize([100 if e == 12 else 1 for e in range(experts)], owners, 1, 1, 4)  # expected expert 12
    before = int(rows_by_rank(counts_PE, planned).max())
    full = calibrate(counts_PE, planned, 1, 1, 0.0)
    assert full.ranks_of_E[3] == (owners.rank_of_E[12],), "no other rank has room left"
    found = calibrate(counts_PE, planned, 1, 2, 0.0)
    assert set(planned.ranks_of_E[12]) == set(found.ranks_of_E[12]) and len(found.ranks_of_E[3]) == ranks - 1
    assert int(rows_by_rank(counts_PE, found).max()) < before / 4
    assert calibrate(counts_PE, planned, 1, 2, 1e6) == planned, "the transfer would take longer"


@pytest.mark.parametrize("seed", range(20))
def test_calibration_never_makes_the_busiest_rank_busier(seed: int) -> None:
    planned = random_replicas(seed, 9, 6, 3)
    counts_PE = torch.randint(0, 50, (6, 9)) ** 2
    room = max(len(planned.experts_of(r)) - len(planned.owners.experts_of(r)) for r in range(6)) + 1
    found = calibrate(counts_PE, planned, 2, room, 1.0)
    assert rows_by_rank(counts_PE, found).max() <= rows_by_rank(counts_PE, planned).max()
    extra = [len(found.experts_of(r)) - len(planned.owners.experts_of(r)) for r in range(6)]
    assert max(extra) <= room


def test_a_forecast_is_the_mean_of_the_last_steps() -> None:
    forecast = Forecast(2)
    assert forecast.loads_LE is None
    for value in (100, 1, 4):
        forecast.observe(torch.tensor([[value, 0]]))
    assert forecast.loads_LE.tolist() == [[2.5, 0.0]]


@pytest.mark.parametrize("ranks", [[0], [1, 1], [4], [-1]])
def test_replicas_that_cannot_be(ranks: Any) -> None:
    with pytest.raises(ValueError, match=r"ranks_of_E\[0\]=.*: must be different ranks below 4, without the owner 0"):
        Replicas(Owners.consecutive(4, 4), [ranks, [], [], []])
