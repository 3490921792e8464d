"""Every shipped tile gives correct results in the kernels that use it, compared with fp64 under Triton's interpreter.

Whether a tile's masks and tails are correct does not depend on the chip, so each distinct tile runs once per dtype, at
sizes just over one tile in every dimension. R rows sorted by expert, E experts, D hidden, F expert width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.expert_mlp.types import MLPOptions
from equimoe.kernels.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from equimoe.kernels.matmul_tiles import ARCHS, MANY_ROWS, OPS, MatmulTile, shipped_tile
from equimoe.kernels.sort_by_expert import ExpertOrder, sort_by_expert

pytest.importorskip("triton")
from equimoe.kernels.expert_mlp import triton_ops as mlp
from equimoe.kernels.grouped_gemm import triton_ops as gemm

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's; a GPU has tiles of its own")
#: largest permitted error: relative by norm, and of the worst row relative to the rows' root mean square
TOLERANCE = {torch.float32: (2e-6, 1e-5), torch.bfloat16: (1e-2, 4e-2), torch.float16: (1e-3, 6e-3)}
TILES = sorted(
    {
        (
            op,
            str(dtype).removeprefix("torch."),
            shipped_tile(op, arch, dtype, rows, aligned)._replace(num_warps=1, num_stages=1),
        )
        for op in OPS
        for arch in ARCHS
        for dtype in TOLERANCE
        for rows in (0, MANY_ROWS)
        for aligned in (True, False)
    }
)


def of(op: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("dtype", "tile"), [(getattr(torch, name), c) for o, name, c in TILES if o == op])


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Returns a function that makes all kernels use one tile."""

    def override(tile: MatmulTile) -> None:
        monkeypatch.setattr(gemm, "shipped_tile", lambda *_: tile)

    return override


def close(found: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    by_norm, by_row = TOLERANCE[dtype]
    error_N, scale_N = (t.double().reshape(-1, want.shape[-1]).norm(dim=1) for t in (found - want, want))
    assert found.shape == want.shape and found.isfinite().all()
    assert error_N.norm() <= by_norm * scale_N.norm()
    assert error_N.max() <= by_row * scale_N.square().mean().sqrt()


def offsets(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


@of("gemm")
def test_gemm(dtype: torch.dtype, tile: MatmulTile, use) -> None:
    """The forward, and the gradient of the rows, which exchanges the in and out widths."""
    use(tile)
    bounds, n, k = offsets(tile.m + 1, 0, 2), tile.n + 3, tile.k + 5
    num_rows = tile.m + 4
    index_R = torch.randint(0, 9, (num_rows,))
    rows, weight = torch.randn(9, k).to(dtype), torch.randn(3, n, k).to(dtype)
    dy_RK = torch.randn(num_rows, k).to(dtype)
    for even in (False, True):
        if even:
            rows, weight, dy_RK = (t[..., : tile.k].contiguous() for t in (rows, weight, dy_RK))
        out = grouped_gemm(rows, weight, bounds, index_R, backend="triton")
        close(out, grouped_gemm(rows, weight, bounds, index_R, backend="reference"), dtype)
        turned = weight.mT.contiguous()
        drows = grouped_gemm_dgrad(dy_RK, turned, bounds, backend="triton")
        close(drows, grouped_gemm_dgrad(dy_RK, turned, bounds, backend="reference"), dtype)


@of("wgrad")
@pytest.mark.slow
def test_weight_gradient(dtype: torch.dtype, tile: MatmulTile, use) -> None:
    use(tile)
    bounds, num_rows = offsets(tile.k + 1, 0, 2), tile.k + 4
    dy, rows, index_R = torch.randn(num_rows, tile.m + 3), torch.randn(9, tile.n + 5), torch.randint(0, 9, (num_rows,))
    arguments = (dy.to(dtype), rows.to(dtype), bounds, None, index_R)
    want = grouped_gemm_wgrad(*arguments, backend="reference")
    close(grouped_gemm_wgrad(*arguments, backend="triton"), want, dtype)
    before = torch.randn(want.shape)
    added = grouped_gemm_wgrad(*arguments, before.clone(), backend="triton")
    close(added, before + grouped_gemm_wgrad(*(t.double() for t in arguments[:2]), *arguments[2:]), torch.float32)


def make(tile: MatmulTile, dtype: torch.dtype, gated: bool) -> tuple[Tensor, Tensor, ExpertOrder, Tensor, Tensor]:
    """Make inputs: one expert has one row more than a tile, one none, one two; a few rows are dropped."""
    width, hidden, sources = tile.n + 3, tile.k + 5, tile.m + 5
    ids_SK = torch.zeros(sources, 1, dtype=torch.int64)
    ids_SK[3:5], ids_SK[7:9] = 2, -1
    x = torch.randn(sources, hidden).to(dtype)
    gate_up = (torch.randn(3, 2 * width if gated else width, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(3, hidden, width) / width**0.5).to(dtype)
    return x, torch.rand(sources, 1), sort_by_expert(ids_SK, 3), gate_up, down


def up_kernel(dtype: torch.dtype, tile: MatmulTile, kind: MLPOptions) -> None:
    x, weights, order, gate_up, down = make(tile, dtype, kind.gated)
    eye = torch.eye(down.shape[2]).expand(3, -1, -1)
    for even in (False, True):
        if even:
            x, gate_up = (t[..., : tile.k].contiguous() for t in (x, gate_up))
        h_RF, pre_RU = mlp._up(x, weights, gate_up, order.order_R, order.offsets_E, kind, True)
        kept = int(order.offsets_E[-1])
        assert (h_RF[kept:] == 0).all() and (pre_RU[kept:] == 0).all(), "rows past the end may belong to another expert"
        rows = x.double()[order.order_R[:kept]]
        close(pre_RU[:kept], grouped_gemm(rows, gate_up.double(), order.offsets_E).to(dtype), dtype)
        # with the identity as down projection (and sizes padded to match), the output is h
        size = max(eye.shape[-1], x.shape[1])
        wide_x = torch.nn.functional.pad(x.double(), (0, size - x.shape[1]))
        wide_up = torch.nn.functional.pad(gate_up.double(), (0, size - x.shape[1]))
        wide_eye = torch.nn.functional.pad(eye.double(), (0, 0, 0, size - eye.shape[1]))
        options = {"activation": kind.activation, "gated": kind.gated}
        y = expert_mlp(wide_x, weights.double(), order, wide_up, wide_eye, "reference", **options)
        close(h_RF[:kept], y[order.order_R[:kept], : eye.shape[1]].to(dtype), dtype)


@of("gated")
@pytest.mark.slow
def test_up_and_gate(dtype: torch.dtype, tile: MatmulTile, use) -> None:
    use(tile)
    up_kernel(dtype, tile, MLPOptions("silu", True))


@of("plain")
@pytest.mark.slow
def test_up_without_a_gate(dtype: torch.dtype, tile: MatmulTile, use) -> None:
    use(tile)
    up_kernel(dtype, tile, MLPOptions("gelu", False))


@pytest.mark.parametrize("gated", [True, False])
@of("gated_grad")
@pytest.mark.slow
def test_gradient_behind_the_activation(dtype: torch.dtype, tile: MatmulTile, gated: bool, use) -> None:
    x, weights, order, gate_up, down = make(tile, dtype, gated)
    kind = MLPOptions("gelu_tanh", gated)
    options = {"activation": kind.activation, "gated": gated}
    kept = int(order.offsets_E[-1])
    flat_R = order.order_R[:kept]
    for even in (False, True):
        if even:
            x, gate_up, down = x[:, : tile.k], gate_up[..., : tile.k].contiguous(), down[:, : tile.k].contiguous()
        dy = torch.randn(x.shape).to(dtype)
        pre_RU = grouped_gemm(x.double()[order.order_R], gate_up.double(), order.offsets_E).to(dtype)
        use(tile)
        h_RF, dpre_RU, dweights_RP = mlp._up_grad(dy, pre_RU, weights, down, *order[::2], kind)
        assert h_RF[kept:].isnan().all() and dpre_RU[kept:].isnan().all() and dweights_RP[kept:].isnan().all()
        # with the pre-activation as rows and the identity as up projection, the rows' gradient is the pre-activation's
        both = pre_RU.shape[1]
        size = max(both, x.shape[1])
        pre_SU = torch.zeros(x.shape[0], size, dtype=torch.float64)
        pre_SU[flat_R, :both] = pre_RU[:kept].double()
        eye = torch.eye(both, size, dtype=torch.float64).expand(3, -1, -1)
        wide_down = torch.nn.functional.pad(down.double(), (0, 0, 0, size - down.shape[1]))
        leaves = [pre_SU.requires_grad_(), weights.double().requires_grad_()]
        y = expert_mlp(leaves[0], leaves[1], order, eye, wide_down, "reference", **options)
        dpre, dweights = torch.autograd.grad(y, leaves, torch.nn.functional.pad(dy.double(), (0, size - dy.shape[1])))
        close(dpre_RU[:kept], dpre[flat_R, :both].to(dtype), dtype)
        close(dweights_RP[:kept].sum(1, keepdim=True), dweights[flat_R].float(), dtype)
        value = (pre_RU[:, : h_RF.shape[1]]).double()
        h = torch.nn.functional.gelu(value, approximate="tanh") * (pre_RU[:, h_RF.shape[1] :].double() if gated else 1)
        close(h_RF[:kept], (h * weights[order.order_R].double())[:kept].to(dtype), dtype)


def test_odd_widths_and_addresses_take_a_tile_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton loads single elements if a width or an address is not a multiple of 16."""
    monkeypatch.setattr(gemm, "arch_of", lambda device: "sm_90")
    flat = torch.zeros(16 * 32 + 1, dtype=torch.bfloat16)
    rows, shifted = flat[:-1].view(16, 32), flat[1:].view(16, 32)
    wide, single = (shipped_tile("gemm", "sm_90", torch.bfloat16, 0, aligned) for aligned in (True, False))
    assert wide != single
    assert gemm.tile_for("gemm", rows, 16, 4, rows, 64, 32) == wide
    for operands in ((rows, rows, 64, 33), (rows, rows, 65, 32), (rows, shifted, 64, 32), (shifted, rows, 64, 32)):
        assert gemm.tile_for("gemm", operands[0], 16, 4, *operands[1:]) == single


def test_the_table_is_all_covered() -> None:
    assert {op for op, _, _ in TILES} == set(OPS) and len(TILES) >= 4 * len(OPS)
