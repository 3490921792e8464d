"""Caches of experts, compared with all possible evictions."""

from __future__ import annotations

import random

import pytest

from equimoe.moe.serve.cache import belady, lru


def best(requests: tuple[int, ...], capacity: int, held: frozenset[int] = frozenset()) -> int:
    """Try every eviction. A requested expert must be in the cache when it is used."""
    if not requests:
        return 0
    expert, *rest = requests
    if expert in held:
        return 1 + best(tuple(rest), capacity, held)
    if len(held) < capacity:
        return best(tuple(rest), capacity, held | {expert})
    return max(best(tuple(rest), capacity, held - {out} | {expert}) for out in held)


def test_belady_is_the_best_on_short_traces() -> None:
    draw = random.Random(0)
    for _ in range(60):
        requests = tuple(draw.randrange(4) for _ in range(draw.randrange(1, 11)))
        for capacity in (1, 2, 3):
            assert belady(requests, capacity) == best(requests, capacity)


def test_belady_is_never_worse_than_lru() -> None:
    draw, better = random.Random(1), 0
    for _ in range(50):
        experts, capacity = draw.randrange(2, 17), draw.randrange(1, 9)
        requests = [draw.randrange(experts) for _ in range(200)]
        assert belady(requests, capacity) >= lru(requests, capacity)
        better += belady(requests, capacity) > lru(requests, capacity)
    assert better > 20


@pytest.mark.parametrize(
    ("requests", "capacity", "hits"),
    [([1, 2, 1, 3, 1, 2], 2, (2, 2)), ([1, 2, 3, 1, 2, 3], 2, (0, 2)), ([1, 1, 1], 1, (2, 2)), ([], 2, (0, 0))],
)
def test_worked_by_hand(requests: list[int], capacity: int, hits: tuple[int, int]) -> None:
    assert (lru(requests, capacity), belady(requests, capacity)) == hits
