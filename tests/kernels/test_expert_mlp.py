"""Forward and every gradient against the fp64 reference, whose gradients gradcheck verifies.

S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K routed rows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from equimoe.kernels import checks
from equimoe.kernels.cpu import few_rows
from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.sort_by_expert import sort_by_expert

from .mlp_cases import NAMES, TOLERANCE, NoHostReads, call, compare, make, take_path_fixture  # noqa: F401

#: the backends, and paths of the torch backend, see :func:`take_path_fixture`
PATHS = ("reference", "torch", "loop", "grouped", "blocks")
IDS = ("random", "some dropped", "one expert", "duplicates", "all dropped")
SHAPES = [  # S, K, D, F, E
    (63, 2, 31, 17, 3),
    (63, 3, 31, 17, 3),
    (63, 1, 31, 17, 1),
    (63, 4, 31, 17, 16),
    (64, 2, 32, 24, 16),
    (1, 1, 8, 8, 1),
    (1, 2, 8, 16, 16),
    (0, 2, 8, 8, 4),
    (40, 2, 1, 1, 2),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(
    shape: tuple[int, ...], ids: str, dtype: torch.dtype, path: str, take_path: Callable[[str], None]
) -> None:
    case = make(*shape, ids=ids).rounded(dtype)
    expected = case.run("reference", torch.float64)
    take_path(path)
    found = case.run(path, dtype)
    assert found["y"].dtype == found["x"].dtype == found["gate_up"].dtype == found["down"].dtype == dtype
    assert found["weights"].dtype == torch.float32
    compare(found, expected, dtype)


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype, path: str, take_path: Callable[[str], None]) -> None:
    case = make(ids="some dropped")
    expected = case.run("reference", torch.float64)
    take_path(path)
    compare(case.run(path, dtype), expected, dtype)


@pytest.mark.parametrize("path", PATHS)
def test_gradcheck(path: str, take_path: Callable[[str], None]) -> None:
    case = make(5, 2, 3, 4, 3, ids="some dropped")
    take_path(path)
    leaves = [t.clone().requires_grad_() for t in case.inputs.values()]
    backend = "reference" if path == "reference" else "torch"
    assert torch.autograd.gradcheck(
        lambda *t: call(dict(zip(NAMES, t, strict=True)), case.order, backend), leaves, fast_mode=False
    )


def test_the_formula_by_hand() -> None:
    """One row, one expert, scalars: y = w * silu(x g) * (x u) * d."""
    x, w, g, u, d = 1.5, 0.25, 0.8, -1.1, 2.0
    order = sort_by_expert(torch.zeros(1, 1, dtype=torch.int64), 1)
    double = {"dtype": torch.float64}
    gate_up, down = torch.tensor([[[g], [u]]], **double), torch.tensor([[[d]]], **double)
    y = expert_mlp(torch.tensor([[x]], **double), torch.tensor([[w]], **double), order, gate_up, down)
    pre = torch.tensor(x * g, **double)
    torch.testing.assert_close(y.squeeze(), w * pre * torch.sigmoid(pre) * (x * u) * d)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    sources=st.integers(0, 20),
    choices=st.integers(1, 5),
    hidden=st.integers(1, 12),
    width=st.integers(1, 12),
    experts=st.integers(1, 6),
    ids=st.sampled_from(IDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(
    sources: int, choices: int, hidden: int, width: int, experts: int, ids: str, dtype: torch.dtype
) -> None:
    case = make(sources, choices, hidden, width, experts, ids).rounded(dtype)
    expected, found = case.run("reference"), case.run("torch", dtype)
    by_norm = TOLERANCE[dtype][0] * (1 if dtype == torch.float32 else 4)
    for name, want in expected.items():
        assert found[name].isfinite().all()
        # a sum of few terms may cancel, so the error is also compared with unit scale
        assert (found[name].double() - want).norm() <= by_norm * (want.norm() + want.numel() ** 0.5), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wanted", [(name,) for name in NAMES] + [("x", "down"), ("weights", "gate_up"), ()])
def test_each_gradient_alone(wanted: tuple[str, ...], path: str, take_path: Callable[[str], None]) -> None:
    case = make(ids="some dropped")
    expected = case.run("reference")
    take_path(path)
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in case.inputs.items()}
    y_SD = call(leaves, case.order, "reference" if path == "reference" else "torch")
    assert y_SD.requires_grad == bool(wanted)
    if wanted:
        y_SD.backward(case.dy_SD)
    found = {name: leaf.grad for name, leaf in leaves.items()}
    assert {name for name, grad in found.items() if grad is not None} == set(wanted)
    compare({name: found[name] for name in wanted}, {name: expected[name] for name in wanted}, torch.float64)
    with torch.no_grad():
        leaves = {name: t.clone().requires_grad_() for name, t in case.inputs.items()}
        assert not call(leaves, case.order).requires_grad
        compare({"y": call(leaves, case.order)}, {"y": expected["y"]}, torch.float64)


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(dtype: torch.dtype, path: str, take_path: Callable[[str], None]) -> None:
    case = make(48, 2, 32, 16, 4, ids="some dropped")
    take_path(path)
    wide = {name: t.to(torch.float32 if name == "weights" else dtype) for name, t in case.inputs.items()}
    dense = {name: t.clone().requires_grad_() for name, t in wide.items()}
    strided = {name: t.mT.contiguous().mT.requires_grad_() for name, t in wide.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    for leaves in (dense, strided):
        call(leaves, case.order).sum().backward()  # sum() sends back an expanded gradient
    for name in NAMES:
        assert dense[name].grad.norm() > 0
        torch.testing.assert_close(strided[name].grad, dense[name].grad)


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_within_its_expert(dtype: torch.dtype, path: str, take_path: Callable[[str], None]) -> None:
    """Padding and dropped rows must not carry another row's NaN: 0 * NaN is NaN."""
    case = make(33, 1, 32, 16, 3)
    case.ids_SK[:] = torch.arange(33)[:, None] % 3
    case.ids_SK[0], case.ids_SK[1] = -1, 2
    case.order = sort_by_expert(case.ids_SK, 3)
    clean = case.run("reference")
    take_path(path)
    case.inputs["x"][:2] = float("nan")
    case.dy_SD[:2] = float("nan")
    found = case.run(path, dtype)
    assert (found["y"][0] == 0).all() and (found["x"][0] == 0).all() and (found["weights"][0] == 0).all()
    for name in ("gate_up", "down"):
        compare({name: found[name][:2]}, {name: clean[name][:2]}, dtype)
    for name in ("y", "x", "weights"):
        compare({name: found[name][2:]}, {name: clean[name][2:]}, dtype)


@pytest.mark.parametrize("path", PATHS[1:])
def test_experts_without_rows_get_zero(path: str, take_path: Callable[[str], None]) -> None:
    case = make(24, 2, 16, 8, 6)
    case.ids_SK = case.ids_SK % 2 * 3  # experts 0 and 3
    case.order = sort_by_expert(case.ids_SK, 6)
    take_path(path)
    for dtype in (torch.float32, torch.bfloat16):
        found = case.run(path, dtype)
        for expert in (1, 2, 4, 5):
            assert (found["gate_up"][expert] == 0).all() and (found["down"][expert] == 0).all()
        assert found["gate_up"][0].norm() > 0 and found["gate_up"][3].norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", IDS)
def test_few_rows_have_the_numbers_of_many(
    ids: str, dtype: torch.dtype, take_path: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(64, 2, 32, 24, 16, ids=ids)
    calls, product = [], few_rows.grouped_mm
    monkeypatch.setattr(few_rows, "grouped_mm", lambda *given, offs: calls.append(given) or product(*given, offs=offs))
    few = [case.run("torch", dtype, recompute=recompute) for recompute in (False, True)]
    assert len(calls) == 2 * 6 + 1, "all experts at once"
    take_path("loop")
    many = case.run("loop", dtype)
    assert len(calls) == 13
    for found in few:
        assert all(torch.equal(found[name], many[name]) for name in many)


def test_weights_of_zero_have_a_gradient() -> None:
    case = make()
    case.inputs["weights"] = torch.zeros_like(case.inputs["weights"])
    expected, found = case.run("reference"), case.run("torch", torch.float32)
    assert expected["weights"].norm() > 0
    compare(found, expected, torch.float32)


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bit_for_bit(dtype: torch.dtype, path: str, take_path: Callable[[str], None]) -> None:
    case = make(200, 4, 64, 48, 8, ids="some dropped")
    take_path(path)
    first = case.run(path, dtype)
    for _ in range(2):
        again = case.run(path, dtype)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_results_share_no_memory_with_later_calls() -> None:
    case = make(700, 2, 96, 512, 3, ids="some dropped")  # so large that the buffers come from the pool
    kept = case.run("torch", torch.float32)
    compare(kept, case.run("reference"), torch.float32)
    copies = {name: t.clone() for name, t in kept.items()}
    case.dy_SD = -case.dy_SD
    case.run("torch", torch.float32)
    assert all(torch.equal(kept[name], copies[name]) for name in kept)


def test_backward_twice_over_one_graph() -> None:
    case = make(ids="some dropped")
    leaves = {name: t.float().requires_grad_() for name, t in case.inputs.items()}
    y_SD = call(leaves, case.order)
    first, second = (
        torch.autograd.grad(y_SD, list(leaves.values()), case.dy_SD.float(), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_second_derivative() -> None:
    case = make(5, 1, 3, 2, 2)
    leaves = {name: t.requires_grad_() for name, t in case.inputs.items()}
    (grad,) = torch.autograd.grad(call(leaves, case.order).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("path", PATHS[1:])
def test_checkpointing_recomputes_the_same(path: str, take_path: Callable[[str], None]) -> None:
    case = make()
    take_path(path)
    plain = case.run(path, torch.float32)
    leaves = {name: t.float().requires_grad_() for name, t in case.inputs.items()}
    y_SD = checkpoint(call, leaves, case.order, use_reentrant=False)
    grads = torch.autograd.grad(y_SD, list(leaves.values()), case.dy_SD.float())
    assert torch.equal(y_SD, plain["y"])
    assert all(torch.equal(grad, plain[name]) for name, grad in zip(NAMES, grads, strict=True))


def test_what_backward_needs_is_saved_where_hooks_see_it() -> None:
    case = make()
    leaves = {name: t.float().requires_grad_() for name, t in case.inputs.items()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_SD = call(leaves, case.order)
    routed = case.order.order_R.numel()
    activations = [t for t in saved if t.is_floating_point() and t.shape[0] == routed]
    assert [t.shape[1] for t in activations] == [2 * 17], "the pre-activation is the only saved activation with R rows"
    y_SD.backward(case.dy_SD.float())
    expected = case.run("reference")
    compare({name: leaves[name].grad for name in NAMES}, {name: expected[name] for name in NAMES}, torch.float32)


@pytest.mark.parametrize("path", PATHS)
def test_autocast(path: str, take_path: Callable[[str], None]) -> None:
    case = make(64, 2, 32, 16, 4)
    expected = case.run("reference")
    take_path(path)
    leaves = {name: t.float().requires_grad_() for name, t in case.inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y_SD = call(leaves, case.order, "reference" if path == "reference" else "torch")
    assert y_SD.dtype == torch.bfloat16
    y_SD.backward(case.dy_SD.bfloat16())
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())
    found = {"y": y_SD.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    compare(found, expected, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(case.inputs, case.order).dtype == torch.float64, "autocast does not change fp64"


@pytest.mark.parametrize("path", ["grouped", "blocks"])
def test_the_accelerators_path_never_waits_for_a_value(
    path: str, take_path: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(40, 2, 32, 16, 4, ids="some dropped")
    take_path(path)
    monkeypatch.setattr(checks, "readable", lambda _: False)  # on the CPU the op would check the order's values
    with NoHostReads():
        case.run(path, torch.bfloat16)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        case.order.offsets_E[0].item()


def test_mistakes() -> None:
    case = make(4, 2, 8, 6, 3)
    x, weights, gate_up, down = case.inputs.values()
    wrong = [
        ((x.float(), weights, case.order, gate_up, down), "the same dtype"),
        ((x.long(), weights, case.order, gate_up.long(), down.long()), "the same dtype"),
        ((x[:3], weights, case.order, gate_up, down), "weights_SK"),
        ((x, weights[:, :1], case.order, gate_up, down), "weights_SK"),
        ((x, weights, case.order, gate_up[:, :-2], down), r"\[3, 2F, 8\]"),
        ((x, weights, case.order, gate_up[:2], down[:2]), r"\[3, 2F, 8\]"),
        ((x, weights, case.order, gate_up, down.mT), r"\[3, 2F, 8\]"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            expert_mlp(*arguments)
    with pytest.raises(ValueError, match="backend='slow'"):
        expert_mlp(x, weights, case.order, gate_up, down, backend="slow")
