"""Fixes for Triton's interpreter, which runs kernels with numpy on machines without a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

BUILDER = interpreter.InterpreterBuilder


def correct_interpreter() -> None:
    """Fix products of bfloat16 tiles, rounding to bfloat16, and loops under numpy 2.4. Idempotent."""
    _widen_dot()
    _round_casts()
    _index_arrays()


def _widen_dot() -> None:
    """Make `tl.dot` widen bfloat16 operands to fp32.

    numpy has no bfloat16, so the interpreter stores the bits as uint16, and its `tl.dot` multiplies these integers.
    Widening is exact, and hardware does the same. All other bfloat16 arithmetic is wrong too, so our kernels convert to
    fp32 right after every load that does not feed `tl.dot`.
    """
    plain = BUILDER.create_dot
    if getattr(plain, "widens_bfloat16", False):
        return

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        return plain(self, _widen(a), _widen(b), d, input_precision, max_num_imprecise_acc)

    create_dot.widens_bfloat16 = True  # type: ignore[attr-defined]
    BUILDER.create_dot = create_dot


def _widen(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round_casts() -> None:
    """Make casts to bfloat16 round to nearest, ties to even, as on GPUs; the interpreter truncates."""
    plain = BUILDER.cast_impl
    if getattr(plain, "rounds_bfloat16", False):
        return

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return plain(self, src, dst_type)
        return interpreter.TensorHandle(round_to_bfloat16(src.data), tl.bfloat16)

    cast_impl.rounds_bfloat16 = True  # type: ignore[attr-defined]
    BUILDER.cast_impl = cast_impl


def round_to_bfloat16(data: Any) -> Any:
    """Round fp32 numbers to the nearest bfloat16, ties to even, and return the bits as uint16. NaN stays NaN."""
    data = np.asarray(data, dtype=np.float32)
    bits = np.ascontiguousarray(data).view(np.uint32).reshape(data.shape).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def _index_arrays() -> None:
    """Let 1-element arrays be loop bounds. Triton 3.6 relies on this, and numpy 2.4 no longer permits it."""
    plain = interpreter._patch_lang_tensor
    if getattr(plain, "indexes_arrays", False):
        return

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        plain(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(()))

    patch_lang_tensor.indexes_arrays = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch_lang_tensor
