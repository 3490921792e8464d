"""Edge cases of sorting, permuting and combining, and which values the references may read.

S source rows, K choices per row, D hidden, E experts, R = S*K routed rows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from equimoe.kernels.expert_mlp import expert_mlp  # noqa: E402
from equimoe.kernels.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad  # noqa: E402
from equimoe.kernels.permute import combine, permute  # noqa: E402
from equimoe.kernels.sort_by_expert import ExpertOrder, sort_by_expert  # noqa: E402
from tests.kernels.paths import PATHS, on  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, Triton's interpreter runs the kernels
NAN = float("nan")


def some_order(ids: list[list[int]] | Tensor, experts: int = 4) -> ExpertOrder:
    return sort_by_expert(torch.as_tensor(ids, device=DEVICE), experts, backend="reference")


ORDERS = {
    "some dropped": [[3, -1], [0, 3], [-1, -1], [3, 3], [0, 1]],
    "none dropped": [[3, 1], [0, 3], [1, 0], [3, 3], [0, 1]],
    "all dropped": [[-1, -1]] * 5,
    "one choice": [[3], [-1], [0], [0], [3]],
    "one row": [[2, 2, 2]],
    "no rows": torch.zeros(0, 2, dtype=torch.int64),
    "no choices": torch.zeros(3, 0, dtype=torch.int64),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ids", ORDERS)
def test_any_number_of_rows(ids: str, path: str) -> None:
    """Compares values and gradients with explicit loops, for no rows, fewer than kept, the kept ones, more, and all."""
    order = some_order(ORDERS[ids])
    (sources, choices), rows, kept = order.inverse_SK.shape, order.order_R.numel(), int(order.offsets_E[-1])
    x_SD = torch.randn(sources, 3, device=DEVICE, requires_grad=True)
    for num_rows in sorted({0, kept // 2, max(kept - 1, 0), kept, (kept + rows) // 2, rows}):
        expected_RD = torch.zeros(num_rows, 3, device=DEVICE)
        dexpected_SD, g_RD = torch.zeros(sources, 3, device=DEVICE), torch.randn(num_rows, 3, device=DEVICE)
        for row in range(min(kept, num_rows)):
            source = int(order.order_R[row]) // choices
            expected_RD[row] = x_SD[source].detach()
            dexpected_SD[source] += g_RD[row]
        with on(path) as backend:
            rows_RD = permute(x_SD, order, num_rows, backend=backend)
            (dx_SD,) = torch.autograd.grad(rows_RD, x_SD, g_RD)
            assert torch.equal(rows_RD, expected_RD) and torch.allclose(dx_SD, dexpected_SD, atol=1e-6)
            if num_rows < kept:
                continue
            leaf_RD = g_RD.index_fill(0, torch.arange(kept, num_rows, device=DEVICE), NAN).requires_grad_()
            y_SD = combine(leaf_RD, order, backend=backend)
            (drows_RD,) = torch.autograd.grad(y_SD, leaf_RD, x_SD.detach())
        assert torch.allclose(y_SD, dexpected_SD, atol=1e-6) and torch.equal(drows_RD, expected_RD)


@pytest.mark.parametrize("path", PATHS)
def test_no_columns(path: str) -> None:
    order = some_order(ORDERS["some dropped"])
    with on(path) as backend:
        assert permute(torch.zeros(5, 0, device=DEVICE), order, backend=backend).shape == (10, 0)
        assert combine(torch.zeros(10, 0, device=DEVICE), order, backend=backend).shape == (5, 0)


@pytest.mark.parametrize("path", ["accelerator", "triton"])
def test_without_checks_a_missing_row_counts_as_zero(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import equimoe.kernels.permute as op

    order = some_order(ORDERS["none dropped"])
    rows_RD = torch.randn(10, 3, device=DEVICE)
    padded_RD = rows_RD.index_fill(0, torch.arange(6, 10, device=DEVICE), 0.0)
    monkeypatch.setattr(op, "readable", lambda t: False)
    with on(path) as backend:
        assert torch.equal(combine(rows_RD[:6], order, backend=backend), combine(padded_RD, order, backend=backend))


@pytest.mark.parametrize("path", ["reference", "accelerator", "triton"])
def test_without_checks_ids_out_of_range_are_dropped(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import equimoe.kernels.sort_by_expert as op

    ids_SK = torch.tensor([[3, 4], [-1, 0], [-7, 9], [1, 1 << 40]], device=DEVICE)
    monkeypatch.setattr(op, "readable", lambda t: False)
    with on(path) as backend:
        found = sort_by_expert(ids_SK, 4, backend=backend)
    expected = some_order([[3, -1], [-1, 0], [-1, -1], [1, -1]])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_references_never_read_dropped_rows(bad: float) -> None:
    """Sources without kept rows, weights of dropped choices and rows after the kept ones may contain anything."""
    order = some_order([[-1, -1], [3, -1], [0, 3], [1, 1]])
    kept, dropped_SK = int(order.offsets_E[-1]), order.inverse_SK < 0
    x_SD, dy_SD, g_RD = (torch.randn(n, 6, device=DEVICE) for n in (4, 4, 8))
    weights_SK = torch.rand(4, 2, device=DEVICE)
    up, down = torch.randn(4, 10, 6, device=DEVICE), torch.randn(4, 6, 5, device=DEVICE)
    index_R, offsets_E, dy_RF = order.order_R // 2, order.offsets_E, torch.randn(8, 10, device=DEVICE)

    def results(fill: float) -> list[Tensor]:
        x, dy, g, w, dz = (t.clone() for t in (x_SD, dy_SD, g_RD, weights_SK, dy_RF))
        x[0], dy[0], g[kept:], w[dropped_SK], dz[kept:] = (fill,) * 5
        index = index_R.index_fill(0, torch.arange(kept, 8, device=DEVICE), 0)
        leaves = [t.requires_grad_() for t in (x, w, up.clone(), down.clone())]
        y = expert_mlp(x, w, order, leaves[2], leaves[3], backend="reference")
        rows_RD = permute(x, order, backend="reference")
        found = [y, *torch.autograd.grad(y, leaves, dy), rows_RD, *torch.autograd.grad(rows_RD, x, g)]
        found += [combine(g, order, backend="reference"), grouped_gemm(x.detach(), up, offsets_E, index, "reference")]
        found.append(grouped_gemm_dgrad(dz, up, offsets_E, backend="reference"))
        found.append(grouped_gemm_wgrad(dz, x.detach(), offsets_E, None, index, backend="reference"))
        return found

    for number, (found, expected) in enumerate(zip(results(bad), results(0.0), strict=True)):
        assert bool(found.isfinite().all()) and torch.equal(found, expected), number


def mistaken(change: Callable[[ExpertOrder], ExpertOrder]) -> ExpertOrder:
    return change(some_order([[0, 1], [1, -1], [0, 0]], 2))


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (torch.zeros(3), lambda o: o, r"x_SD=\[3\]"),
        (torch.zeros(3, 4, 5), lambda o: o, r"x_SD=\[3, 4, 5\]"),
        (torch.zeros(4, 5), lambda o: o, "made for 3 source rows"),
        (torch.zeros(3, 5), lambda o: o._replace(order_R=o.order_R.int()), "order=.*must be int64"),
        (torch.zeros(3, 5), lambda o: o._replace(offsets_E=o.offsets_E.int()), "order=.*must be int64"),
        (torch.zeros(3, 5), lambda o: o._replace(inverse_SK=o.inverse_SK.view(-1)), r"order=.*\[R\], \[S, K\]"),
        (torch.zeros(3, 5), lambda o: o._replace(order_R=o.order_R[2:]), r"order_R=int64\[4\]: the order keeps 5 rows"),
        (torch.zeros(3, 5), lambda o: o._replace(offsets_E=o.offsets_E[:0]), r"torch.int64\[0\]: must be"),
        (torch.zeros(3, 5, device="meta"), lambda o: o, "order_R is on .*: move it to meta"),
        (torch.zeros(3, 5), lambda o: o._replace(offsets_E=o.offsets_E.to("meta")), "offsets_E is on meta"),
    ],
)
def test_mistakes(rows: Tensor, change: Callable[[ExpertOrder], ExpertOrder], message: str) -> None:
    rows = rows if rows.is_meta else rows.to(DEVICE)
    with pytest.raises(ValueError, match=message) as raised:
        permute(rows, mistaken(change))
    assert "\n" not in str(raised.value)
    if "order" in message or "offsets_E" in message:
        with pytest.raises(ValueError, match=message):
            combine(rows, mistaken(change))


@pytest.mark.parametrize("shape", [(6,), (6, 4, 5), (7, 4), (4, 4)])
def test_rows_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rows_RD=\[.*(at most 6|keeps 5) rows"):
        combine(torch.zeros(shape, device=DEVICE), mistaken(lambda o: o))


def test_rows_of_other_dtypes() -> None:
    order = some_order([[0, 1], [1, -1], [0, 0]], 2)
    x_SD = torch.arange(15, device=DEVICE).view(3, 5)
    expected = permute(x_SD.double(), order).long()
    for path in ("reference", "torch", "accelerator"):
        with on(path) as backend:
            assert torch.equal(permute(x_SD, order, backend=backend), expected), "permute copies any dtype"
            assert torch.equal(permute(x_SD.byte(), order, backend=backend), expected.byte())
    with pytest.raises(ValueError, match="rows_RD=torch.int64: give floating-point"):
        combine(expected, order)
    with pytest.raises(ValueError, match="rows=torch.uint8: backend='triton' has fp32"):
        permute(x_SD.byte(), order, backend="triton")


def test_one_graph_for_any_number_of_rows() -> None:
    """A traced number of rows stays symbolic in the custom ops."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    def step(x_SD: Tensor, ids_SK: Tensor) -> Tensor:
        order = sort_by_expert(ids_SK, 3, backend="triton")
        return combine(permute(x_SD, order, backend="triton"), order, backend="triton")

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for sources in (5, 9, 14):
        x_SD, ids_SK = torch.randn(sources, 4, device=DEVICE), torch.randint(-1, 3, (sources, 2), device=DEVICE)
        assert torch.equal(compiled(x_SD, ids_SK), step(x_SD, ids_SK))
    assert counter.frame_count == 1


@pytest.mark.parametrize("path", PATHS)
def test_a_padded_order_with_as_many_rows_as_choices(path: str) -> None:
    """One row is filled by no choice, and one choice is in no row, but the offsets count every row."""
    order_R, inverse_SK = torch.tensor([0, 3, 2, 4]), torch.tensor([[0, -1], [2, 1]])
    order = ExpertOrder(order_R.to(DEVICE), inverse_SK.to(DEVICE), torch.tensor([0, 2, 4], device=DEVICE))
    rows_RD = torch.randn(4, 3, device=DEVICE)
    with on(path) as backend:
        y_SD = combine(rows_RD, order, backend=backend)
    assert torch.allclose(y_SD, torch.stack((rows_RD[0], rows_RD[1] + rows_RD[2])), atol=1e-6)
