"""All communication of a layer: collectives over named axes of ranks.

Without a process group every collective is the identity, so that each stage runs, and is tested, in one process.
All ranks of an axis must call the same collectives in the same order, even with no rows.
"""

from .axes import LOCAL, Axis, axis_of, device_of, global_ranks, private_axis, split_axis, world_axis
from .codec import PLAIN, Codec, Plain, Wire
from .fsdp import gathered_weights, sharded_modules, sharded_weights
from .initial import draw_seed, fill, fill_normal, reset, seeded
from .kept import Kept, keeping, once
from .local import first_row, local_rows
from .no_gradient import (
    AssumedSizes,
    Pending,
    assume_splits,
    equal_sizes,
    exchange_counts,
    exchange_sizes,
    exchange_slots,
    gather_counts,
    held_by_all,
    on_host,
    splits,
    sum_over,
)
from .rows import PendingRows, all_gather_rows, exchange_rows, reduce_scatter_rows, start_all_gather, start_exchange
from .sparse import PendingCopies, Route, start_sparse_all_gather
from .tokens import gather_tokens, part_sizes, split_tokens
from .traffic import Traffic, record_traffic

__all__ = [
    "LOCAL",
    "PLAIN",
    "Axis",
    "AssumedSizes",
    "Codec",
    "Kept",
    "Pending",
    "Plain",
    "Traffic",
    "PendingCopies",
    "PendingRows",
    "Route",
    "Wire",
    "axis_of",
    "assume_splits",
    "device_of",
    "equal_sizes",
    "exchange_counts",
    "exchange_rows",
    "exchange_sizes",
    "exchange_slots",
    "fill",
    "draw_seed",
    "fill_normal",
    "all_gather_rows",
    "gather_counts",
    "gather_tokens",
    "gathered_weights",
    "global_ranks",
    "held_by_all",
    "keeping",
    "first_row",
    "local_rows",
    "on_host",
    "once",
    "private_axis",
    "record_traffic",
    "reduce_scatter_rows",
    "reset",
    "seeded",
    "sharded_modules",
    "sharded_weights",
    "part_sizes",
    "split_axis",
    "split_tokens",
    "splits",
    "start_exchange",
    "start_sparse_all_gather",
    "start_all_gather",
    "sum_over",
    "world_axis",
]
