"""The experts with Triton between torch's products, and how "auto" chooses a backend and checks it first.

S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K routed rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from equimoe.kernels import auto, self_check
from equimoe.kernels.permute.torch_ops import sum_bags
from tests.helpers.slow import slow_but

from .mlp_cases import NAMES, compare, make

pytest.importorskip("triton")
from triton.runtime import interpreter

from equimoe.kernels._interpreter import BUILDER, correct_interpreter
from equimoe.kernels.empty_experts.triton_ops import zero_without_rows
from equimoe.kernels.expert_mlp import hybrid

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs under the interpreter, on the CPU")
CPU = torch.device("cpu")
IDS = ["random", "some dropped", "one expert", "duplicates", "all dropped"]


@pytest.mark.parametrize("ids", slow_but(["some dropped", "all dropped"], IDS))
@pytest.mark.parametrize("shape", [(37, 3, 16, 40, 5), (1, 1, 8, 8, 1), (0, 2, 8, 8, 4)])
def test_hybrid_against_fp64(shape: tuple[int, ...], ids: str) -> None:
    case = make(*shape, ids=ids).rounded(torch.bfloat16)
    found = case.run("hybrid", torch.bfloat16)
    compare(found, case.run("reference"), torch.bfloat16)
    again = case.run("hybrid", torch.bfloat16)
    assert all(torch.equal(found[name], again[name]) for name in ("y", *NAMES))


def test_hybrid_activates_columns_and_rows_past_one_program() -> None:
    case = make(7, 1, 8, 520, 2).rounded(torch.bfloat16)
    compare(case.run("hybrid", torch.bfloat16), case.run("reference"), torch.bfloat16)


@pytest.mark.parametrize("width", [5, 2048, 2049])
def test_only_gradients_of_experts_without_rows_are_zeroed(width: int) -> None:
    offsets_E = torch.tensor([0, 0, 3, 3, 3, 7, 7])
    grad_EOI = torch.full((6, 2, width), torch.nan, dtype=torch.bfloat16)
    zero_without_rows(grad_EOI, offsets_E)
    for grad, rows in zip(grad_EOI, offsets_E.diff(), strict=True):
        assert grad.isnan().all() if rows else (grad == 0).all()


def test_hybrid_leaves_no_gradient_undefined(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, torch's product does not write the gradient of an expert without rows."""
    right = torch.nn.functional.grouped_mm

    def partial(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        found = right(a, b, offs=offs)
        if b.dim() == 2:
            found[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = torch.nan
        return found

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", partial)
    case = make(37, 3, 16, 40, 5, ids="one expert").rounded(torch.bfloat16)
    compare(case.run("hybrid", torch.bfloat16), case.run("reference"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_kernel_sums_rows_and_leaves_dropped_ones_out(dtype: torch.dtype) -> None:
    rows_RD = torch.randn(20, 8).to(dtype)
    rows_RD[13] = torch.nan
    inverse_SK = torch.tensor([[3, -1, 7], [-1, -1, -1], [0, 19, 2], [-1, 5, -1]])
    expected = torch.stack([rows_RD.double()[[r for r in row if r >= 0]].sum(0) for row in inverse_SK.tolist()])
    torch.testing.assert_close(sum_bags(rows_RD, inverse_SK).double(), expected, rtol=2e-2, atol=2e-2)


@pytest.fixture(name="fresh")
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forgets what was compared before, and makes the comparison small."""
    monkeypatch.setattr(auto, "_known", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name, size in (("S", 24), ("D", 16), ("F", 24)):
        monkeypatch.setattr(self_check, name, size)


CHECKED = [
    ("sort_by_expert", "triton", torch.int64),
    ("permute", "triton", torch.bfloat16),
    ("combine", "triton", torch.float32),
    ("expert_mlp", "hybrid", torch.bfloat16),
    ("expert_mlp", "triton", torch.float16),
    ("router_logits", "triton", torch.bfloat16),
    ("topk_gate", "triton", torch.float32),
]


@pytest.mark.parametrize(("op", "backend", "dtype"), CHECKED)
def test_a_right_backend_is_used_without_a_warning(op: str, backend: str, dtype: torch.dtype, fresh: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert auto._works(op, backend, dtype, CPU)
    assert list(auto._known.values()) == [True]


@pytest.mark.parametrize(("op", "backend", "dtype"), slow_but([CHECKED[1], CHECKED[6]], CHECKED))
def test_defaults_of_torch_do_not_make_a_right_backend_wrong(
    op: str, backend: str, dtype: torch.dtype, fresh: None
) -> None:
    wanted = self_check.error_of(op, backend, dtype, CPU)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert auto._works(op, backend, dtype, CPU)
            assert self_check.error_of(op, backend, dtype, CPU) == wanted
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_gate_that_rounds_differently_is_right(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = self_check.topk_gate

    def gate(logits_TE, k, **how):  # noqa: ANN001, ANN003, ANN202
        found = right(logits_TE, k, **how)
        return found if how["backend"] == "reference" else found._replace(z_sum=found.z_sum * (1 + 2e-6))

    monkeypatch.setattr(self_check, "topk_gate", gate)
    error, largest = self_check.error_of("topk_gate", "triton", torch.float32, CPU)
    assert error < largest / 10


def test_tf32_is_right_where_the_user_permits_it(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies as TF32 does: it leaves out the last 13 bits of both factors."""
    correct_interpreter()
    plain = BUILDER.create_dot

    def cut(handle):  # noqa: ANN001, ANN202
        data = (handle.data.view(np.uint32) & 0xFFFFE000).view(np.float32)
        return interpreter.TensorHandle(data, handle.dtype)

    def create_dot(self, a, b, d, precision, imprecise):  # noqa: ANN001, ANN202
        a, b = (a, b) if "TF32" not in str(precision) else (cut(a), cut(b))
        return plain(self, a, b, d, precision, imprecise)

    create_dot.widens_bfloat16 = True
    monkeypatch.setattr(BUILDER, "create_dot", create_dot)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        error, largest = self_check.error_of("expert_mlp", "triton", torch.float32, CPU)
    finally:
        matmul.fp32_precision = before
    assert 2e-4 < error < largest


def test_the_comparison_keeps_the_random_state(fresh: None) -> None:
    before = torch.get_rng_state()
    auto._works("permute", "triton", torch.float32, CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fault", ["wrong", "NaN", "raises"])
def test_a_wrong_backend_is_replaced_with_one_warning(fault: str, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hybrid.combine

    def combine(rows, order):  # noqa: ANN001, ANN202
        if fault == "raises":
            raise RuntimeError("no such instruction")
        y_SD = right(rows, order)
        y_SD[5] += torch.nan if fault == "NaN" else 1.0
        return y_SD

    monkeypatch.setattr(hybrid, "combine", combine)
    words = {"wrong": "relative error of", "NaN": "relative error of inf", "raises": "no such instruction"}[fault]
    with pytest.warns(UserWarning, match=words) as seen:
        assert not auto._works("expert_mlp", "hybrid", torch.bfloat16, CPU)
        assert not auto._works("expert_mlp", "hybrid", torch.bfloat16, CPU)
    assert [one.category for one in seen].count(UserWarning) == 1


def test_a_captured_graph_uses_only_what_has_been_compared(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not auto._works("permute", "triton", torch.float32, CPU)
    assert auto._known == {}


def test_the_table_comes_before_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(auto, "_table", lambda: {"sm_90": {auto.key("expert_mlp", torch.bfloat16, True): "triton"}})

    def chosen(op: str, dtype: torch.dtype, many: bool, fits: bool = True) -> str:
        return auto._chosen(op, torch.device("cuda:0"), dtype, many, fits, False)

    assert chosen("expert_mlp", torch.bfloat16, True) == "triton"
    assert chosen("expert_mlp", torch.bfloat16, False) == "hybrid"
    assert chosen("expert_mlp", torch.bfloat16, False, fits=False) == "triton"
    assert chosen("permute", torch.float32, True) == "triton" and chosen("activate", torch.float32, True) == "torch"
    assert auto.automatic("permute", torch.zeros(3, 2)) == "torch"
