"""What the forward of an autograd function returns, so that compilers differentiate it right."""

from __future__ import annotations

import torch
from torch import Tensor


def result(t: Tensor) -> Tensor:
    """Return ``t``, the output of a forward that writes in place; in compiled code a copy, which compilers remove.

    Where a traced forward returns the result of an in-place operation, torch 2.11 passes the wrong gradient on.
    """
    return t.clone() if torch.compiler.is_compiling() else t
