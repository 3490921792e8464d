"""Corrections of Triton's interpreter, which runs kernels on numpy where there is no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

BUILDER = interpreter.InterpreterBuilder


def correct_interpreter() -> None:
    """Make it multiply bfloat16 tiles, round to bfloat16, and run loops with numpy 2.4. Idempotent."""
    _widen_dot()
    _round_casts()
    _index_arrays()


def _widen_dot() -> None:
    """numpy has no bfloat16: the interpreter keeps the bits as uint16, and `tl.dot` multiplies those integers.

    Widening both operands to fp32 first is exact, and is what the hardware does. Everything else in bfloat16 is wrong
    as well, which is why the kernels upcast right after every load that does not feed `tl.dot`.
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
    """The interpreter cuts fp32 off to bfloat16, which doubles the error; GPUs round to the nearest, ties to even."""
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
    """The bits, in uint16, of fp32 numbers rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    data = np.asarray(data, dtype=np.float32)
    bits = np.ascontiguousarray(data).view(np.uint32).reshape(data.shape).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def _index_arrays() -> None:
    """Triton 3.6 takes the one number of a 1-element array for a loop's bound, which numpy 2.4 no longer does."""
    plain = interpreter._patch_lang_tensor
    if getattr(plain, "indexes_arrays", False):
        return

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        plain(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(()))

    patch_lang_tensor.indexes_arrays = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch_lang_tensor
