"""All communication of a layer: collectives over named axes of ranks.

Without a process group every collective is the identity, so that each stage runs, and is tested, in one process.
All ranks of an axis must call the same collectives in the same order, even with no rows.
"""

from .axes import LOCAL, Axis, axis_of, device_of, global_ranks, private_axis, split_axis, world_axis
from .counts import (
    Belief,
    Pending,
    believe_splits,
    equal_sizes,
    exchange_counts,
    exchange_sizes,
    held_by_all,
    splits,
    sum_over,
)
from .initial import fill, fill_normal, reset
from .kept import Kept, keeping, once
from .rows import Transit, exchange_rows, gather_rows, reduce_scatter_rows, start_exchange, start_gather
from .tokens import gather_tokens, shares, split_tokens
from .wire import PLAIN, Codec, Plain, Traffic, Wire, record_traffic

__all__ = [
    "LOCAL",
    "PLAIN",
    "Axis",
    "Belief",
    "Codec",
    "Kept",
    "Pending",
    "Plain",
    "Traffic",
    "Transit",
    "Wire",
    "axis_of",
    "believe_splits",
    "device_of",
    "equal_sizes",
    "exchange_counts",
    "exchange_rows",
    "exchange_sizes",
    "fill",
    "fill_normal",
    "gather_rows",
    "gather_tokens",
    "global_ranks",
    "held_by_all",
    "keeping",
    "once",
    "private_axis",
    "record_traffic",
    "reduce_scatter_rows",
    "reset",
    "shares",
    "split_axis",
    "split_tokens",
    "splits",
    "start_exchange",
    "start_gather",
    "sum_over",
    "world_axis",
]
