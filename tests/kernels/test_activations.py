"""Every activation on every backend: gated or not, with the pre-activation kept or recomputed.

S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K routed rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.kernels import expert_mlp as expert_op
from equimoe.kernels import grouped_gemm as gemm_op
from equimoe.kernels.expert_mlp import ACTIVATIONS, expert_mlp
from equimoe.kernels.sort_by_expert import sort_by_expert
from equimoe.moe import MoEConfig
from equimoe.moe.experts import RoutedExperts
from equimoe.moe.types import DispatchPlan
from tests.helpers.slow import slow_but

from .mlp_cases import NAMES, call, compare, make, take_path_fixture  # noqa: F401

HAS_TRITON = find_spec("triton") is not None and not torch.cuda.is_available()
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs triton's interpreter"))
HYBRID = pytest.param("hybrid", marks=TRITON.marks)
PATHS = ("torch", "grouped", "blocks", HYBRID, TRITON)
KINDS = [(activation, gated) for activation in ACTIVATIONS for gated in (True, False)]


@pytest.mark.parametrize(
    ("dtype", "recompute"),
    slow_but(
        [(torch.bfloat16, False)],
        [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ),
)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_against_fp64(
    activation: str, gated: bool, path: str, dtype: torch.dtype, recompute: bool, take_path: Callable[[str], None]
) -> None:
    case = make(13, 2, 24, 24, 3, ids="some dropped", gated=gated).rounded(dtype)
    options: dict[str, Any] = {"activation": activation, "gated": gated}
    expected = case.run("reference", **options)
    take_path(path)
    compare(case.run(path, dtype, **options, recompute=recompute), expected, dtype)


FORMULAS: dict[str, Callable[[float], float]] = {
    "silu": lambda z: z / (1 + math.exp(-z)),
    "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
    "relu2": lambda z: max(z, 0.0) ** 2,
}


@pytest.mark.parametrize("x", [-1.5, 0.7])
@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_the_formula_by_hand(activation: str, gated: bool, x: float) -> None:
    """One row, one expert, scalars. This checks the reference, and the other tests compare the backends with it."""
    w, g, u, d = 0.25, 0.8, -1.1, 2.0
    order = sort_by_expert(torch.zeros(1, 1, dtype=torch.int64), 1)
    gate_up, down, weight, x_SD = (
        torch.tensor(t, dtype=torch.float64) for t in ([[[g], [u]][: 1 + gated]], [[[d]]], [[w]], [[x]])
    )
    y = expert_mlp(x_SD, weight, order, gate_up, down, "reference", activation=activation, gated=gated)
    assert y.item() == pytest.approx(w * FORMULAS[activation](x * g) * (x * u if gated else 1) * d, rel=1e-12)


@pytest.mark.parametrize("path", ["torch", "blocks"])
@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_gradcheck(activation: str, gated: bool, path: str, take_path: Callable[[str], None]) -> None:
    case = make(5, 2, 3, 4, 3, ids="some dropped", gated=gated)
    take_path(path)
    leaves = [t.clone().requires_grad_() for t in case.inputs.values()]

    def run(*tensors: Tensor) -> Tensor:
        return call(dict(zip(NAMES, tensors, strict=True)), case.order, activation=activation, gated=gated)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bad_number_is_not_hidden(activation: str, path: str, take_path: Callable[[str], None]) -> None:
    case = make(6, 1, 16, 8, 2, gated=False)
    case.inputs["x"][2] = float("nan")
    take_path(path)
    y_SD = case.run(path, torch.float32, activation=activation, gated=False)["y"]
    assert y_SD[2].isnan().all() and y_SD[:2].isfinite().all() and y_SD[3:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_recomputed_gradients_are_the_same(path: str, dtype: torch.dtype, take_path: Callable[[str], None]) -> None:
    """They agree bit for bit, because every path recomputes the product in the same way."""
    case = make(15, 2, 24, 16, 3, ids="some dropped")
    take_path(path)
    kept, again = (case.run(path, dtype, recompute=recompute) for recompute in (False, True))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("path", ["torch", "grouped", TRITON])
def test_what_is_kept_to_the_byte(path: str, gated: bool, take_path: Callable[[str], None]) -> None:
    """Besides the parameters: x, the router's weights, the indices, and the pre-activation unless it is recomputed.

    Where there are few rows on a CPU, also which rows they are of, unless it is recomputed.
    """
    sources, choices, hidden, width, experts = 32, 2, 16, 24, 4
    case = make(sources, choices, hidden, width, experts, gated=gated)
    case.ids_SK[:] = torch.arange(sources * choices).view(sources, choices) % experts  # 16 rows each: no padding
    case.order = sort_by_expert(case.ids_SK, experts)
    take_path(path)
    leaves = {n: t.to(torch.float32 if n == "weights" else torch.bfloat16) for n, t in case.inputs.items()}
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    parameters = {leaves["gate_up"].data_ptr(), leaves["down"].data_ptr()}
    routed = sources * choices
    indices = 8 * (2 * routed + experts + 1) + 4 * routed  # order, inverse and offsets; the router's weights
    for recompute in (False, True):
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        backend = path if path == "triton" else "torch"
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y_SD = call(leaves, case.order, backend, gated=gated, recompute=recompute)
        pre = 0 if recompute else (4 if gated else 2) * routed * width
        if path == "torch" and not recompute:  # their source, weight and expert
            pre += (8 + 4) * routed + 4 * experts
        total = sum(size for at, size in kept.items() if at not in parameters)
        assert total == 2 * sources * hidden + pre + indices
        y_SD.sum().backward()


def test_mistakes() -> None:
    case = make(4, 2, 8, 6, 3)
    x, weights, gate_up, down = case.inputs.values()
    with pytest.raises(ValueError, match=r"activation='tanh': use one of 'silu', 'gelu', 'gelu_tanh', 'relu2'"):
        expert_mlp(x, weights, case.order, gate_up, down, activation="tanh")
    with pytest.raises(ValueError, match=r"gated=False: must be \[3, F, 8\], \[3, 8, F\]"):
        expert_mlp(x, weights, case.order, gate_up, down, gated=False)
    with pytest.raises(ValueError, match=r"must be \[3, 2F, 8\]"):
        expert_mlp(x, weights, case.order, gate_up[:, :6], down)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton's interpreter")
def test_auto_keeps_fp64_from_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """If "auto" chooses Triton, which lacks fp64, fp64 inputs still take the torch backend."""
    case, chosen = make(6, 2, 8, 6, 3), []

    def pick(op: str, backends: dict[str, Any], backend: str) -> Any:
        chosen.append(backend.replace("auto", "triton"))
        return backends[chosen[-1]]

    for module in (expert_op, gemm_op):
        monkeypatch.setattr(module, "pick", pick)
    monkeypatch.setattr(expert_op, "automatic", lambda *_: "triton")
    for dtype, expected in ((torch.float64, "torch"), (torch.float32, "triton")):
        chosen.clear()
        inputs = {name: t.to(dtype) for name, t in case.inputs.items()}
        assert call(inputs, case.order, "auto").dtype == dtype
        rows, weight, bounds = inputs["x"][:4], inputs["gate_up"], torch.tensor([0, 1, 3, 4])
        gemm_op.grouped_gemm(rows, weight, bounds)
        gemm_op.grouped_gemm_dgrad(rows, weight.mT, bounds)
        gemm_op.grouped_gemm_wgrad(rows, rows, bounds)
        assert chosen == [expected] * 4


@pytest.mark.parametrize("gated", [True, False])
def test_the_module(gated: bool) -> None:
    experts = RoutedExperts(3, 8, 6, "torch", 0.5, activation="relu2", gated=gated, recompute=True)
    shapes = {name: list(p.shape) for name, p in experts.named_parameters()}
    assert shapes == {"gate_up_proj": [3, 12 if gated else 6, 8], "down_proj": [3, 8, 6]}
    case = make(10, 2, 8, 6, 3)
    plan = DispatchPlan(case.inputs["weights"].float(), case.order)
    x_SD = case.inputs["x"].float()
    inputs = (x_SD, plan.weights_SK, case.order, experts.gate_up_proj, experts.down_proj)
    want = expert_mlp(*inputs, activation="relu2", gated=gated)
    assert torch.equal(experts(x_SD, plan), want) and want.norm() > 0


def test_the_configuration() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_experts": 3, "top_k": 2}
    assert MoEConfig(**sizes, activation="relu2", gated=False, recompute_experts=True).activation == "relu2"
    for field, value in (("activation", "tanh"), ("gated", 1), ("recompute_experts", None)):
        with pytest.raises(ValueError, match=f"^{field}={value!r}"):
            MoEConfig(**sizes, **{field: value})
