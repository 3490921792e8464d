"""Which sequence of which domain is read as the g-th one: a closed form in g, so a resume or another mesh reads the
same ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ...config import require

#: largest number of sequences in a block of a mixture
LARGEST_BLOCK = 10_000
#: sequences whose order is kept as a permutation in memory; longer ones are computed one by one
IN_MEMORY = 1 << 26
#: tells the random generators of different purposes apart
_EPOCH, _BLOCK = 1, 2


@dataclass(frozen=True)
class Epochs:
    """How much of a domain a run reads."""

    #: sequences of one epoch
    sequences: int
    #: sequences that are read
    read: int
    #: part of all sequences that are read
    share: float

    @property
    def epochs(self) -> float:
        return self.read / self.sequences

    @property
    def most(self) -> int:
        """How often a sequence is read at most."""
        return -(-self.read // self.sequences)


class Sequential:
    """Reads all domains together: each epoch is a permutation of all of their sequences."""

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        #: index of each domain's first sequence, followed by the number of all sequences
        self._bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._shuffles = Shuffles(int(self._bounds[-1]), (seed,))

    def place(self, number: int) -> tuple[int, int]:
        """Return the domain of a sequence, and its index in the domain."""
        found = self._shuffles[number]
        domain = int(np.searchsorted(self._bounds, found, side="right")) - 1
        return domain, found - int(self._bounds[domain])

    def epochs(self, domains: Sequence[str], read: int) -> dict[str, Epochs]:
        counts, whole = np.diff(self._bounds).tolist(), int(self._bounds[-1])
        return {
            domain: Epochs(count, round(read * count / whole), count / whole)
            for domain, count in zip(domains, counts, strict=True)
            if count
        }


class Mixture:
    """Reads the domains in blocks, each with the same number of sequences of a domain, in a shuffled order.

    Within its domain, a sequence is the next one of the domain's own epochs, each of them a permutation. A block is as
    short as the shares allow: of 10 sequences for shares of 0.7 and 0.3. Shares are rounded to 1/10000.
    """

    def __init__(self, counts: Mapping[str, int], shares: Mapping[str, float], seed: int) -> None:
        text = ",".join(f"{domain}={share:g}" for domain, share in shares.items())
        for domain in shares:
            known = ", ".join(counts)
            require(domain in counts, "data.mixture", text, f"there is no domain {domain!r}; name some of {known}")
            require(counts[domain] > 0, "data.mixture", text, f"domain {domain!r} is too short for one sequence")
        quotas = _quotas([shares.get(domain, 0.0) for domain in counts])
        #: sequences of a block before those of each domain, followed by all
        self._bounds = np.concatenate([[0], np.cumsum(quotas)]).astype(np.int64)
        self._quotas, self._seed, self._counts = quotas, seed, list(counts.values())
        self._shuffles = [
            Shuffles(count, (seed, _EPOCH, i)) if quota else None
            for i, (count, quota) in enumerate(zip(self._counts, quotas, strict=True))
        ]
        self._blocks = Shuffles(int(self._bounds[-1]), (seed, _BLOCK))

    def place(self, number: int) -> tuple[int, int]:
        """Return the domain of a sequence, and its index in the domain."""
        slot = self._blocks[number]
        domain = int(np.searchsorted(self._bounds, slot, side="right")) - 1
        block = number // int(self._bounds[-1])
        of_domain = block * self._quotas[domain] + slot - int(self._bounds[domain])
        shuffles = self._shuffles[domain]
        assert shuffles is not None
        return domain, shuffles[of_domain]

    def epochs(self, domains: Sequence[str], read: int) -> dict[str, Epochs]:
        block, found = int(self._bounds[-1]), {}
        for domain, count, quota in zip(domains, self._counts, self._quotas, strict=True):
            if quota:
                found[domain] = Epochs(count, round(read * quota / block), quota / block)
        return found


def _quotas(shares: Sequence[float]) -> list[int]:
    """Return the sequences of each domain in the shortest block that has exactly these shares, or nearly."""
    exact = [Fraction(share).limit_denominator(LARGEST_BLOCK) for share in shares]
    size = math.lcm(*(share.denominator for share in exact))
    if sum(exact) == 1 and size <= LARGEST_BLOCK and [*map(bool, exact)] == [*map(bool, shares)]:
        return [int(share * size) for share in exact]
    wanted = np.array(shares) * LARGEST_BLOCK
    quotas = np.maximum(np.floor(wanted), np.array(shares) > 0).astype(int)
    # the largest remainders are rounded up, so that the block has its size
    for place in np.argsort(quotas - wanted, kind="stable")[: max(LARGEST_BLOCK - int(quotas.sum()), 0)]:
        quotas[place] += 1
    return quotas.tolist()


class Shuffles:
    """The numbers 0, 1, 2, ... of an endless row of permutations of ``size`` entries, each with its own order."""

    def __init__(self, size: int, seed: tuple[int, ...]) -> None:
        self._size, self._seed = size, seed
        self._kept: dict[int, np.ndarray | Feistel] = {}

    def __getitem__(self, number: int) -> int:
        epoch, place = divmod(number, self._size)
        return int(self._order(epoch)[place])

    def _order(self, epoch: int) -> np.ndarray | Feistel:
        if epoch not in self._kept:
            # a step spans few of them
            self._kept = {e: order for e, order in self._kept.items() if abs(e - epoch) <= 1}
            generator = np.random.Generator(np.random.PCG64([*self._seed, epoch]))
            large = self._size > IN_MEMORY
            self._kept[epoch] = Feistel(self._size, generator) if large else generator.permutation(self._size)
        return self._kept[epoch]


class Feistel:
    """A pseudo-random permutation that is computed entry by entry: a Feistel network of four rounds over the smallest
    power of four that is large enough, repeated until the result is one of the entries (cycle walking)."""

    ROUNDS = 4

    def __init__(self, size: int, generator: np.random.Generator) -> None:
        self._size = size
        self._half = max((max(size - 1, 1).bit_length() + 1) // 2, 1)
        self._keys = [int(key) for key in generator.integers(0, 1 << 63, self.ROUNDS)]

    def __getitem__(self, place: int) -> int:
        mask = (1 << self._half) - 1
        while True:
            left, right = place >> self._half, place & mask
            for key in self._keys:
                left, right = right, left ^ (_mixed(right ^ key) & mask)
            place = left << self._half | right
            if place < self._size:
                return place


def _mixed(value: int) -> int:
    """Mix the bits of a number: the finalizer of SplitMix64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
