"""Simulates a cache of experts, for experts that do not all fit into fast memory."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence


def lru(requests: Sequence[int], capacity: int) -> int:
    """Return the number of hits if the least recently used expert is evicted."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in requests:
        hits += expert in held
        held[expert] = None
        held.move_to_end(expert)
        if len(held) > capacity:
            held.popitem(last=False)
    return hits


def belady(requests: Sequence[int], capacity: int) -> int:
    """Return the number of hits if the expert that is needed last is evicted: the most that any cache can have.

    It needs to know all requests in advance, as with a router that decides before the first layer.
    """
    places: defaultdict[int, deque[int]] = defaultdict(deque)
    for place, expert in enumerate(requests):
        places[expert].append(place)
    held: set[int] = set()
    hits = 0
    for expert in requests:
        places[expert].popleft()
        if expert in held:
            hits += 1
            continue
        if len(held) == capacity:
            held.remove(max(held, key=lambda e: places[e][0] if places[e] else len(requests)))
        held.add(expert)
    return hits


#: name of a policy -> function from (requested experts in order, number of experts that fit) to the number of hits
POLICIES: dict[str, Callable[[Sequence[int], int], int]] = {"lru": lru, "belady": belady}
