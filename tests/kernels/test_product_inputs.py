"""Which inputs the matrix ops accept and refuse; and that invalid offsets and indices never access other memory.

R sorted rows, S source rows, K choices per row or in width, N out width, D hidden, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.grouped_gemm import accelerator, grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad, row_layouts
from equimoe.kernels.sort_by_expert import ExpertOrder, sort_by_expert
from tests.helpers.fake_cuda import needs_fake_cuda, on_fake_cuda

BACKENDS = ("reference", "torch", "triton")
E, R, N, K, F = 3, 11, 6, 8, 5
OFFSETS = torch.tensor([0, 4, 4, 9])
#: offsets that end past the rows, decrease, do not begin at 0, or several of these
WRONG = ([0, 4, 9, 99], [0, 9, 3, 8], [3, 5, 5, 7], [-4, 99, -4, 2**40], [0, -5, 20, 2])


def mlp_inputs(sources: int = 4, choices: int = 2, hidden: int = K, width: int = F, **kwargs: Any) -> dict[str, Any]:
    ids_SK = torch.randint(-1, E, (sources, choices))
    order = sort_by_expert(ids_SK, E)
    device = kwargs.get("device", "cpu")
    return {
        "x_SD": torch.randn(sources, hidden, **kwargs),
        "weights_SK": torch.rand(sources, choices, **kwargs),
        "order": ExpertOrder(*(t.to(device) for t in order)),
        "gate_up_EFD": torch.randn(E, 2 * width, hidden, **kwargs),
        "down_EDF": torch.randn(E, hidden, width, **kwargs),
    }


@pytest.mark.parametrize("offsets", WRONG[:3])
def test_wrong_offsets_raise_one_line_on_the_cpu(offsets: list[int], backend: str) -> None:
    rows, weight, dy, offsets_E = torch.randn(8, K), torch.randn(E, N, K), torch.randn(8, N), torch.tensor(offsets)
    order = mlp_inputs()["order"]
    for call in (
        lambda: grouped_gemm(rows, weight, offsets_E, backend=backend),
        lambda: grouped_gemm_dgrad(dy, weight, offsets_E, backend=backend),
        lambda: grouped_gemm_wgrad(dy, rows, offsets_E, backend=backend),
        lambda: expert_mlp(**mlp_inputs() | {"order": order._replace(offsets_E=offsets_E)}, backend=backend),
    ):
        with pytest.raises(ValueError, match=r"^offsets_E=\[.*: must (begin at 0 and never decrease|end at 8)[^\n]*$"):
            call()


@pytest.mark.parametrize("bad", [-1, R])
def test_a_wrong_index_raises_one_line_on_the_cpu(bad: int, backend: str) -> None:
    rows, weight, dy = torch.randn(R, K), torch.randn(E, N, K), torch.randn(R, N)
    index_R = torch.arange(R)
    index_R[2] = bad
    for call, name in (
        (lambda: grouped_gemm(rows, weight, OFFSETS, index_R, backend), "index_R"),
        (lambda: grouped_gemm_wgrad(dy, rows, OFFSETS, index_R, None, backend=backend), "dy_index_R"),
        (lambda: grouped_gemm_wgrad(dy, rows, OFFSETS, None, index_R, backend=backend), "index_R"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} in \[-?\d+, \d+\]: entries must lie in [^\n]*$"):
            call()


@pytest.fixture(name="canaries")
def canaries_fixture(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Surrounds every new allocation with canary values, and returns a function that checks them."""
    margin, held = 64, []
    plain = torch.empty

    def empty(*shape: Any, **kwargs: Any) -> Tensor:
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        whole = plain(shape.numel() + 2 * margin, **kwargs)
        whole.fill_(77)
        middle = whole[margin : margin + shape.numel()]
        middle.fill_(float("nan") if whole.is_floating_point() else -(2**40))
        held.append((whole[:margin], whole[margin + shape.numel() :]))
        return middle.view(shape)

    def new_empty(self: Tensor, *shape: Any, **kwargs: Any) -> Tensor:
        return empty(*shape, **{"dtype": self.dtype, "device": self.device} | kwargs)

    def check() -> None:
        assert held, "nothing was allocated"
        assert all((t == 77).all() for pair in held for t in pair)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda t: new_empty(t, t.shape))
    return check


def between_nans(*shape: int) -> Tensor:
    """Return random numbers with NaN before and after them in memory."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 2000,), float("nan"))
    return whole[1000 : 1000 + size].copy_(torch.randn(size)).view(shape)


@pytest.mark.parametrize("offsets", [OFFSETS.tolist(), *WRONG])
@pytest.mark.parametrize("indexed", [False, True])
def test_kernels_stay_in_their_memory(offsets: list[int], indexed: bool, canaries: Callable[[], None]) -> None:
    """Without the CPU's checks, kernels write nothing outside their tensors, and nothing outside affects a result."""
    pytest.importorskip("triton")
    from equimoe.kernels.grouped_gemm import triton_ops

    offsets_E = torch.tensor(offsets)
    index_R = torch.tensor([-(2**40), 2**40, -1, R, *[2] * (R - 4)]) if indexed else None
    rows, weight, dy = between_nans(R, K), between_nans(E, N, K), between_nans(R, N)
    for found in (
        triton_ops.forward(rows, weight, offsets_E, index_R),
        triton_ops.dgrad(dy, weight, offsets_E),
        triton_ops.wgrad(dy, rows, offsets_E, index_R, None, None),
        triton_ops.wgrad(dy, rows, offsets_E, None, index_R, between_nans(E, N, K)),
    ):
        assert found.isfinite().all()
        canaries()


@pytest.mark.parametrize("offsets", [[0, 1, 1, 6], *WRONG])
@pytest.mark.parametrize("keep", [True, False])
def test_expert_kernels_stay_in_their_memory(offsets: list[int], keep: bool, canaries: Callable[[], None]) -> None:
    pytest.importorskip("triton")
    from equimoe.kernels.expert_mlp import triton_ops

    far = 2**40
    order = (torch.tensor([-far, far, -1, 8, 1, 2, 3, 4]), torch.tensor([[0, far], [7, -1], [8, 2], [-far, 3]]))
    inputs = [between_nans(4, K), between_nans(4, 2), between_nans(E, 2 * F, K), between_nans(E, K, F)]
    arguments = (*inputs, *order, torch.tensor(offsets), "silu", True, keep)
    y, pre_RU = triton_ops._forward(*arguments, None, None)
    assert y.isfinite().all() and pre_RU.isfinite().all()
    canaries()
    # torch gathers the weights' gradient, and refuses this inverse
    grads = triton_ops._backward(between_nans(4, K), pre_RU, *arguments, [True, False, True, True], None, None)
    assert all(grad.isfinite().all() for grad in grads)
    canaries()


@pytest.mark.parametrize("kind", [row_layouts.GroupedLayout, row_layouts.BlockLayout])
@pytest.mark.parametrize("offsets", WRONG)
def test_layouts_stay_in_their_memory(offsets: list[int], kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "row_layout", lambda bounds, num_rows, *_: kind(bounds, num_rows))
    rows, weight, dy = (t.bfloat16() for t in (torch.randn(R, 8), torch.randn(E, 16, 8), torch.randn(R, 16)))
    ends_E = row_layouts.clamp_offsets(torch.tensor(offsets), R)
    assert ends_E.min() >= 0 and ends_E.max() <= R and (ends_E.diff() >= 0).all()
    assert accelerator.forward(rows, weight, torch.tensor(offsets), None).isfinite().all()
    assert accelerator.wgrad(dy, rows, torch.tensor(offsets), None, None, None).isfinite().all()


def test_wrong_inputs_raise_one_line(backend: str) -> None:
    rows, weight, dy, index_R = torch.randn(R, K), torch.randn(E, N, K), torch.randn(R, N), torch.arange(R)
    gemm = {"rows": rows, "weight_ENK": weight, "offsets_E": OFFSETS, "index_R": None}
    wgrad = {"dy": dy, "rows": rows, "offsets_E": OFFSETS}
    wrong: list[tuple[Callable[..., Tensor], dict[str, Any], str]] = [
        (grouped_gemm, gemm | {"rows": rows[None]}, r"rows=torch.float32\[1, 11, 8\]"),
        (grouped_gemm, gemm | {"rows": rows[:, 0]}, r"rows=torch.float32\[11\]"),
        (grouped_gemm, gemm | {"rows": rows.int(), "weight_ENK": weight.int()}, "rows=torch.int32"),
        (grouped_gemm, gemm | {"weight_ENK": weight[0]}, "weight=.*needs 3 experts"),
        (grouped_gemm, gemm | {"weight_ENK": weight[:2]}, "weight=.*needs 3 experts"),
        (grouped_gemm, gemm | {"offsets_E": OFFSETS[0]}, r"offsets_E=torch.int64\[\]"),
        (grouped_gemm, gemm | {"offsets_E": OFFSETS[None]}, r"offsets_E=torch.int64\[1, 4\]"),
        (grouped_gemm, gemm | {"offsets_E": OFFSETS[:0]}, r"offsets_E=torch.int64\[0\]"),
        (grouped_gemm, gemm | {"index_R": index_R.int()}, "index_R=torch.int32"),
        (grouped_gemm, gemm | {"index_R": index_R[None]}, r"index_R=torch.int64\[1, 11\]"),
        (grouped_gemm, gemm | {"rows": rows[:0], "index_R": index_R}, "index_R=.*no rows to gather"),
        (grouped_gemm, gemm | {"weight_ENK": weight.to("meta")}, "weight is on meta: move it to cpu"),
        (grouped_gemm, gemm | {"offsets_E": OFFSETS.to("meta")}, "offsets_E is on meta"),
        (grouped_gemm, gemm | {"index_R": index_R.to("meta")}, "index_R is on meta"),
        (grouped_gemm_wgrad, wgrad | {"dy": dy[None]}, r"dy=torch.float32\[1, 11, 6\]"),
        (grouped_gemm_wgrad, wgrad | {"offsets_E": OFFSETS.int()}, "offsets_E=torch.int32"),
        (grouped_gemm_wgrad, wgrad | {"dy_index_R": index_R.int()}, "dy_index_R=torch.int32"),
        (grouped_gemm_wgrad, wgrad | {"out": torch.zeros(E, N, K, device="meta")}, "out is on meta"),
    ]
    mlp = mlp_inputs()
    order = mlp["order"]
    wrong += [
        (expert_mlp, mlp | {"x_SD": mlp["x_SD"][None]}, r"x_SD=\[1, 4, 8\]"),
        (expert_mlp, mlp | {"weights_SK": mlp["weights_SK"].long()}, "weights_SK=torch.int64"),
        (expert_mlp, mlp | {"down_EDF": mlp["down_EDF"].to("meta")}, "down is on meta"),
        (expert_mlp, mlp | {"down_EDF": torch.tensor(1.0)}, "gate_up, down="),
        (expert_mlp, mlp | {"order": order._replace(offsets_E=OFFSETS.to("meta"))}, "offsets_E is on meta"),
        (expert_mlp, mlp | {"order": order._replace(offsets_E=OFFSETS.int())}, "offsets_E=torch.int32"),
        *(
            (expert_mlp, mlp | {"order": order._replace(**other)}, rf"order_R, inverse_SK=.*{found}")
            for other, found in (
                ({"order_R": order.order_R.int()}, "int32"),
                ({"inverse_SK": order.inverse_SK.int()}, "int32"),
                ({"order_R": order.order_R[1:]}, r"\[7\]"),
                ({"order_R": order.order_R[None]}, r"\[1, 8\]"),
            )
        ),
    ]
    for op, inputs, message in wrong:
        with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
            op(**inputs, backend=backend)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 8), (2, 3, 0, 8), (2, 3, 8, 0), (0, 0, 0, 0)])
def test_nothing_to_multiply(shape: tuple[int, ...], backend: str) -> None:
    experts, num_rows, n, k = shape
    offsets_E = torch.tensor([0, *[min(num_rows, 2)] * experts])
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.randn(num_rows, k, dtype=dtype, requires_grad=True)
        weight = torch.randn(experts, n, k, dtype=dtype, requires_grad=True)
        out = grouped_gemm(rows, weight, offsets_E, backend=backend)
        assert out.shape == (num_rows, n) and (out == 0).all()
        out.sum().backward()
        assert rows.grad.shape == rows.shape and weight.grad.shape == weight.shape
        assert (rows.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("shape", [(4, 2, 0, 5), (4, 2, 8, 0), (0, 2, 8, 5), (4, 0, 8, 5)])
def test_experts_of_nothing(shape: tuple[int, ...], backend: str) -> None:
    inputs = mlp_inputs(*shape)
    leaves = [t.requires_grad_() for name, t in inputs.items() if name != "order"]
    y_SD = expert_mlp(**inputs, backend=backend)
    assert y_SD.shape == inputs["x_SD"].shape and (y_SD == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(y_SD.sum(), leaves))


def without_values(backend: str, dtype: torch.dtype, device: str) -> None:
    """Check the shapes, dtypes and devices of every op's results in both passes."""
    inputs = mlp_inputs(dtype=dtype, device=device)
    x_SD, order, gate_up = inputs["x_SD"], inputs["order"], inputs["gate_up_EFD"]
    leaves = [t.requires_grad_() for name, t in inputs.items() if name != "order"]
    y_SD = expert_mlp(**inputs, backend=backend)
    rows = grouped_gemm(x_SD, gate_up, order.offsets_E, order.order_R // 2, backend=backend)
    assert y_SD.shape == (4, K) and rows.shape == (8, 2 * F)
    found = [y_SD, rows, *torch.autograd.grad(y_SD, leaves, y_SD)]
    found += torch.autograd.grad(rows, [x_SD, gate_up], rows)
    for grad, leaf in zip(found[2:], [*leaves, x_SD, gate_up], strict=True):
        assert grad.shape == leaf.shape
    dy, x_SD = rows.detach(), x_SD.detach()
    found.append(grouped_gemm_dgrad(dy, gate_up, order.offsets_E, backend=backend))
    found.append(grouped_gemm_wgrad(dy, x_SD, order.offsets_E, None, order.order_R // 2, backend=backend))
    assert found[-2].shape == (8, K) and found[-1].shape == gate_up.shape
    assert all(t.dtype == dtype and t.device.type == device for t in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_without_values(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    for dtype in (torch.float32, torch.bfloat16):
        without_values(backend, dtype, "meta")
        with FakeTensorMode(allow_non_fake_inputs=True):
            without_values(backend, dtype, "cpu")


class TestOnAFakeGPU:
    pytestmark = needs_fake_cuda

    def test_tensors_without_values(self) -> None:
        pytest.importorskip("triton")
        on_fake_cuda(lambda: [without_values(b, d, "cuda") for b in BACKENDS for d in (torch.float32, torch.bfloat16)])

    def test_a_weight_at_any_address_reaches_the_grouped_product_aligned(self) -> None:
        """CUDA's grouped product requires addresses that are multiples of 16 bytes, but a view may start anywhere."""

        def body() -> list[int]:
            flat = torch.randn(1 + E * 16 * 8, device="cuda", dtype=torch.bfloat16)
            seen, plain = [], torch.nn.functional.grouped_mm
            torch.nn.functional.grouped_mm = lambda a, b, **k: seen.append((a, b)) or plain(a, b, **k)
            rows, offsets_E = (
                torch.randn(R, 8, device="cuda", dtype=torch.bfloat16),
                torch.zeros(E + 1, device="cuda").long(),
            )
            for shift in (0, 1):
                weight = flat[shift : shift + E * 16 * 8].view(E, 16, 8).detach().requires_grad_()
                grouped_gemm(rows.requires_grad_(), weight, offsets_E).sum().backward()
            return [t.storage_offset() * 2 % 16 for pair in seen for t in pair]

        assert on_fake_cuda(body) == [0] * 12


def test_a_default_device_changes_nothing(backend: str) -> None:
    large = backend != "triton"  # so that the CPU's buffers come from the pool
    inputs = mlp_inputs(700, 2, 96, 512) if large else mlp_inputs()
    order, dy_SD = inputs["order"], torch.randn(*inputs["x_SD"].shape)
    leaves = [t.requires_grad_() for name, t in inputs.items() if name != "order"]

    def both_passes(dtype: torch.dtype) -> list[Tensor]:
        cast = {n: t if n in ("order", "weights_SK") else t.to(dtype) for n, t in inputs.items()}
        y_SD = expert_mlp(**cast, backend=backend)
        rows = grouped_gemm(cast["x_SD"], cast["gate_up_EFD"], order.offsets_E, order.order_R // 2, backend)
        return [y_SD, rows, *torch.autograd.grad((y_SD, rows), leaves, (dy_SD.to(dtype), rows.detach()))]

    for dtype in (torch.float32, torch.bfloat16):  # 16-bit rows are padded on the CPU
        want = both_passes(dtype)
        with torch.device("meta"):
            found = both_passes(dtype)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize(
    ("setting", "fp32"), [("none", "ieee"), ("ieee", "ieee"), ("tf32", "tf32"), ("high", "tf32"), ("highest", "ieee")]
)
def test_products_of_fp32_follow_torchs_setting(setting: str, fp32: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from equimoe.kernels.expert_mlp import triton_ops as mlp
    from equimoe.kernels.grouped_gemm import triton_ops as gemm

    class Recorded:
        """Wraps a kernel and records its launches."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                seen.append(kwargs["PRECISION"])
                self.kernel[grid](*args, **kwargs)

            return launch

    seen: list[str] = []
    for module, name in (
        (gemm, "_gemm_kernel"),
        (gemm, "_wgrad_kernel"),
        (mlp, "_up_kernel"),
        (mlp, "_up_grad_kernel"),
    ):
        monkeypatch.setattr(module, name, Recorded(getattr(module, name)))
    matmuls = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [matmul.fp32_precision for matmul in matmuls]
    try:
        if setting.startswith("high"):
            torch.set_float32_matmul_precision(setting)
        else:
            matmuls[0].fp32_precision = setting
        for dtype, expected in ((torch.float32, fp32), (torch.bfloat16, "ieee")):
            inputs = mlp_inputs(dtype=dtype)
            leaves = [t.requires_grad_() for name, t in inputs.items() if name != "order"]
            expert_mlp(**inputs, backend="triton").sum().backward()
            assert len(seen) == 6 and set(seen) == {expected}, dtype
            seen.clear()
        assert leaves[0].grad is not None
    finally:
        for matmul, value in zip(matmuls, before, strict=True):
            matmul.fp32_precision = value
