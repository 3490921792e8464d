"""An optimizer for engines under test that keeps what it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Recorded:
    """Makes optimizers (by default plain SGD) and remembers, by name and whole, what they see."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **how: Any) -> None:
        self.make, self.how = make, how
        self.trained: dict[str, torch.nn.Parameter] = {}
        #: of each optimizer step, after clipping; without the weights that had none
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
    """The whole of a tensor that may be split."""
    whole = getattr(tensor, "full_tensor", None)
    return (tensor if whole is None else whole()).detach().clone()
