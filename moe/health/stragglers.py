"""Finds ranks that work longer than the others, which wait for them.  P ranks.

MegaScale (Jiang et al. 2024, arXiv 2402.15627) compares the times of the same code on all machines.
"""

from __future__ import annotations

from collections.abc import Sequence

#: how much longer than the median rank a straggler works
FACTOR = 1.5
#: seconds per step below which differences are noise
LEAST_S = 0.005


def stragglers(busy_P: Sequence[float], factor: float = FACTOR, least_s: float = LEAST_S) -> list[int]:
    """Return the ranks whose seconds of work per step exceed ``factor`` times the median, slowest first.

    The median is the lower one of an even number of ranks, so that one of two ranks can be found.
    """
    if len(busy_P) < 2:
        return []
    median = sorted(busy_P)[(len(busy_P) - 1) // 2]
    slow = [rank for rank, busy in enumerate(busy_P) if busy > factor * median and busy - median > least_s]
    return sorted(slow, key=lambda rank: -busy_P[rank])
