"""Contestants that compute the experts for given routing: ours, a loop, torch's grouped product, a dense feed-forward.

All take the same tensors (hidden states, router weights, expert ids) and return gradients for all of them. A contestant
is built for one shape. It may store the weights in its own layout; ``restore`` converts their gradients to our layout,
so that all contestants pass the same checks.
"""

# T tokens, D hidden, F expert width, E experts, K top-k, R = T*K routed rows.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shared.records import OURS
from benchmarks.shared.shapes import Batch, Shape, unit_random
from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.sort_by_expert import sort_by_expert

LOOP, GROUPED, COMPILED, DENSE = "loop", "grouped_mm", "grouped_mm compiled", "dense"

Path = Callable[[Tensor, Tensor, Tensor], Tensor]


class Absent(Exception):
    """A contestant cannot take part; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """One implementation: ``run(x_TD, weights_TK, ids_TK)`` returns y [T, D]; ``leaves`` are its weights."""

    run: Path
    leaves: tuple[Tensor, ...]
    #: converts gradients (or values) of ``leaves`` to our layout
    restore: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] = tuple
    #: whether it uses the given routing, and so computes the same as the others
    routed: bool = True

    def step(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return output and gradients: of x, of the router weights if ``routed``, and of ``leaves``."""
        y_TD = self.run(batch.x_TD, batch.weights_TK, batch.ids_TK)
        inputs = (batch.x_TD, batch.weights_TK) if self.routed else (batch.x_TD,)
        grads = torch.autograd.grad(y_TD, (*inputs, *self.leaves), batch.dy_TD)
        first, rest = grads[: len(inputs)], grads[len(inputs) :]
        return y_TD.detach(), *first, *self.restore(rest)


def build_ours(shape: Shape, gate_up: nn.Parameter, down: nn.Parameter, backend: str) -> Contestant:
    def run(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        order = sort_by_expert(ids_TK, shape.E, backend=backend)
        return expert_mlp(x_TD, weights_TK, order, gate_up, down, backend=backend)

    return Contestant(run, (gate_up, down))


def build_loop(shape: Shape, gate_up: nn.Parameter, down: nn.Parameter) -> Contestant:
    """Multiply sorted rows expert by expert. The weights are unbound once, so that no gradient is padded with zeros."""

    def run(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        flat_R = ids_TK.reshape(-1).argsort(stable=True)
        counts = ids_TK.reshape(-1).bincount(minlength=shape.E).tolist()
        source_R = flat_R // shape.K
        rows = []
        gate_ups, downs = gate_up.unbind(0), down.unbind(0)
        for x_ND, gate_up_FD, down_DF in zip(x_TD[source_R].split(counts), gate_ups, downs, strict=True):
            gate, up = F.linear(x_ND, gate_up_FD).chunk(2, dim=1)
            rows.append(F.linear(F.silu(gate) * up, down_DF))
        weighted_RD = torch.cat(rows) * weights_TK.reshape(-1)[flat_R, None].to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, source_R, weighted_RD)

    return Contestant(run, (gate_up, down))


def _product() -> Callable[..., Tensor]:
    found = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if found is None:
        raise Absent(f"torch {torch.__version__} has no grouped_mm")
    return found


def build_grouped(shape: Shape, gate_up: nn.Parameter, down: nn.Parameter, compiled: bool = False) -> Contestant:
    """Use torch's grouped product between a gather and a sum over k, with nothing fused."""
    product = _product()
    if gate_up.device.type == "cuda" and gate_up.dtype != torch.bfloat16:
        raise Absent(f"on a GPU it supports bfloat16 only, not {gate_up.dtype}")
    if shape.D % 8 or shape.F % 8:
        raise Absent(f"it needs rows of multiples of 16 bytes; here they have {shape.D} and {shape.F} elements")

    def run(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        ids_R, flat_R = ids_TK.reshape(-1).sort(stable=True)
        experts_E = torch.arange(1, shape.E + 1, device=ids_R.device)
        ends_E = torch.searchsorted(ids_R, experts_E).to(torch.int32)
        place_R = torch.empty_like(flat_R).scatter_(0, flat_R, torch.arange(flat_R.numel(), device=flat_R.device))
        gate, up = product(x_TD[flat_R // shape.K], gate_up.mT, offs=ends_E).chunk(2, dim=1)
        out_RD = product(F.silu(gate) * up, down.mT, offs=ends_E)
        out_TKD = out_RD[place_R].view(shape.T, shape.K, shape.D)
        return (out_TKD * weights_TK[:, :, None].to(out_TKD.dtype)).sum(1)

    return Contestant(torch.compile(run, dynamic=False) if compiled else run, (gate_up, down))


def build_dense(shape: Shape, gate_up: nn.Parameter, down: nn.Parameter) -> Contestant:
    """Build a dense feed-forward of width K * F: as many operations per token, without routing."""
    width, like = shape.K * shape.F, gate_up
    wide = nn.Parameter(unit_random((2 * width, shape.D), like.dtype, like.device, shape.D**-0.5))
    back = nn.Parameter(unit_random((shape.D, width), like.dtype, like.device, width**-0.5))

    def run(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        gate, up = F.linear(x_TD, wide).chunk(2, dim=1)
        return F.linear(F.silu(gate) * up, back)

    return Contestant(run, (wide, back), routed=False)


def own(backend: str, compiled: bool) -> dict[str, Callable[..., Contestant]]:
    """Return builders of the contestants that need only torch; each takes a shape and the two weights."""
    builders: dict[str, Callable[..., Contestant]] = {
        OURS: lambda *given: build_ours(*given, backend=backend),
        LOOP: build_loop,
        GROUPED: build_grouped,
        DENSE: build_dense,
    }
    if compiled:
        builders[COMPILED] = lambda *given: build_grouped(*given, compiled=True)
    return builders


def build_all(
    builders: dict[str, Callable[..., Contestant]], *given: Any
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Build all contestants; return them, and the reasons for those that cannot be built."""
    built, absent = {}, {}
    for name, build in builders.items():
        try:
            built[name] = build(*given)
        except Absent as reason:
            absent[name] = str(reason)
        except ImportError as error:
            absent[name] = f"not installed ({error.name or error})"
    return built, absent
