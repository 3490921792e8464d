"""Which backend ``backend="auto"`` is, by chip, op, dtype and size.

On a CPU it is torch. On a GPU it is what auto.json says, a table that ``make tune`` measures. On a chip that nobody has
measured, it is Triton for what moves rows and for routers, and for the experts torch's grouped products with Triton
between them ("hybrid"; Triton alone for the dtypes and widths that torch's products do not take). Before a backend is
used for the first time in a process, it is compared with the reference on that device; if it is wrong there, or does
not compile, torch takes its place, with a warning.
"""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .checks import has_values
from .matmul_tiles import BUCKETS, MANY_ROWS, arch_of

TABLE = Path(__file__).with_name("auto.json")
#: what a chip without measurements uses; "hybrid" stands for "triton" where torch's grouped products do not fit
UNMEASURED = {
    "sort_by_expert": "triton",
    "permute": "triton",
    "combine": "triton",
    "expert_mlp": "hybrid",
    "router_logits": "triton",
    "topk_gate": "triton",
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def key(op: str, dtype: torch.dtype, many: bool) -> str:
    """Return the name of a case in the table, such as "expert_mlp bfloat16 many"."""
    return f"{op} {str(dtype).removeprefix('torch.')} {BUCKETS[many]}"


def automatic(op: str, rows: Tensor, num_rows: int = 0, experts: int = 1, widths: tuple[int, ...] = ()) -> str:
    """Return the backend of ``op`` for ``rows``.

    ``num_rows`` is how many routed rows the ``experts`` get together; ``widths`` are those of their matrices.
    """
    if rows.device.type != "cuda" or (op != "sort_by_expert" and rows.dtype not in _FLOATS):
        return "torch"
    fits = rows.dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)
    return _chosen(op, rows.device, rows.dtype, num_rows >= MANY_ROWS * experts, fits, has_values(rows))


def _chosen(op: str, device: torch.device, dtype: torch.dtype, many: bool, fits: bool, values: bool) -> str:
    backend = _table().get(arch_of(device), {}).get(key(op, dtype, many), UNMEASURED.get(op, "torch"))
    if backend == "hybrid" and not fits:
        backend = "triton"
    if backend == "torch" or not values:
        return backend
    return backend if _works(op, backend, dtype, device) else "torch"


# torch.compiler.assume_constant_result does just this, but imports torch's compiler
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _table() -> dict[str, dict[str, str]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def _works(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether a backend is right on a device. While a CUDA graph is captured, only what is known counts."""
    if (op, backend, dtype, device) not in _known:
        if torch.cuda.is_current_stream_capturing():
            return False
        with torch.inference_mode(False), torch.enable_grad():
            _known[op, backend, dtype, device] = _compare(op, backend, dtype, device)
    return _known[op, backend, dtype, device]


#: what the comparisons of this process found, by op, backend, dtype and device
_known: dict[tuple[str, str, torch.dtype, torch.device], bool] = {}


def _compare(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> bool:
    from .self_check import error_of  # imported late, because the ops import this module

    try:
        error, largest = error_of(op, backend, dtype, device)
    except Exception as problem:  # whatever the compiler or the driver raises
        reason = f"raises {type(problem).__name__}: {problem}"
    else:
        if error <= largest:
            return True
        reason = f"has a relative error of {error:.1e}, above {largest:.0e}"
    warnings.warn(
        f"backend='auto': on {device}, {op} in {dtype} with backend={backend!r} {reason}; torch takes its place. "
        "Please report this, with the versions of torch and triton.",
        stacklevel=2,
    )
    return False
