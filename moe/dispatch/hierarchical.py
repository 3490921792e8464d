"""Dispatch in two hops, between nodes and then within a node. A row is sent to each node and each rank at most once.

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
    PendingRows,
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

#: (rows [S, D], weights [S, K], ids [S, K]) -> each row's weighted sum over the ids that are not -1
Inner = Callable[[Tensor, Tensor, Tensor], Tensor]


class Hop(NamedTuple):
    """An exchange of rows, weights and ids over an axis that has started."""

    axis: Axis
    #: rows, weights and ids if the axis has one rank; else they are in ``pending``
    local: tuple[Tensor, ...] = ()
    pending: PendingRows | None = None
    #: None if the axis has one rank
    order: ExpertOrder | None = None
    sent: list[int] = []
    received: list[int] = []


class HierarchicalDispatcher(Dispatcher):
    """Sends rows between nodes, then within the node.

    Rank i of a node communicates only with rank i of other nodes, so that messages between nodes are few and large. A
    node sums its results for a token before it returns them. Raises ValueError unless every node has the same number of
    adjacent ranks of the axis.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        size = node_size(self.axis) if self.config.node_size is None else self.config.node_size
        if size < 1 or self.axis.size % size:
            raise ValueError(f"dispatch.node_size={size}: must divide parallel.ep={self.axis.size}; use a divisor")
        self.between, self.within = split_axis(self.axis, size)

    def send(self, x_TD: Tensor, routing: Routing) -> Hop:
        slots_TK = self.holders.to_slots(routing.ids_TK)
        return self.start_hop(self.between, as_computed(x_TD), routing.weights_TK, slots_TK)

    def finish(self, flight: Hop, experts: Experts) -> Tensor:
        def within(x_SD: Tensor, weights_SK: Tensor, ids_SK: Tensor) -> Tensor:
            return self.finish_hop(self.start_hop(self.within, x_SD, weights_SK, ids_SK), compute)

        compute = partial(self.compute, experts=experts, sizes_of=exchange_sizes)
        return self.finish_hop(flight, within)

    def start_hop(self, axis: Axis, x_SD: Tensor, weights_SK: Tensor, ids_SK: Tensor) -> Hop:
        """Start to send rows over the axis. Its ranks hold equal runs of the slots ``ids_SK``.

        Each rank that owns any of a row's experts gets the row once, together with the row's choices on that rank.
        """
        if axis.size == 1:
            return Hop(axis, (x_SD, weights_SK, ids_SK))
        # slots per destination: those of a whole node in the hop between nodes
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
        local_XK = torch.where(to_SK[source_X] == rank_X[:, None], ids_XK, -1)

        routed = weights_XK, local_XK.int()
        pending = start_exchange(rows_XD, sent, received, axis, self.dispatch_wire, routed)
        return Hop(axis, (), pending, order, sent, received)

    def finish_hop(self, hop: Hop, inner: Inner) -> Tensor:
        """Wait for the rows, run ``inner`` on them, return the results, and sum them per source row."""
        if hop.pending is None or hop.order is None:
            return inner(*hop.local)
        rows_SD, weights_SK, ids_SK = hop.pending.wait_all()
        y_SD = inner(rows_SD, weights_SK, ids_SK.long())
        home_XD = exchange_rows(y_SD, hop.received, hop.sent, hop.axis, self.combine_wire)
        return combine(home_XD, hop.order, backend=self.backend)


def repeated(to_SK: Tensor) -> Tensor:
    """Return bool [S, K]: whether an earlier choice of the same row has the same destination."""
    same_SKK = to_SK[:, :, None] == to_SK[:, None, :]
    return same_SKK.tril(-1).any(-1)


def node_size(axis: Axis) -> int:
    """Return the number of the axis's ranks per node, from the launcher's LOCAL_WORLD_SIZE (unset: one node)."""
    ranks = global_ranks(axis)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", max(ranks) + 1))
    blocks = [len(list(block)) for _, block in groupby(ranks, key=lambda rank: rank // per_node)]
    if len(set(blocks)) > 1:
        raise ValueError(
            f"dispatch.name='hierarchical': ranks {ranks} are not blocks of equal size on nodes of {per_node}; "
            "set dispatch.node_size, or use 'all_to_all'"
        )
    return blocks[0]
