"""An optimizer that records what an engine under test gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Recorded:
    """Makes optimizers (plain SGD by default), and records gradients and parameters by name and whole."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **how: Any) -> None:
        self.make, self.how = make, how
        self.trained: dict[str, torch.nn.Parameter] = {}
        #: gradients of each optimizer step after clipping, without weights that had none
        self.gradients: list[dict[str, Tensor]] = []

    def __call__(self, trainable: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        first = not self.trained
        self.trained.update(trainable)
        made = self.make(trainable.values(), foreach=False, **self.how)
        if first:
            made.register_step_pre_hook(self._see)
        return made

    def _see(self, *_: Any) -> None:
        self.gradients.append({name: full(p.grad) for name, p in self.trained.items() if p.grad is not None})

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: full(p) for name, p in self.trained.items()}


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded."""
    whole = getattr(tensor, "full_tensor", None)
    return (tensor if whole is None else whole()).detach().clone()
