"""One small sum at the end of every step, from which all ranks take the same decisions.  P ranks."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..collectives import Axis, sum_over
from .heartbeat import Heartbeat
from .stragglers import stragglers


class Pulse:
    """Tells all ranks of ``axis`` after each step whether one was asked to stop, and how long each one worked.

    The sum runs on the CPU, so no GPU has to be waited for. ``heartbeat`` gets the step and the phase.
    """

    def __init__(self, axis: Axis, heartbeat: Heartbeat | None = None) -> None:
        self.axis, self.heartbeat = axis, heartbeat
        self.step, self._began = 0, 0.0
        #: since the last measurement: seconds in steps, and their number
        self._took, self._steps, self._steps_done = 0.0, 0, 0
        #: seconds per step in which each rank worked instead of waiting for others; empty if not measured
        self.busy_P: list[float] = []
        #: the slow ranks of the last note
        self._named: list[int] = []

    def enter(self, phase: str) -> None:
        """Say which phase begins."""
        if self.heartbeat is not None:
            self.heartbeat.enter(phase, self.step)

    def begin(self, step: int) -> None:
        """Begin a step."""
        self.step, self._began = step, time.perf_counter()
        # the first step may have to compile
        self.enter("step" if self._steps_done else "first step")

    def end(self, signal: int, logged: bool) -> int:
        """End a step; return the signal that any rank got, or 0. Every rank must call this.

        ``logged`` also measures the ranks' times for :meth:`record`, if enough steps have passed since the last time.
        """
        self._steps_done += 1
        if self.axis.size == 1:
            return signal
        took = self._took + time.perf_counter() - self._began
        waited = None if self.heartbeat is None or not logged else self.heartbeat.waited()
        busy_s = -1.0 if waited is None else (1 - waited) * took / (self._steps + 1)
        table_P2 = torch.zeros(self.axis.size, 2, dtype=torch.float64)
        table_P2[self.axis.rank] = torch.tensor((float(signal), busy_s), dtype=torch.float64)
        signals, busy_P = sum_over(table_P2, self.axis).get().T.tolist()
        self._took, self._steps = self._took + time.perf_counter() - self._began, self._steps + 1
        if logged:
            self.enter("record")
        measured = min(busy_P) >= 0  # on all ranks, which must not begin again at different steps
        self.busy_P = busy_P if measured else []
        if measured and self.heartbeat is not None:
            self.heartbeat.forget()
            self._took, self._steps = 0.0, 0
        return int(max(signals))

    def note(self) -> str:
        """Return a line that names the slow ranks if they have changed since the last one; else an empty string."""
        slow = stragglers(self.busy_P)
        if not self.busy_P or slow == self._named:
            return ""
        self._named = slow
        median = sorted(self.busy_P)[(len(self.busy_P) - 1) // 2]
        told = [f"rank {rank} is slow: it works {self.busy_P[rank]:.3g} s per step" for rank in slow[:4]]
        return f"{'; '.join(told)}, the median rank {median:.3g} s" if slow else "no rank is slow any more"

    def record(self) -> dict[str, Any]:
        """Return the fields of a ``train`` record about the ranks' times; empty if they were not measured."""
        if not self.busy_P:
            return {}
        return {"busy_s": [round(busy, 5) for busy in self.busy_P], "stragglers": stragglers(self.busy_P)}
