"""Every custom op passes torch's opcheck: schema, autograd, fake tensors and symbolic sizes.

``pytest -s`` prints the table of cases. S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from equimoe import kernels  # noqa: E402
from equimoe.kernels._ops import Op  # noqa: E402
from equimoe.kernels.sort_by_expert import ExpertOrder, sort_by_expert  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, Triton's interpreter runs the kernels
OPS: dict[str, Op] = {}
for path in sorted(Path(kernels.__path__[0]).glob("*/triton_ops.py")):
    module = import_module(f"equimoe.kernels.{path.parent.name}.triton_ops")  # registers the ops
    OPS |= {one.name: one for one in vars(module).values() if isinstance(one, Op)}
import_module("equimoe.kernels.expert_mlp.compiled")

S, K, D, F, E = 5, 2, 8, 6, 3


def randn(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, device=DEVICE).requires_grad_(grad)


def strided(*shape: int, grad: bool = False) -> Tensor:
    """Return random numbers at every other element of every dimension, transposed in memory."""
    wide = torch.randn(*(2 * n + 1 for n in reversed(shape)), device=DEVICE)
    view = wide.permute(*reversed(range(len(shape))))[tuple(slice(0, 2 * n, 2) for n in shape)]
    return view.requires_grad_(grad)


def ids(sources: int = S, drop: str = "some") -> Tensor:
    """Return ids of which some, all or none are dropped. The last expert has no rows."""
    ids_SK = torch.randint(0, E - 1, (sources, K), device=DEVICE)
    if drop == "some":
        ids_SK[::3, 0] = -1
    return ids_SK.fill_(-1) if drop == "all" else ids_SK


def order(sources: int = S, drop: str = "some", strides: bool = False) -> ExpertOrder:
    """Return an order; with ``strides`` none of its tensors is contiguous."""
    found = sort_by_expert(ids(sources, drop), E, backend="torch")
    if not strides:
        return found
    return ExpertOrder(column(found.order_R), found.inverse_SK.t().contiguous().t(), column(found.offsets_E))


def gate(
    sources: int = S,
    bias: bool = True,
    mask: bool = True,
    given: bool = False,
    make: Callable[..., Tensor] = randn,
    **changes: Any,
) -> tuple:
    options = {"k": K, "score": "sigmoid", "groups": 1, "kept_groups": 1, "normalize": True, "after": False}
    options |= {"scale": 2.0, "sequences": 1} | changes
    mask_T = (torch.arange(2 * sources, device=DEVICE) % 4 > 0)[::2] if mask else None
    ids_TK = torch.randint(0, 6, (K, sources), device=DEVICE).t() if given else None
    return make(sources, 6, grad=True), make(6) if bias else None, mask_T, ids_TK, *options.values()


def gate_backward(sources: int = S, make: Callable[..., Tensor] = randn, **changes: Any) -> tuple:
    logits_TE, _, mask_T, ids_TK, *options = gate(sources, given=True, make=make, **changes)
    gradients = (make(sources, K), make(options[-1], 6), make(options[-1]))
    return logits_TE.detach(), mask_T, ids_TK, *gradients, *options


def offsets(*counts: int) -> Tensor:
    return torch.tensor([0, *counts], device=DEVICE).cumsum(0)


def column(t: Tensor) -> Tensor:
    """Return the same values as a column of a table."""
    return torch.stack((t, torch.full_like(t, -9)), 1)[:, 0]


def index(rows: int) -> Tensor:
    return torch.randint(0, S, (rows,), device=DEVICE)


def weight_grad(make: Callable[..., Tensor], counts: tuple[int, ...] = (3, 0, 2)) -> tuple:
    bounds, left, right = offsets(*counts), index(6), index(6)
    if make is strided:
        bounds, left, right = column(bounds), column(left), column(right)
    return make(S, F), make(S, D), bounds, left, right


def grouped_mm(make: Callable[..., Tensor]) -> tuple:
    weight = make(E, 8, 16).bfloat16()
    return randn(5, 8).bfloat16(), weight, torch.tensor([3, 3, 5], dtype=torch.int32, device=DEVICE)


def mlp(
    sources: int = S,
    drop: str = "some",
    make: Callable[..., Tensor] = randn,
    keep: bool = True,
    kind: tuple[str, bool] = ("silu", True),
    grad: bool = True,
) -> tuple:
    up = 2 * F if kind[1] else F
    tensors = (make(sources, D), make(sources, K), make(E, up, D), make(E, D, F))
    return *(t.requires_grad_(grad) for t in tensors), *order(sources, drop, strides=make is strided), *kind, keep


def mlp_backward(
    sources: int = S, needs: tuple[bool, ...] = (True,) * 4, make: Callable[..., Tensor] = randn, keep: bool = True
) -> tuple:
    arguments = mlp(sources, make=make, keep=keep, grad=False)
    pre_RU = make(sources * K if keep else 0, 2 * F)
    return make(sources, D), pre_RU, *arguments, list(needs)


def cpu_backward(**how: Any) -> tuple:
    dy_SD, _, *arguments = mlp_backward(**how)
    return dy_SD, *arguments[:-2], arguments[-1]


def activation(rows: int, make: Callable[..., Tensor], backward: bool = False, gated: bool = True) -> tuple:
    """Make the arguments of the activation between two products, whose rows are sorted."""
    flat_R = torch.randperm(rows, device=DEVICE)
    pre_RU = make(rows, 2 * F if gated else F)
    weights_SK = make(rows // K, K)
    arguments = (pre_RU, weights_SK, column(flat_R) if make is strided else flat_R, "silu", gated)
    return (make(rows, F), *arguments) if backward else arguments


Case = tuple[str, str, Callable[[], tuple]]
#: op, description of the case, function that makes the arguments
CASES: list[Case] = [
    ("permute", "dropped ids, cut", lambda: (randn(S, D, grad=True), *order(), 7)),
    ("permute", "fewer rows than kept", lambda: (randn(S, D, grad=True), *order(drop="none"), 3)),
    ("permute", "strided", lambda: (strided(S, D, grad=True), *order(strides=True), S * K)),
    ("permute", "no rows", lambda: (randn(0, D, grad=True), *order(0), 0)),
    ("combine", "dropped ids", lambda: (randn(S * K, D, grad=True), *order())),
    ("combine", "all dropped, no rows", lambda: (randn(0, D, grad=True), *order(drop="all"))),
    ("combine", "strided", lambda: (strided(S * K, D, grad=True), *order(strides=True))),
    ("sort_by_expert", "dropped ids", lambda: (ids(), E)),
    ("sort_by_expert", "strided", lambda: (ids(2 * S)[::2], E)),
    ("sort_by_expert", "no rows", lambda: (ids(0), E)),
    ("topk_gate", "bias, groups, mask", lambda: gate(4, groups=3, kept_groups=2, sequences=2)),
    ("topk_gate", "given ids, softmax", lambda: gate(bias=False, given=True, score="softmax")),
    ("topk_gate", "strided", lambda: gate(make=strided)),
    ("topk_gate", "no tokens", lambda: gate(0, bias=False, mask=False)),
    ("topk_gate_backward", "mask", lambda: gate_backward(4, sequences=2)),
    ("topk_gate_backward", "strided", lambda: gate_backward(make=strided, score="softmax")),
    ("topk_gate_backward", "no tokens", lambda: gate_backward(0, mask=False)),
    ("grouped_mm", "torch's own product", lambda: grouped_mm(randn)),
    ("grouped_mm", "strided weight", lambda: grouped_mm(strided)),
    ("grouped_gemm", "rows of no expert", lambda: (randn(7, D), randn(E, F, D), offsets(3, 0, 2), None)),
    ("grouped_gemm", "strided", lambda: (strided(S, D), strided(E, F, D), column(offsets(3, 0, 2)), column(index(7)))),
    ("grouped_gemm", "no rows", lambda: (randn(0, D), randn(E, F, D), offsets(0, 0, 0), None)),
    ("grouped_gemm_dgrad", "rows of no expert", lambda: (randn(7, F), randn(E, F, D), offsets(3, 0, 2))),
    ("grouped_gemm_dgrad", "strided", lambda: (strided(5, F), strided(E, F, D), column(offsets(3, 0, 2)))),
    ("grouped_gemm_dgrad", "no rows", lambda: (randn(0, F), randn(E, F, D), offsets(0, 0, 0))),
    ("grouped_gemm_wgrad", "rows of no expert", lambda: (randn(7, F), randn(7, D), offsets(3, 0, 2), None, None)),
    ("grouped_gemm_wgrad", "strided", lambda: weight_grad(strided)),
    ("grouped_gemm_wgrad", "no rows", lambda: (randn(0, F), randn(0, D), offsets(0, 0, 0), None, None)),
    ("grouped_gemm_wgrad_", "gathered", lambda: (*weight_grad(randn), randn(E, F, D))),
    ("grouped_gemm_wgrad_", "strided", lambda: (*weight_grad(strided), randn(E, F, D))),
    (
        "grouped_gemm_wgrad_",
        "no rows",
        lambda: (randn(0, F), randn(0, D), offsets(0, 0, 0), None, None, randn(E, F, D)),
    ),
    ("zero_without_rows", "some", lambda: (randn(E, F, D), offsets(3, 0, 2))),
    ("zero_without_rows", "all, strided offsets", lambda: (randn(E, F, D), column(offsets(0, 0, 0)))),
    ("zero_without_rows", "no experts", lambda: (randn(0, F, D), offsets())),
    ("router_logits", "odd", lambda: (randn(S, D, grad=True), randn(E, D, grad=True))),
    ("router_logits", "strided", lambda: (strided(S, D, grad=True), strided(E, D, grad=True))),
    ("router_logits", "no tokens", lambda: (randn(0, D, grad=True), randn(E, D, grad=True))),
    ("router_logits_backward", "both", lambda: (randn(S, E), randn(S, D), randn(E, D), [True, True])),
    ("router_logits_backward", "strided, one", lambda: (strided(S, E), strided(S, D), strided(E, D), [False, True])),
    ("router_logits_backward", "no tokens", lambda: (randn(0, E), randn(0, D), randn(E, D), [True, True])),
    ("activate", "gated", lambda: activation(S * K, randn)),
    ("activate", "strided, no gate", lambda: activation(S * K, strided, gated=False)),
    ("activate", "no rows", lambda: activation(0, randn)),
    ("activate_backward", "gated", lambda: activation(S * K, randn, True)),
    ("activate_backward", "strided, no gate", lambda: activation(S * K, strided, True, gated=False)),
    ("activate_backward", "no rows", lambda: activation(0, randn, True)),
    ("expert_mlp", "dropped ids", lambda: (*mlp(), None, None)),
    ("expert_mlp", "strided, nothing kept", lambda: (*mlp(make=strided, keep=False), None, None)),
    ("expert_mlp", "no rows", lambda: (*mlp(0), None, None)),
    ("expert_mlp_backward", "dropped ids", lambda: (*mlp_backward(), None, None)),
    ("expert_mlp_backward", "strided, computed again", lambda: (*mlp_backward(make=strided, keep=False), None, None)),
    ("expert_mlp_backward", "no rows", lambda: (*mlp_backward(0), None, None)),
    (
        "expert_mlp_backward",
        "into main gradients",
        lambda: (*mlp_backward(), randn(E, 2 * F, D), randn(E, D, F)),
    ),
    ("cpu_expert_mlp", "dropped ids", lambda: mlp()[:-1]),
    ("cpu_expert_mlp", "strided, no gate", lambda: mlp(make=strided, kind=("gelu", False))[:-1]),
    ("cpu_expert_mlp", "no rows", lambda: mlp(0)[:-1]),
    ("cpu_expert_mlp_backward", "dropped ids", lambda: cpu_backward()),
    ("cpu_expert_mlp_backward", "strided", lambda: cpu_backward(make=strided)),
    ("cpu_expert_mlp_backward", "one gradient", lambda: cpu_backward(needs=(False, True, False, False))),
]
MORE: list[Case] = [
    ("expert_mlp", "all dropped, no gate", lambda: (*mlp(drop="all", kind=("gelu", False)), None, None)),
    ("expert_mlp_backward", "one gradient", lambda: (*mlp_backward(needs=(False, True, False, False)), None, None)),
]


def opcheck(name: str, arguments: Callable[[], tuple]) -> str:
    """Return the checks that an op passed, or its failure."""
    try:
        done = torch.library.opcheck(getattr(torch.ops.equimoe, name).default, arguments())
    except Exception as error:
        return f"FAILED: {error}"
    return ", ".join(key.removeprefix("test_") for key in done)


@pytest.mark.parametrize("cases", [CASES, MORE], ids=["usual", "more"])
@pytest.mark.slow
def test_opcheck(cases: list[tuple[str, str, Callable[[], tuple]]]) -> None:
    def table(*_: int) -> list[str]:
        return [f"{name:20} {label:24} {opcheck(name, arguments)}" for name, label, arguments in cases]

    # in a separate process: torch 2.15 starts autograd's device threads here, and later tests could not fork
    rows = table() if DEVICE == "cuda" else run_ranks(table, 1, timeout=100)[0]
    print("", *rows, sep="\n")
    assert not [row for row in rows if "FAILED" in row]


def test_every_custom_op_has_cases() -> None:
    """Each op has usual cases. Permute and combine are each other's backward, and the sort has none."""
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "equimoe::" in name}
    table = {name: [label for op, label, _ in CASES if op == name] for name in sorted(names)}
    for name, labels in table.items():
        print(f"\n{name:20} {len(labels)} cases: {'; '.join(labels)}", end="")
    assert names and all(table.values()), f"without a case: {[name for name, labels in table.items() if not labels]}"
    assert {op for op, _, _ in CASES} == names


class Seen(TorchDispatchMode):
    """Records the names of our ops that torch's dispatcher runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "equimoe":
            self.names.append(op._schema.name.partition("::")[2])
        return op(*args, **(kwargs or {}))


def run(op: Op, arguments: tuple) -> list[Tensor]:
    """Return the op's results, its gradients, and its arguments with how often they were written."""
    found = op(*arguments)
    results = [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]
    leaves = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    ends = [t for t in results if t.requires_grad]
    grads = torch.autograd.grad(ends, leaves, [t.detach().cos() for t in ends]) if leaves else ()
    given = [t for t in arguments if isinstance(t, Tensor)]
    return [*results, *grads, *given, *(torch.tensor(t._version) for t in given)]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [pytest.param(name, case, id=f"{name}-{label}") for name, label, case in CASES if name in OPS],
)
def test_eager_code_gets_the_same_without_the_dispatcher(
    name: str, arguments: Callable[[], tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    op = OPS[name]
    torch.manual_seed(0)
    with Seen() as seen:
        expected = run(op, arguments())
    assert name in seen.names
    for other in OPS.values():
        monkeypatch.setattr(other, "_op", None)
    torch.manual_seed(0)
    found = run(op, arguments())
    assert len(found) == len(expected)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [t.requires_grad for t in found] == [t.requires_grad for t in expected]


def test_what_has_no_memory_or_is_transformed_is_left_to_the_dispatcher() -> None:
    permute, found = OPS["permute"], order()
    meta = permute(torch.empty(S, D, device="meta"), *(t.to("meta") for t in found), S * K)
    assert meta.is_meta and meta.shape == (S * K, D)
    with FakeTensorMode() as mode:
        x_SD, *places = (mode.from_tensor(t) for t in (torch.ones(S, D), *(t.cpu() for t in found)))
    assert isinstance(permute(x_SD, *places, S * K), FakeTensor)  # outside the mode, too
    x_SD = randn(S, D)
    y_RD = torch.func.functionalize(lambda x: permute(x, *found, S * K))(x_SD)
    assert torch.equal(y_RD, permute(x_SD, *found, S * K))


def test_an_op_that_is_differentiable_once_says_so() -> None:
    x_TD, weight_ED = randn(S, D, grad=True), randn(E, D, grad=True)
    (grad,) = torch.autograd.grad(OPS["router_logits"](x_TD, weight_ED).square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="router_logits_backward"):
        grad.sum().backward()
