"""One collective for the counts of all layers of a forward pass.

Layers hand in what they counted, in the order in which they run; the sum over ranks starts when the last of them has,
and travels while that layer's experts, the head and the loss are computed. Which layer is the last of a pass is known
from the pass before: passes that begin with the same layer are taken to be alike. So

- the first pass, whose length nobody knows, sums each layer by itself;
- a pass that turns out longer sums its further layers as a pass of their own;
- a pass that turns out shorter is summed when the next one begins, or when a backward asks for it. It may have been
  broken off: only when it comes as short again, that is what is expected.

All this follows from the order of calls alone, which is the same on all ranks of an axis, so that no rank waits for a
sum that another has not started. Under reentrant recomputation, where layers count within the backward, a pass is what
one recomputed region runs.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ..collectives import Axis, Pending, sum_over

#: the number of a layer, unlike that of any other in the process, and what it counts
Key = tuple[int, str]


class Entry:
    """One layer's part in a sum."""

    def __init__(self, ledger: Ledger, value: Tensor) -> None:
        self._ledger, self._shape, self.value = ledger, value.shape, value
        self._pass = ledger.passes
        self._sum: Pending | None = None
        self._start = 0

    def started(self, joined: Pending, start: int) -> None:
        """Its sum is under way in ``joined``, from place ``start`` on."""
        self._sum, self._start = joined, start

    def get(self) -> Tensor:
        """The summed tensor. What has not been started is started now."""
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and self._ledger.passes == self._pass:
            self._ledger.end_pass()
        if self._sum is None:
            self._ledger.start()
        assert self._sum is not None
        return self._sum.get()[self._start : self._start + prod(self._shape)].view(self._shape)


class Ledger:
    """The sums over one axis, of tensors on one device."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        #: passes that have ended
        self.passes = 0
        #: first layer of a pass -> how many layers it is expected to have, and how many it had when it last came
        self.lengths: dict[Key, int] = {}
        self._last: dict[Key, int] = {}
        self._layers: list[Key] = []
        self._waiting: list[Entry] = []

    def add(self, value: Tensor, layer: Key) -> Entry:
        """Sum the int64 ``value`` of a layer, known by its number."""
        if layer in self._layers:
            self.end_pass()
        entry = Entry(self, value)
        self._layers.append(layer)
        self._waiting.append(entry)
        length = self.lengths.get(self._layers[0])
        if length is None:
            self.start()
        elif length == len(self._layers):
            self.end_pass()
        return entry

    def end_pass(self) -> None:
        """All layers of the pass have counted."""
        if self._layers:
            first, length = self._layers[0], len(self._layers)
            if length >= self.lengths.get(first, 0) or length == self._last.get(first):
                self.lengths[first] = length
            self._last[first] = length
            self._layers = []
            self.passes += 1
        self.start()

    def start(self) -> None:
        """Start the sum of what waits for it."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            joined, place = sum_over(torch.cat([entry.value.flatten() for entry in waiting]), self.axis), 0
            for entry in waiting:
                entry.started(joined, place)
                place += entry.value.numel()


_ledgers: dict[tuple[Any, torch.device], Ledger] = {}


def sum_of_layer(value: Tensor, axis: Axis, layer: Key) -> Pending | Entry:
    """Sum ``value`` over the axis, together with the other layers of this pass."""
    if axis.size == 1:
        return Pending(value)
    place = axis.group, value.device
    if place not in _ledgers:
        _ledgers[place] = Ledger(axis)
    return _ledgers[place].add(value, layer)
