"""Test cases for expert_mlp: inputs, comparison with the fp64 reference, and a check that the host never waits.

S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K routed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from equimoe.kernels.cpu import expert_mlp as loop
from equimoe.kernels.expert_mlp import accelerator, expert_mlp, torch_ops
from equimoe.kernels.grouped_gemm.row_layouts import BlockLayout
from equimoe.kernels.sort_by_expert import ExpertOrder, sort_by_expert

#: largest permitted error: relative by norm, and of the worst row relative to the rows' root mean square
TOLERANCE = {torch.float64: (1e-12, 1e-11), torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 1e-1)}
TOLERANCE[torch.float16] = (2e-3, 1e-2)
NAMES = ("x", "weights", "gate_up", "down")


@dataclass
class Case:
    """Unit-scale inputs of one call, and the gradient of its output."""

    ids_SK: Tensor
    order: ExpertOrder
    inputs: dict[str, Tensor]
    dy_SD: Tensor

    def rounded(self, dtype: torch.dtype) -> Case:
        """Round the inputs to ``dtype`` (weights: fp32), in fp64, so that only the op's own errors remain."""
        narrow = {name: t.to(torch.float32 if name == "weights" else dtype) for name, t in self.inputs.items()}
        inputs = {name: t.to(torch.float64) for name, t in narrow.items()}
        return Case(self.ids_SK, self.order, inputs, self.dy_SD.to(dtype).to(torch.float64))

    def run(self, path: str = "torch", dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Tensor]:
        """Return the output and the gradients by name."""
        backend = path if path in ("reference", "hybrid", "triton") else "torch"
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = {
            name: t.detach().to(wide if name == "weights" else dtype).requires_grad_()
            for name, t in self.inputs.items()
        }
        y_SD = call(leaves, self.order, backend, **options)
        grads = torch.autograd.grad(y_SD, list(leaves.values()), self.dy_SD.to(dtype))
        return {"y": y_SD.detach(), **dict(zip(NAMES, grads, strict=True))}


def call(leaves: dict[str, Tensor], order: ExpertOrder, backend: str = "torch", **options: Any) -> Tensor:
    inputs = (leaves["x"], leaves["weights"], order, leaves["gate_up"], leaves["down"])
    return expert_mlp(*inputs, backend=backend, **options)


def make(
    sources: int = 63,
    choices: int = 2,
    hidden: int = 31,
    width: int = 17,
    experts: int = 3,
    ids: str = "random",
    gated: bool = True,
) -> Case:
    generator = torch.Generator().manual_seed(sources + 7 * choices + 31 * hidden + 101 * width + 1009 * experts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids_SK = torch.randint(0, experts, (sources, choices), generator=generator)
    if ids == "some dropped":
        ids_SK[torch.rand(sources, choices, generator=generator) < 0.4] = -1
    elif ids == "one expert":
        ids_SK[:] = experts - 1
    elif ids == "duplicates":
        ids_SK[:, 1:] = ids_SK[:, :1]
    elif ids == "all dropped":
        ids_SK[:] = -1
    inputs = {
        "x": normal(sources, hidden),
        "weights": torch.rand(sources, choices, generator=generator, dtype=torch.float64),
        "gate_up": normal(experts, 2 * width if gated else width, hidden) / hidden**0.5,
        "down": normal(experts, hidden, width) / width**0.5,
    }
    return Case(ids_SK, sort_by_expert(ids_SK, experts), inputs, normal(sources, hidden))


@pytest.fixture(name="take_path")
def take_path_fixture(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the torch backend take a path.

    "loop" is that of many rows on a CPU; "grouped" and "blocks" are those of accelerators, with either row layout.
    """

    def choose(path: str) -> None:
        if path == "loop":
            monkeypatch.setattr(torch_ops, "_path", lambda *_: loop)
        if path in ("grouped", "blocks"):
            monkeypatch.setattr(torch_ops, "_path", lambda *_: accelerator)
        if path == "blocks":
            monkeypatch.setattr(
                accelerator, "row_layout", lambda offsets_E, num_rows, *_: BlockLayout(offsets_E, num_rows)
            )

    return choose


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    by_norm, by_row = TOLERANCE[dtype]
    for name, want in expected.items():
        got, want = found[name].double(), want.double()
        assert got.shape == want.shape and got.isfinite().all(), name
        zero = want == 0
        assert (got[zero] == 0).all() if zero.all(-1).any() or zero.all() else True, f"{name}: must be exactly zero"
        if want.norm() == 0:
            continue
        assert (got - want).norm() <= by_norm * want.norm(), name
        error_N, scale_N = ((t.reshape(-1, want.shape[-1]).norm(dim=1)) for t in (got - want, want))
        assert error_N.max() <= by_row * scale_N[scale_N > 0].square().mean().sqrt(), f"{name}: worst row"


class NoHostReads(TorchDispatchMode):
    """Fails if the host reads a tensor's value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero"), name
        return func(*args, **(kwargs or {}))
