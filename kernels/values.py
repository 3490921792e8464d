"""When an op may look at the values that it was given, to check them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def readable(t: Tensor) -> bool:
    """Whether a tensor has values, and reading them makes nobody wait: on the CPU, but not in a trace or a dry run."""
    return not torch.compiler.is_compiling() and t.device.type == "cpu" and not isinstance(t, FakeTensor)
