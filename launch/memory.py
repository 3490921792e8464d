"""Says which rank and layer ran out of memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..moe import MoE


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocator of Python, the CPU or a GPU raised ``error``."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def out_of_memory_line(error: BaseException, layers: Mapping[int, MoE]) -> str:
    """Return one line that says what did not fit, and in which of ``layers``, keyed by block number."""
    reason = " ".join(str(error).split("\n")[0].split()) or "out of memory"
    layer = layer_of(error, layers)
    return reason if layer is None else f"MoE layer of block {layer}: {reason}"


def layer_of(error: BaseException, layers: Mapping[int, MoE]) -> int | None:
    """Return the block number of the layer whose forward, or repeated forward, raised ``error``."""
    # no layer pays for this: what was running when it happened is in the traceback
    known = {id(module): number for number, layer in layers.items() for module in layer.modules()}
    trace, found = error.__traceback__, None
    while trace is not None:
        values = trace.tb_frame.f_locals
        found = next((known[id(values[n])] for n in ("self", "experts") if id(values.get(n)) in known), found)
        trace = trace.tb_next
    return found
