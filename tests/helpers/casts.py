"""Counts how often expert weights are cast, and switches off that casts are kept."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from equimoe.moe.experts import RoutedExperts
from equimoe.moe.experts.casts import KeptCasts


class Casts(TorchDispatchMode):
    """Counts the casts of the expert weights of ``model`` while it is active, in forwards and in backwards.

    ``bytes`` are what these casts read and write.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        weights = [w for m in model.modules() if isinstance(m, RoutedExperts) for w in m.parameters(recurse=False)]
        self.weights = [(w.to_local() if isinstance(w, DTensor) else w).untyped_storage() for w in weights]
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype:
            storage = args[0].untyped_storage()
            if any(storage is weight for weight in self.weights):
                self.count += 1
                self.bytes += args[0].nbytes + result.nbytes
        return result


def always_cast() -> AbstractContextManager[object]:
    """Context in which no cast is kept: every forward casts its weights."""
    return mock.patch.object(KeptCasts, "of", lambda *_: None)
