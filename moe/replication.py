"""The replicas of experts that a layer holds in a step, and how they travel.

T tokens, D hidden, E experts, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .collectives import Axis, Route, gather_counts, once
from .dispatch import Dispatcher, MixingDispatcher
from .experts import ReplicatedExperts
from .placement import Replicas
from .types import Routing

#: chooses the replicas of one forward: (choices of each rank's tokens int64 [P, E], those that the step was planned
#: with) -> these, with further ones
Calibration = Callable[[Tensor, Replicas], Replicas]


class Replication:
    """Copies experts' weights between the ranks of ``axis`` in every forward, and tells ``dispatcher`` who holds what.

    ``free``: the copies are freed after the forward, and made again in the backward. ``calibration`` may add replicas
    after routing; the host then waits for the choices of all ranks.
    """

    def __init__(
        self,
        replicas: Replicas,
        axis: Axis,
        dispatcher: Dispatcher | MixingDispatcher,
        free: bool = False,
        calibration: Calibration | None = None,
    ) -> None:
        self.replicas, self.axis, self.dispatcher = replicas, axis, dispatcher
        self.free, self.calibration = free, calibration
        #: all routes on which something was sent in this step
        self.routes: list[Route] = []
        #: replicas of each training forward of this step
        self.used: list[Replicas] = []
        self._route = self._route_of(replicas)
        #: experts whose weights are on the way since before the forward
        self._early: ReplicatedExperts | None = None
        self._address(replicas)

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent for replicas in this step: weights there, and gradients back."""
        return sum(sum(route.log) for route in self.routes)

    def start(self, experts: Any) -> None:
        """Start to copy weights before the forward; whatever is computed before it overlaps."""
        self._early = None if self._route is None else experts.replicated(self._route)

    def begin(self, experts: Any) -> Any:
        """Return the experts that this rank holds in a forward; their weights may still be on the way."""
        early, route, self._early = self._early, self._route, None
        return experts if route is None else once(lambda: early or experts.replicated(route))

    def adapt(self, held: Any, experts: Any, routing: Routing, counted: bool) -> Any:
        """Return the experts that this rank holds for choices that have been made: ``held``, or more of them.

        ``counted`` says that the forward is the first one of a micro-batch that is trained on.
        """
        found = self.replicas if self.calibration is None else self._calibrated(self.calibration, routing)
        if counted:
            self.used.append(found)
        if found is self.replicas:
            return held
        return once(partial(experts.replicated, self._route_of(found), held if held is not experts else None))

    def _calibrated(self, calibration: Calibration, routing: Routing) -> Replicas:
        choices_R = routing.ids_TK.flatten()
        counts_E = choices_R.new_zeros(self.replicas.owners.num_experts + 1)
        counts_E.scatter_add_(0, choices_R + 1, torch.ones_like(choices_R))  # -1 is no choice
        found = calibration(gather_counts(counts_E[1:], self.axis), self.replicas)
        self._address(found)
        return found

    def end(self, y_TD: Tensor, held: Any) -> Tensor:
        """Return ``y_TD``, the layer's result; free the copies until its backward if that is wanted."""
        return held.free(y_TD) if self.free and isinstance(held, ReplicatedExperts) else y_TD

    def _address(self, replicas: Replicas) -> None:
        holders = replicas.seen_from(self.axis.rank) if len(replicas) else replicas.owners
        self.dispatcher.address(holders)

    def _route_of(self, replicas: Replicas) -> Route | None:
        if not len(replicas):
            return None
        rank = self.axis.rank
        self.routes.append(Route(self.axis, replicas.sent_by(rank), replicas.received_by(rank)))
        return self.routes[-1]
