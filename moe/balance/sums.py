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
    """One layer's row [B, X] in a sum over ranks; with no ``sums`` it is of this rank alone."""

    def __init__(self, value: Tensor, sums: Sums | None = None) -> None:
        self.value, self._sums = value, sums
        #: the sum under way, and where in it the row begins
        self.joined: Pending | None = None
        self.place = 0

    def get(self) -> Tensor:
        """The summed row. A sum that has not started is started now, so all ranks must ask at the same point."""
        if self._sums is None:
            return self.value
        if self.joined is None:
            self._sums.start()
        assert self.joined is not None
        return self.joined.get()[self.place : self.place + self.value.numel()].view(self.value.shape)


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
        for key, width in self.widths.items():
            if key in waiting:
                waiting[key].place = place
                part = waiting[key].value
            else:
                part = torch.zeros((rows.get(key[1], 1), width), dtype=torch.int64, device=device)
            parts.append(part.flatten())
            place += part.numel()
        joined = sum_over(torch.cat(parts), self.axis)
        self.started += 1
        for entry in waiting.values():
            entry.joined = joined

    def drop(self) -> None:
        """Forget the rows that wait: their pass was broken off."""
        self._waiting = {}
