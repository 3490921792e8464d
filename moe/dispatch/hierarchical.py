"""Between nodes first, then within the node: a row crosses to each node, and to each rank there, at most once.

T tokens, D hidden, K top-k, S source rows of one hop, X rows sent, G destinations of a hop.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.permute import combine, permute
from ...kernels.sort_by_expert import ExpertOrder, sort_by_expert
from ..collectives import (
    Axis,
    Transit,
    exchange_counts,
    exchange_rows,
    exchange_sizes,
    global_ranks,
    split_axis,
    splits,
    start_exchange,
)
from ..types import Experts, Routing
from .base import Dispatcher, as_computed

#: (rows [S, D], weights [S, K], ids [S, K]) to each row's weighted sum over the ids that are not -1
Inner = Callable[[Tensor, Tensor, Tensor], Tensor]


class Hop(NamedTuple):
    """Rows, weights and ids on their way over an axis; or here already, where it has one rank."""

    axis: Axis
    here: tuple[Tensor, ...]
    transits: tuple[Transit, ...] = ()
    #: None where the axis has one rank
    order: ExpertOrder | None = None
    sent: list[int] = []
    received: list[int] = []


class HierarchicalDispatcher(Dispatcher):
    """Two hops of the same kind. Rank i of a node talks to rank i of other nodes only, so that messages between nodes
    are few and large; a node's results for a token are summed before they go home.

    Raises ValueError when nodes do not have equally many adjacent ranks of the axis.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        size = node_size(self.axis) if self.config.node_size is None else self.config.node_size
        if size < 1 or self.axis.size % size:
            raise ValueError(f"dispatch.node_size={size}: must divide expert parallel = {self.axis.size} ranks")
        self.between, self.within = split_axis(self.axis, size)

    def send(self, x_TD: Tensor, routing: Routing) -> Hop:
        slots_TK = self.owners.to_slots(routing.ids_TK)
        return self.depart(self.between, as_computed(x_TD), routing.weights_TK, slots_TK)

    def finish(self, flight: Hop, experts: Experts) -> Tensor:
        def within(x_SD: Tensor, weights_SK: Tensor, ids_SK: Tensor) -> Tensor:
            return self.arrive(self.depart(self.within, x_SD, weights_SK, ids_SK), compute)

        compute = partial(self.compute, experts=experts, sizes_of=exchange_sizes)
        return self.arrive(flight, within)

    def depart(self, axis: Axis, x_SD: Tensor, weights_SK: Tensor, ids_SK: Tensor) -> Hop:
        """Send rows to the ranks of the axis, over which the slots ``ids_SK`` are split evenly.

        A row goes once to each rank that has experts of its, with the choices it has there.
        """
        if axis.size == 1:
            return Hop(axis, (x_SD, weights_SK, ids_SK))
        # slots count within the innermost group that holds all ranks of this hop
        each = self.slots * (self.within.size if axis is self.between else 1)
        to_SK = torch.div(ids_SK, each, rounding_mode="floor")  # -1 stays -1
        order = sort_by_expert(to_SK.masked_fill(repeated(to_SK), -1), axis.size, backend=self.backend)
        counts_G = order.offsets_E.diff()
        sent, received = splits(counts_G, exchange_counts(counts_G[:, None], axis).flatten(), axis)
        rows_X = sum(sent)
        rows_XD, weights_XK = (permute(t, order, rows_X, backend=self.backend) for t in (x_SD, weights_SK))
        choice_X = order.order_R[:rows_X]
        source_X, rank_X = choice_X // to_SK.shape[1], to_SK.flatten()[choice_X]
        ids_XK = ids_SK[source_X] - rank_X[:, None] * each
        there_XK = torch.where(to_SK[source_X] == rank_X[:, None], ids_XK, -1)

        rows = start_exchange(rows_XD, sent, received, axis, self.there)
        weights = start_exchange(weights_XK, sent, received, axis)
        ids = start_exchange(there_XK.int(), sent, received, axis)
        return Hop(axis, (), (rows, weights, ids), order, sent, received)

    def arrive(self, hop: Hop, inner: Inner) -> Tensor:
        """Let ``inner`` compute where the rows have arrived; they come back summed."""
        if hop.order is None:
            return inner(*hop.here)
        rows, weights, ids = hop.transits
        y_SD = inner(rows.wait(), weights.wait(), ids.wait().long())
        home_XD = exchange_rows(y_SD, hop.received, hop.sent, hop.axis, self.home)
        return combine(home_XD, hop.order, backend=self.backend)


def repeated(to_SK: Tensor) -> Tensor:
    """Where an earlier choice of the same row has the same destination: bool [S, K]."""
    same_SKK = to_SK[:, :, None] == to_SK[:, None, :]
    return same_SKK.tril(-1).any(-1)


def node_size(axis: Axis) -> int:
    """Ranks of the axis on each node, by the launcher's LOCAL_WORLD_SIZE; without it all are on one."""
    ranks = global_ranks(axis)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", max(ranks) + 1))
    blocks = [len(list(block)) for _, block in groupby(ranks, key=lambda rank: rank // per_node)]
    if len(set(blocks)) > 1:
        raise ValueError(f"dispatch 'hierarchical': ranks {ranks} are not blocks of equal size on nodes of {per_node}")
    return blocks[0]
