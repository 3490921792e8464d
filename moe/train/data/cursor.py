"""The position of a run in its data, counted in sequences, so that it does not depend on the size of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: more sequences than a run reads, and than it postpones
MOST_READ, MOST_POSTPONED = 1 << 48, 1 << 24


class Cursor:
    """Says which sequences the next step reads: new ones in order, and earlier ones whose step was not taken.

    Sequences are numbered from 0 over all epochs, as in :meth:`Batches.read`. Each is used for one update, unless its
    step is left out for good.
    """

    def __init__(self, first: int = 0) -> None:
        #: the first sequence that no step has read
        self.first = first
        #: sequences to read once more, in runs: (step from which to read them, first sequence, number)
        self.postponed: list[tuple[int, int, int]] = []

    def batch(self, step: int, size: int) -> list[int]:
        """Return the sequences of a batch of ``size`` in optimizer step ``step`` (from 0). Changes nothing."""
        due = [s for when, first, count in self.postponed if when <= step for s in range(first, first + count)][:size]
        return due + list(range(self.first, self.first + size - len(due)))

    def later(self, step: int, batch: Sequence[int], count: int) -> list[list[int]]:
        """Return the batches of the ``count`` steps after ``step``, if that and all of them are taken."""
        cursor, found = Cursor.restored(self.state()), [list(batch)]
        for after in range(step + 1, step + 1 + count):
            cursor.advance(found[-1])
            found.append(cursor.batch(after, len(batch)))
        return found[1:]

    @property
    def waiting(self) -> int:
        """The number of sequences that are to be read once more."""
        return sum(count for _, _, count in self.postponed)

    def place(self, step: int, batch: Sequence[int], preferred: int, end: int) -> int:
        """Return the step from which the new sequences of ``batch``, refused in ``step``, can be read once more.

        That is ``preferred``, or an earlier one if all that is postponed could not be read otherwise before step
        ``end``, the last one being ``end - 1``. Returns ``end`` if there is no such step. Every step reads as many
        sequences as ``batch`` has.
        """
        new, left = sum(s >= self.first for s in batch), []
        for when, first, count in self.postponed:
            seen = sum(first <= s < first + count for s in batch)
            left.append((when, count - seen))
        place = end
        for first_step in range(step, min(preferred, end - 1) + 1):
            due = sum(count for when, count in left if first_step <= when < end)
            if first_step == step:  # what is due already is read first
                due = sum(count for when, count in left if when < end)
            if due + new > (end - first_step) * len(batch):
                break
            place = first_step
        return place

    def advance(self, batch: Sequence[int], postpone_to: int | None = None) -> int:
        """Go on after ``batch``, which :meth:`batch` returned.

        With ``postpone_to``, its new sequences are read again from that step on; those that were already read for the
        second time are not. Returns how many sequences will be read again.
        """
        seen = set(batch)
        left = []
        for when, first, count in self.postponed:
            unread = [s for s in range(first, first + count) if s not in seen]  # the end of the run
            if unread:
                left.append((when, unread[0], len(unread)))
        new = [s for s in batch if s >= self.first]
        if new and postpone_to is not None:
            left.append((postpone_to, new[0], len(new)))
        self.first += len(new)
        self.postponed = left
        return len(new) if postpone_to is not None else 0

    def state(self) -> dict[str, Any]:
        """Return the position as JSON."""
        return {"first": self.first, "postponed": [list(run) for run in self.postponed]}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Cursor:
        """Return a cursor at the position that :meth:`state` described. Raises ValueError for one that cannot be."""
        cursor = cls(int(state["first"]))
        cursor.postponed = [(int(when), int(first), int(count)) for when, first, count in state["postponed"]]
        read_before = all(0 <= first <= first + count <= cursor.first for _, first, count in cursor.postponed)
        if not (0 <= cursor.first < MOST_READ and read_before and cursor.waiting < MOST_POSTPONED):
            raise ValueError("the cursor is at no possible place")
        return cursor
