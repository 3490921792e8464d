"""Every public op keeps its dtypes under autocast, whether it is on in the forward pass, the backward pass or both.

S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K routed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from equimoe.kernels.permute import combine, permute
from equimoe.kernels.sort_by_expert import ExpertOrder, sort_by_expert
from equimoe.kernels.topk_gate import topk_gate
from tests.helpers.fake_cuda import needs_fake_cuda, on_fake_cuda

S, K, D, F, E = 6, 2, 16, 8, 3
#: takes the backend, a function that makes leaf tensors, and the order; returns the outputs
Op = Callable[[str, Callable[..., Tensor], ExpertOrder], list[Tensor]]


def _gate(backend: str, leaf: Callable[..., Tensor], order: ExpertOrder) -> list[Tensor]:
    gate = topk_gate(leaf(S, E), K, mask_T=order.inverse_SK[:, 0] >= 0, backend=backend)
    return [gate.weights_TK, gate.prob_sums_BE, gate.z_sum]


def _sort(backend: str, leaf: Callable[..., Tensor], order: ExpertOrder) -> list[Tensor]:
    return list(sort_by_expert(order.inverse_SK.clamp(max=E - 1), E, backend=backend))


def _gemm(backend: str, leaf: Callable[..., Tensor], order: ExpertOrder) -> list[Tensor]:
    return [grouped_gemm(leaf(S, D), leaf(E, F, D), order.offsets_E, order.order_R // K, backend=backend)]


def _dgrad(backend: str, leaf: Callable[..., Tensor], order: ExpertOrder) -> list[Tensor]:
    return [grouped_gemm_dgrad(leaf(S * K, F), leaf(E, F, D), order.offsets_E, backend=backend)]


def _wgrad(backend: str, leaf: Callable[..., Tensor], order: ExpertOrder) -> list[Tensor]:
    rows = (leaf(S * K, F), leaf(S, D), order.offsets_E, None, order.order_R // K)
    out = torch.ones(E, F, D, device=order.order_R.device)
    return [grouped_gemm_wgrad(*rows, backend=backend), grouped_gemm_wgrad(*rows, out=out, backend=backend)]


#: ops whose outputs and gradients do not depend on autocast
OPS: dict[str, Op] = {
    "topk_gate": _gate,
    "sort_by_expert": _sort,
    "permute": lambda backend, leaf, order: [permute(leaf(S, D), order, backend=backend)],
    "combine": lambda backend, leaf, order: [combine(leaf(S * K, D), order, backend=backend)],
    "grouped_gemm": _gemm,
    "grouped_gemm_dgrad": _dgrad,
    "grouped_gemm_wgrad": _wgrad,
}
#: whether autocast is on in the forward and in the backward pass
PLACES = {"forward": (True, False), "backward": (False, True), "both": (True, True)}


def order_of(device: str = "cpu") -> ExpertOrder:
    ids_SK = torch.tensor([[0, 2], [2, -1], [2, 0], [-1, -1], [0, 2], [2, 0]], device=device)
    return sort_by_expert(ids_SK, E, backend="torch")


def autocast(device: str, dtype: torch.dtype, enabled: bool) -> Any:
    return torch.autocast(device, dtype) if enabled else nullcontext()


def run(
    op: Op, backend: str, rows: torch.dtype, cast: torch.dtype, places: tuple[bool, bool], device: str = "cpu"
) -> list[Tensor]:
    """Return outputs, then gradients, with autocast to ``cast`` on in the passes that ``places`` selects."""
    generator, leaves, order = torch.Generator().manual_seed(0), [], order_of(device)

    def leaf(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=None if device == "cuda" else generator, device=device)
        leaves.append(values.to(rows).requires_grad_())
        return leaves[-1]

    with autocast(device, cast, places[0]):
        outputs = op(backend, leaf, order)
    found = [*(y.detach() for y in outputs)]
    if outputs[0].requires_grad:
        grads = [torch.ones_like(y) if y.dim() < 2 else torch.full_like(y, 0.3) for y in outputs]
        with autocast(device, cast, places[1]):
            found += torch.autograd.grad(outputs, leaves, grads)
    return found


@pytest.mark.parametrize("name", OPS)
def test_nothing_changes(name: str, backend: str) -> None:
    for rows in (torch.float32, torch.bfloat16, torch.float64):
        if rows == torch.float64 and backend == "triton":
            continue  # Triton lacks fp64
        plain = run(OPS[name], backend, rows, rows, (False, False))
        for cast in (torch.bfloat16, torch.float16):
            for place, places in PLACES.items():
                for found, want in zip(run(OPS[name], backend, rows, cast, places), plain, strict=True):
                    assert found.dtype == want.dtype and torch.equal(found, want), (rows, cast, place)


def experts(backend: str, leaf: Callable[..., Tensor], order: ExpertOrder) -> list[Tensor]:
    return [expert_mlp(leaf(S, D), leaf(S, K), order, leaf(E, 2 * F, D), leaf(E, D, F), backend=backend)]


def test_experts_compute_in_autocasts_dtype(backend: str) -> None:
    """Autocast in the forward equals casting by hand; in the backward it changes nothing."""
    for cast in (torch.bfloat16, torch.float16):

        def by_hand(backend: str, leaf: Callable[..., Tensor], order: ExpertOrder, to: torch.dtype = cast):
            x, weights, gate_up, down = leaf(S, D), leaf(S, K), leaf(E, 2 * F, D), leaf(E, D, F)
            return [expert_mlp(x.to(to), weights, order, gate_up.to(to), down.to(to), backend=backend)]

        wants = {"forward": by_hand, "both": by_hand, "backward": experts}
        for place, op in wants.items():
            want = run(op, backend, torch.float32, cast, (False, False))
            found = run(experts, backend, torch.float32, cast, PLACES[place])
            assert found[0].dtype == (torch.float32 if place == "backward" else cast)
            assert all(grad.dtype == torch.float32 for grad in found[1:])
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True)), (cast, place)


class Products(TorchDispatchMode):
    """Records the dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm"):
            self.dtypes |= {str(t.dtype) for t in args if isinstance(t, Tensor) and t.is_floating_point()}
        return func(*args, **(kwargs or {}))


def _on_a_gpu(backends: tuple[str, ...]) -> Iterator[tuple[str, list[str], list[str], set[str]]]:
    """Yield for every op on a fake GPU: case, dtypes without and with autocast, and the dtypes of its products."""
    for backend in backends:
        for name, op in OPS.items():
            for cast in (torch.bfloat16, torch.float16):
                plain = run(op, backend, torch.float32, cast, (False, False), "cuda")
                for place, places in PLACES.items():
                    with Products() as products:
                        found = run(op, backend, torch.float32, cast, places, "cuda")
                    dtypes = ([str(t.dtype) for t in tensors] for tensors in (plain, found))
                    yield f"{backend} {name} {cast} {place}", *dtypes, products.dtypes


class TestOnAFakeGPU:
    pytestmark = needs_fake_cuda

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    def test_dtypes(self, backend: str) -> None:
        if backend == "triton":
            pytest.importorskip("triton")
        cases = on_fake_cuda(lambda: list(_on_a_gpu((backend,))))
        assert len(cases) == 6 * len(OPS)
        for case, plain, found, products in cases:
            assert found == plain, case
            assert products <= {"torch.float32"}, case
        if backend == "torch":
            assert any(products for *_, products in cases)
