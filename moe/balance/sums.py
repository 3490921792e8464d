"""One all-reduce for all layers' counts of a forward pass, matched by layer.  B sequences or 1, X values of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives import Axis, Pending, device_of, sum_over

#: a layer's place in the order in which layers are built, the same on all ranks, and which copy of that layer it is (0:
#: the layer itself), so that a copy on one rank alone moves no other layer's number
Number = tuple[int, int]
#: a layer's number, and which of its rows
Key = tuple[Number, str]


class Entry:
    """One layer's row [B, X] in a sum over ranks."""

    def __init__(self, value: Tensor, sums: Sums | None = None) -> None:
        self.value, self._sums = value, sums
        self._joined: Pending | None = None
        self._place = 0

    def started(self, joined: Pending, place: int) -> None:
        """The sum is under way; this row begins at ``place``."""
        self._joined, self._place = joined, place

    def get(self) -> Tensor:
        """The summed row. A sum that has not started is started now, so all ranks must ask at the same point."""
        if self._sums is None:  # of this rank alone
            return self.value
        if self._joined is None:
            self._sums.start()
        assert self._joined is not None
        return self._joined.get()[self._place : self._place + self.value.numel()].view(self.value.shape)


class Sums:
    """Sums over one axis.

    ``widths`` says how many values each row has, in the order in which rows travel; it is the same on all ranks. The
    row of a layer that did not run on this rank travels as zeros, so ranks may run different layers. A row that comes a
    second time starts the sum of those that wait; with ``early`` so does the last row.
    """

    def __init__(self, axis: Axis, widths: dict[Key, int], early: bool) -> None:
        self.axis, self.widths, self.early = axis, widths, early
        #: sums that have been started
        self.started = 0
        self._waiting: dict[Key, Entry] = {}
        self._device: torch.device | None = None

    def add(self, key: Key, value_BX: Tensor) -> Entry:
        """Take in an int64 row [B, X]."""
        if key in self._waiting:
            self.start()
        self._device = value_BX.device
        entry = self._waiting[key] = Entry(value_BX, self)
        if self.early and len(self._waiting) == len(self.widths):
            self.start()
        return entry

    def start(self, always: bool = False) -> None:
        """Start the sum of the rows that wait; ``always``: also where none does, because other ranks may have some."""
        waiting, self._waiting = self._waiting, {}
        if not (waiting or always):
            return
        device = self._device or device_of(self.axis)
        rows = {kind: len(entry.value) for (_, kind), entry in waiting.items()}
        parts, place = [], 0
        places: dict[Key, int] = {}
        for key, width in self.widths.items():
            entry = waiting.get(key)
            zeros = (rows.get(key[1], 1), width)
            part = torch.zeros(zeros, dtype=torch.int64, device=device) if entry is None else entry.value
            places[key] = place
            parts.append(part.flatten())
            place += part.numel()
        joined = sum_over(torch.cat(parts), self.axis)
        self.started += 1
        for key, entry in waiting.items():
            entry.started(joined, places[key])

    def drop(self) -> None:
        """Forget the rows that wait: their pass was broken off."""
        self._waiting = {}
