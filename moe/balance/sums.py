"""Sums counts over ranks: one all-reduce for all layers of a forward pass.  B sequences or 1, X values of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives import LOCAL, Axis, Pending, device_of, sum_over

#: identifies a layer on all ranks: its position in the order in which layers are built, and the number of the copy (0:
#: the original). So a copy on one rank does not change the numbers of other layers
LayerNumber = tuple[int, int]
#: a layer, and which of its rows
RowKey = tuple[LayerNumber, str]


class SummedRow:
    """One layer's row [B, X], to be summed over ranks; without ``sums``, the row of this rank alone."""

    def __init__(self, value: Tensor, sums: Sums | None = None) -> None:
        self.value, self._sums = value, sums
        #: the all-reduce that contains the row (None: not started), and where in it the row begins
        self.reduction: Pending | None = None
        self.offset = 0

    def get(self) -> Tensor:
        """Return the sum. If its all-reduce has not started, start it; all ranks must then call this too."""
        if self._sums is None:
            return self.value
        if self.reduction is None:
            self._sums.start()
        assert self.reduction is not None
        return self.reduction.get()[self.offset : self.offset + self.value.numel()].view(self.value.shape)


class Sums:
    """Collects rows, and sums them over an axis.

    ``widths`` maps each row to its number of values, equally on all ranks. A layer that did not run on this rank sends
    zeros, so ranks may run different layers. The all-reduce starts when a row arrives for the second time, and if
    ``start_when_full``, also when all rows have arrived.
    """

    def __init__(self, axis: Axis, widths: dict[RowKey, int], start_when_full: bool) -> None:
        self.axis, self.widths, self.start_when_full = axis, widths, start_when_full
        #: number of all-reduces started
        self.started = 0
        self._waiting: dict[RowKey, SummedRow] = {}
        self._device: torch.device | None = None

    def add(self, key: RowKey, value_BX: Tensor) -> SummedRow:
        """Add an int64 row [B, X] to the next all-reduce."""
        if key in self._waiting:
            self.start()
        self._device = value_BX.device
        row = self._waiting[key] = SummedRow(value_BX, self)
        if self.start_when_full and len(self._waiting) == len(self.widths):
            self.start()
        return row

    def start(self, always: bool = False) -> None:
        """Sum the waiting rows. ``always``: even if there are none, because other ranks may have some."""
        waiting, self._waiting = self._waiting, {}
        if not (waiting or always):
            return
        device = self._device or device_of(self.axis)
        lengths = {kind: len(row.value) for (_, kind), row in waiting.items()}
        parts, offset = [], 0
        for key, width in self.widths.items():
            if key in waiting:
                waiting[key].offset = offset
                part = waiting[key].value
            else:
                part = torch.zeros((lengths.get(key[1], 1), width), dtype=torch.int64, device=device)
            parts.append(part.flatten())
            offset += part.numel()
        reduction = sum_over(torch.cat(parts), self.axis)
        self.started += 1
        for row in waiting.values():
            row.reduction = reduction

    def discard(self) -> None:
        """Discard the waiting rows, because their forward pass was interrupted."""
        self._waiting = {}

    def close(self) -> None:
        """Let go of the axis's process group. Nothing can be summed afterwards."""
        self.discard()
        self.axis = LOCAL
