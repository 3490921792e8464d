"""Zeroes the weight gradients of experts without rows, which torch's grouped products do not write.

Only these gradients are written, and none is read; filling by a mask reads and writes the gradients of all experts.
"""

# E experts.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._ops import op
from .._triton import launch_on

#: elements of a program: each thread stores 64 bytes of a 16-bit gradient
_BLOCK, _WARPS = 4096, 4


@triton.jit
def _zero_kernel(grad_ptr, offsets_ptr, size, BLOCK: tl.constexpr):
    """Zero grad[e], of ``size`` elements, if offsets[e] equals offsets[e + 1]."""
    expert = tl.program_id(1)
    if tl.load(offsets_ptr + expert) == tl.load(offsets_ptr + expert + 1):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + expert.to(tl.int64) * size + i, zeros, mask=i < size)


@op("zero_without_rows", mutates_args=("grad_EOI",))
def zero_without_rows(grad_EOI: Tensor, offsets_E: Tensor) -> None:
    """Zero the contiguous ``grad_EOI`` in place where ``offsets_E`` [E + 1] give an expert no rows."""
    if grad_EOI.numel():
        experts, size = grad_EOI.shape[0], grad_EOI[0].numel()
        with launch_on(grad_EOI):
            _zero_kernel[(triton.cdiv(size, _BLOCK), experts)](
                grad_EOI, offsets_E.contiguous(), size, BLOCK=_BLOCK, num_warps=_WARPS
            )


@zero_without_rows.register_fake
def _(grad_EOI: Tensor, offsets_E: Tensor) -> None:
    pass
