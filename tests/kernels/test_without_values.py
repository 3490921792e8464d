"""Every public op on tensors without values (meta, FakeTensorMode), and under a default device other than the input's.

S source rows, K choices per row, D hidden, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from equimoe.kernels.expert_mlp import expert_mlp  # noqa: E402
from equimoe.kernels.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad  # noqa: E402
from equimoe.kernels.permute import combine, permute  # noqa: E402
from equimoe.kernels.router_logits import router_logits  # noqa: E402
from equimoe.kernels.sort_by_expert import sort_by_expert  # noqa: E402
from equimoe.kernels.topk_gate import topk_gate  # noqa: E402

S, K, D, F, E = 6, 2, 8, 16, 3
#: makes the named input; floating-point inputs require gradients
Inputs = Callable[..., Tensor]


def _sort(make: Inputs, backend: str) -> tuple[Tensor, ...]:
    return sort_by_expert(make("ids", S, K), E, backend=backend)


def _permute(make: Inputs, backend: str) -> tuple[Tensor, ...]:
    order = sort_by_expert(make("ids", S, K), E, backend=backend)
    return permute(make("x", S, D), order, 7, backend=backend), combine(make("rows", S * K, D), order, backend=backend)


def _gate(make: Inputs, backend: str) -> tuple[Tensor, ...]:
    how = {"bias_E": make("bias", D).detach(), "groups": 4, "kept_groups": 2, "sequences": 2, "backend": backend}
    first = topk_gate(make("x", S, D), K, score="sigmoid", mask_T=make("mask", S), **how)
    return *first, *topk_gate(make("x", S, D), K, ids_TK=make("given", S, K), backend=backend)


def _gemm(make: Inputs, backend: str) -> tuple[Tensor, ...]:
    offsets_E = make("offsets", E + 1)
    return (
        grouped_gemm(make("x", S, D), make("weight", E, F, D), offsets_E, make("index", S), backend=backend),
        grouped_gemm_dgrad(make("dy", S, F), make("weight", E, F, D), offsets_E, backend=backend),
        grouped_gemm_wgrad(make("dy", S, F), make("x", S, D), offsets_E, index_R=make("index", S), backend=backend),
    )


def _mlp(make: Inputs, backend: str) -> tuple[Tensor, ...]:
    order = sort_by_expert(make("ids", S, K), E, backend=backend)
    weights = make("gate_up", E, 2 * F, D), make("down", E, D, F)
    return (expert_mlp(make("x", S, D), make("weights", S, K), order, *weights, backend=backend),)


def _logits(make: Inputs, backend: str) -> tuple[Tensor, ...]:
    return (router_logits(make("x", S, D).bfloat16(), make("weight", E, D), backend=backend),)


OPS = {"sort_by_expert": _sort, "permute, combine": _permute, "topk_gate": _gate, "grouped_gemm": _gemm}
OPS |= {"expert_mlp": _mlp, "router_logits": _logits}


def results(op: str, backend: str, device: str) -> list[Tensor]:
    """Return the outputs and every gradient."""
    generator, leaves = torch.Generator().manual_seed(0), []

    def make(name: str, *shape: int) -> Tensor:
        if name in ("ids", "given", "index"):
            high = {"ids": E, "given": D, "index": S}[name]
            t = torch.randint(-1 if name == "ids" else 0, high, shape, generator=generator, device="cpu")
        elif name == "offsets":
            t = torch.tensor([0, 3, 3, 5], device="cpu")
        elif name == "mask":
            t = torch.tensor([True] * (S - 1) + [False], device="cpu")
        else:
            t = torch.randn(shape, generator=generator, device="cpu")
        t = t.to(device)
        if t.is_floating_point():
            leaves.append(t.requires_grad_())
        return t

    outputs = OPS[op](make, backend)
    loss = sum((y.sum() for y in outputs if y.requires_grad), torch.zeros((), device=device))
    grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else ()
    return [*outputs, *(g for g in grads if g is not None)]


@pytest.fixture(params=["meta", "fake", "default device"])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    mode = FakeTensorMode() if request.param == "fake" else nullcontext()
    torch.set_default_device("meta" if request.param == "default device" else None)
    with mode:
        yield request.param
    torch.set_default_device(None)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_shapes_without_values(op: str, backend: str, place: str) -> None:
    device = "meta" if place == "meta" else "cpu"
    found = results(op, backend, device)
    with torch.utils._python_dispatch._disable_current_modes(), torch.device("cpu"):
        expected = results(op, backend, "cpu")
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, device)
        if place == "default device":
            assert torch.equal(a, b)
