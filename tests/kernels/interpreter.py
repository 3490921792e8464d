"""Makes Triton's interpreter multiply bfloat16 tiles correctly; import this before launching a kernel in a test.

numpy has no bfloat16: the interpreter keeps the bits as uint16 and `tl.dot` multiplies those integers. Widening both
operands to float32 first is exact, and is what the hardware does. Everything else in bfloat16 is wrong in the
interpreter too, which is why the kernels upcast right after every load that does not feed `tl.dot`.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

BUILDER = interpreter.InterpreterBuilder


def _widen(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def patch_dot() -> None:
    """Idempotent: a second import, under another module name, must not widen twice."""
    if getattr(BUILDER.create_dot, "widens_bfloat16", False):
        return
    plain = BUILDER.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return plain(self, _widen(a), _widen(b), d, input_precision, max_num_imprecise_acc)

    create_dot.widens_bfloat16 = True
    BUILDER.create_dot = create_dot


def patch_index() -> None:
    """Triton 3.6 takes the one number of a 1-element array for a loop's bound, which numpy 2.4 no longer does."""
    plain = interpreter._patch_lang_tensor
    if getattr(plain, "indexes_arrays", False):
        return

    def patch_lang_tensor(tensor, *scope):
        plain(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(()))

    patch_lang_tensor.indexes_arrays = True
    interpreter._patch_lang_tensor = patch_lang_tensor


patch_dot()
patch_index()
