"""The routed experts: MLPs on rows of any rank.  E experts, F width, D hidden, S source rows, K choices of a row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...kernels import autocast_dtype
from ...kernels.expert_mlp import MainGrads, expert_mlp
from ..collectives import Route, fill_normal, gathered_weights, start_sparse_all_gather
from ..types import DispatchPlan
from .casts import KeptCasts
from .main_grads import weight_of
from .replicated import ReplicatedExperts


class RoutedExperts(nn.Module):
    """E MLPs in two stacked weights, in the layout of Hugging Face transformers v5.

    ``gate_up_proj`` is [E, 2F, D] with the gate rows first, or [E, F, D] if the experts are not ``gated``;
    ``down_proj`` is [E, D, F]. Under expert parallelism both are DTensors sharded over E, and each rank computes with
    its own experts. Under expert tensor parallelism ``gate_up_proj`` is [E, 2, F, D], sharded over F. See
    :func:`expert_mlp` for ``activation`` and ``recompute``.
    """

    #: the weights in the dtype in which the experts compute, within :func:`cast_once`
    casts: KeptCasts | None = None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        width: int,
        backend: str,
        init_std: float,
        activation: str = "silu",
        gated: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.mlp = partial(expert_mlp, backend=backend, activation=activation, gated=gated, recompute=recompute)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width if gated else width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        self.init_std = init_std
        #: dtype in which the experts compute; None: that of their weights
        self.dtype: torch.dtype | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights with new random values."""
        for weight in self.parameters():
            fill_normal(weight, self.init_std)

    def forward(self, rows_SD: Tensor, plan: DispatchPlan) -> Tensor:
        """Return each source row's weighted sum over its experts on this rank, [S, D]."""
        (gate_up, gate_up_grad), (down, down_grad) = self._cast(self._dtype())
        gate_up_grad = None if gate_up_grad is None else gate_up_grad.flatten(1, -2)
        return self.compute(rows_SD, plan, gate_up, down, (gate_up_grad, down_grad))

    def compute(
        self,
        rows_SD: Tensor,
        plan: DispatchPlan,
        gate_up: Tensor,
        down: Tensor,
        main_grads: MainGrads = (None, None),
    ) -> Tensor:
        """Do the same with these weights, of any number of experts, and their main gradients."""
        rows = rows_SD, plan.weights_SK, plan.order
        return self.mlp(*rows, gate_up.flatten(1, -2), down, main_grads=main_grads)

    def replicated(self, route: Route, first: ReplicatedExperts | None = None) -> ReplicatedExperts:
        """Start to copy experts between ranks, and return this rank's own experts together with those it gets.

        With ``first``, those it gets come after the experts that ``first`` has.

        Under autocast, weights travel in the dtype in which the experts compute.
        """
        dtype = self._dtype()
        return ReplicatedExperts(self.compute, lambda: start_sparse_all_gather(self._weights(dtype), route), first)

    def _weights(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Return this rank's part of the weights, in ``dtype`` if it is given."""
        (gate_up, _), (down, _) = self._cast(dtype)
        return gate_up, down

    def _cast(self, dtype: torch.dtype | None) -> list[tuple[Tensor, Tensor | None]]:
        """Return the same, each with its main gradient."""
        casts = None if torch.compiler.is_compiling() else self.casts  # a graph would read a cast that has been freed
        return [weight_of(weight, dtype, casts) for weight in (self.gate_up_proj, self.down_proj)]

    def _dtype(self) -> torch.dtype | None:
        """Return the dtype in which the experts compute; None: that of their weights."""
        if self.dtype is not None or self.down_proj.dtype == torch.float64:
            return self.dtype
        return autocast_dtype(self.down_proj.device)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "casts"}


@contextmanager
def cast_once(*models: nn.Module) -> Iterator[None]:
    """Within the block, cast the experts' weights once for all forwards, and not in each of them.

    Enter it for the micro-batches of a step if the weights are fp32 and autocast computes in 16 bits. Gradients are the
    same, bit for bit. The casts take the memory of this rank's routed experts in 16 bits; they are made when they are
    first needed, and freed at the end of the block.

    After a step of a torch optimizer, or any other change in place that torch counts, weights are cast again. Leave the
    block before you change them otherwise: by ``weight.data.copy_``, through numpy, or by a collective such as
    ``dist.all_reduce(weight)``. Weights that FSDP or ZeRO-3 gathers are cast as without the block; so is everything in
    compiled and captured graphs, and under selective checkpointing.
    """
    for model in models:
        if not isinstance(model, nn.Module):
            raise TypeError(f"models={type(model).__name__}: must be modules; pass several as cast_once(*models)")
    found = dict.fromkeys(m for model in models for m in model.modules() if isinstance(m, RoutedExperts))
    gathered = set(gathered_weights(models))  # FSDP fills them again, which torch does not count
    made = {
        experts: KeptCasts(weight for weight in experts.parameters(recurse=False) if weight not in gathered)
        for experts in found
        if experts.casts is None
    }

    def forget(*_: Any) -> None:
        for casts in made.values():
            casts.forget()

    hook = register_optimizer_step_post_hook(forget)
    try:
        for experts, casts in made.items():
            experts.casts = casts
        yield
    finally:
        hook.remove()
        for experts in made:
            experts.casts = None
