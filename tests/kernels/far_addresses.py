"""Runs kernels at elements whose index does not fit 32 bits: `python -m tests.kernels.far_addresses [case ...]`.

Prints each case that passed, and the peak memory use. Tensors of more than 2**31 elements take memory only where they
are touched, and only the last program of each launch runs, under Triton's interpreter. An address truncated to 32 bits
lies outside of all tensors and crashes the process, so the cases run in a process of their own.
"""

# R rows sorted by expert, S source rows, E experts, K in width, N out width, D hidden, F expert width.

from __future__ import annotations

import faulthandler
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton.runtime.interpreter as runtime
from torch import Tensor

from equimoe.kernels.expert_mlp import triton_ops as mlp
from equimoe.kernels.expert_mlp.types import MLPOptions
from equimoe.kernels.grouped_gemm import triton_ops as gemm
from equimoe.kernels.matmul_tiles import MatmulTile
from equimoe.kernels.permute import triton_ops as permute

#: the products of these rows and width, and of these experts and weight sizes, are just over 2**31
ROWS, WIDTH = 2**16 + 2, 2**15
EXPERTS, LONG, SHORT = 9, 2**22, 64
#: the depth of a tile, and a width whose product with it is over 2**31
TILE, WIDE = 1024, 2**21 + 2**12
ONE = MLPOptions("silu", True)


class Last:
    """Wraps a kernel so that only the last program of a launch runs."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        builder, last = runtime.interpreter_builder, (*(n - 1 for n in grid), 0, 0)[:3]

        def launch(*args: Any, **kwargs: Any) -> None:
            builder.set_grid_idx = lambda *_: setattr(builder, "grid_idx", last)
            try:
                self.kernel[(1,)](*args, **kwargs)
            finally:
                del builder.set_grid_idx

        return launch


def prepare() -> None:
    runtime.GridExecutor._restore_args_dev = lambda *_: None  # this method copies every tensor, on the CPU onto itself
    # 16 columns of the result; "gated" has those of gate and up
    gemm.shipped_tile = lambda op, *_: MatmulTile(16, 32 if op == "gated" else 16, TILE, 1, 1, 1)
    for module, names in (
        (gemm, ("_gemm_kernel", "_wgrad_kernel")),
        (mlp, ("_up_kernel", "_up_grad_kernel")),
        (permute, ("permute_rows", "combine_rows")),
    ):
        for name in names:
            setattr(module, name, Last(getattr(module, name)))


def only_tile(expert: int, row: int, stop: int) -> None:
    """Make the map of row tiles contain this tile only."""
    gemm.tile_map = mlp.tile_map = lambda *_: torch.tensor([[expert], [row], [stop]])


def far(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return a tensor of more than 2**31 elements that takes memory only where it is touched."""
    tensor = torch.empty(shape, dtype=dtype)
    assert tensor.numel() > 2**31
    return tensor


def fill(tensor: Tensor) -> Tensor:
    return tensor.copy_(torch.randn(tensor.shape))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape).half()


def close(found: Tensor, want: Tensor) -> None:
    error = (found.double() - want).norm() / want.norm()
    assert error < 5e-3, f"relative error {error}"


def gemm_rows(gathered: bool) -> None:
    rows, weight = far(ROWS, WIDTH), randn(1, 16, WIDTH)
    last = fill(rows[-2:])
    only_tile(0, *((0, 2) if gathered else (ROWS - 2, ROWS)))
    index_R = torch.tensor([ROWS - 2, ROWS - 1]) if gathered else None
    out = gemm.gemm(rows, weight, torch.tensor([0, ROWS]), index_R)
    close(out[-2:], last.double() @ weight[0].double().T)


def gemm_out() -> None:
    rows, weight = randn(ROWS, 16), randn(1, WIDTH, 16)
    only_tile(0, ROWS - 2, ROWS)
    out = gemm.gemm(rows, weight, torch.tensor([0, ROWS]))
    assert out.numel() > 2**31
    close(out[-2:, -16:], rows[-2:].double() @ weight[0, -16:].double().T)


def gemm_weight(experts: int, n: int, k: int, transposed: bool) -> None:
    weight, rows = far(experts, *((k, n) if transposed else (n, k))), randn(2, k)
    last = fill(weight[-1][:, -16:].T if transposed else weight[-1][-16:])
    only_tile(experts - 1, 0, 2)
    out = gemm.gemm(rows, weight, torch.zeros(experts + 1, dtype=torch.int64), transposed=transposed)
    close(out[:, -16:], rows.double() @ last.double().T)


def wgrad_out(experts: int, n: int, k: int) -> None:
    dy, rows, offsets = randn(5, n), randn(5, k), torch.zeros(experts + 1, dtype=torch.int64)
    offsets[-1] = 5
    grad = gemm.weight_grad(dy, rows, offsets)
    assert grad.numel() > 2**31
    close(grad[-1, -16:, -16:], dy[:, -16:].double().T @ rows[:, -16:].double())


def wgrad_rows(gathered: bool) -> None:
    dy, rows = far(ROWS, WIDTH), far(ROWS, WIDTH)
    left, right = fill(dy[-3:, -16:]), fill(rows[-3:, -16:])
    index_R = torch.arange(ROWS - 3, ROWS) if gathered else None
    offsets = torch.tensor([0, 3] if gathered else [ROWS - 3, ROWS])
    grad = gemm.weight_grad(dy, rows, offsets, index_R, index_R)
    close(grad[0, -16:, -16:], left.double().T @ right.double())


def activated(pre_RU: Tensor) -> Tensor:
    gate, up = pre_RU.double().chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


def up_sources() -> None:
    x, gate_up, weights = far(ROWS, WIDTH), randn(1, 32, WIDTH) / WIDTH**0.5, torch.rand(ROWS, 1)
    last = fill(x[-2:])
    only_tile(0, 0, 2)
    order_R = torch.tensor([ROWS - 2, ROWS - 1])
    h, pre = mlp._up(x, weights, gate_up, order_R, torch.tensor([0, 2]), ONE, True)
    want = last.double() @ gate_up[0].double().T
    close(pre, want)
    close(h, weights[-2:] * activated(want))


def up_rows() -> None:
    x, gate_up, weights = randn(ROWS, 16), randn(1, 2 * WIDTH, 16) / 4, torch.rand(ROWS, 1)
    only_tile(0, ROWS - 2, ROWS)
    h, pre = mlp._up(x, weights, gate_up, torch.arange(ROWS), torch.tensor([0, ROWS]), ONE, True)
    assert h.numel() > 2**31
    parts = [gate_up[0, WIDTH - 16 : WIDTH], gate_up[0, -16:]]
    want = x[-2:].double() @ torch.cat(parts).double().T
    close(torch.cat([pre[-2:, WIDTH - 16 : WIDTH], pre[-2:, -16:]], 1), want)
    close(h[-2:, -16:], weights[-2:] * activated(want))


def up_weight() -> None:
    gate_up, x, weights = far(EXPERTS, LONG, SHORT), randn(2, SHORT) / 8, torch.rand(2, 1)
    half = LONG // 2
    parts = [fill(gate_up[-1, half - 16 : half]), fill(gate_up[-1, -16:])]
    only_tile(EXPERTS - 1, 0, 2)
    h, _ = mlp._up(x, weights, gate_up, torch.arange(2), torch.zeros(EXPERTS + 1, dtype=torch.int64), ONE, True)
    close(h[:, -16:], weights * activated(x.double() @ torch.cat(parts).double().T))


def up_grad_check(found: tuple[Tensor, ...], dy: Tensor, down: Tensor, pre: Tensor, weights: Tensor) -> None:
    """Check h, the gradients of gate and up, and the last part of the weights' gradient, for the same 16 columns."""
    leaf, w = pre.double().requires_grad_(), weights.double().requires_grad_()
    h = w * activated(leaf)
    dpre, dw = torch.autograd.grad(h, (leaf, w), dy.double() @ down.double())
    for got, want in zip(found, (h.detach(), *dpre.chunk(2, 1), dw), strict=True):
        close(got, want)


def up_grad_sources() -> None:
    dy, down, weights, pre = far(ROWS, WIDTH), randn(1, WIDTH, 16) / WIDTH**0.5, torch.rand(ROWS, 1), randn(2, 32)
    last = fill(dy[-2:])
    only_tile(0, 0, 2)
    order_R = torch.tensor([ROWS - 2, ROWS - 1])
    h, dpre, dweights = mlp._up_grad(dy, pre, weights, down, order_R, torch.tensor([0, 2]), ONE)
    up_grad_check((h, *dpre.chunk(2, 1), dweights), last, down[0], pre, weights[-2:])


def up_grad_rows() -> None:
    dy, down, weights, pre = randn(ROWS, 16), randn(1, 16, WIDTH) / 4, torch.rand(ROWS, 1), far(ROWS, 2 * WIDTH)
    columns = (slice(-2, None), slice(WIDTH - 16, WIDTH)), (slice(-2, None), slice(2 * WIDTH - 16, None))
    last = torch.cat([fill(pre[at]) for at in columns], 1)
    only_tile(0, ROWS - 2, ROWS)
    h, dpre, dweights = mlp._up_grad(dy, pre, weights, down, torch.arange(ROWS), torch.tensor([0, ROWS]), ONE)
    found = (h[-2:, -16:], *(dpre[at] for at in columns), dweights[-2:, -1:])
    up_grad_check(found, dy[-2:], down[0, :, -16:], last, weights[-2:])


def up_grad_weight(experts: int, width: int, hidden: int) -> None:
    down, dy, weights = far(experts, hidden, width), randn(2, hidden) / hidden**0.5, torch.rand(2, 1)
    pre = torch.empty(2, 2 * width, dtype=torch.float16)
    columns = (slice(width - 16, width), slice(2 * width - 16, None))
    last = torch.cat([fill(pre[:, at]) for at in columns], 1)
    part = fill(down[-1][:, -16:])
    only_tile(experts - 1, 0, 2)
    offsets = torch.zeros(experts + 1, dtype=torch.int64)
    h, dpre, dweights = mlp._up_grad(dy, pre, weights, down, torch.arange(2), offsets, ONE)
    found = (h[:, -16:], *(dpre[:, at] for at in columns), dweights[:, -1:])
    up_grad_check(found, dy, part, last, weights)


def combine() -> None:
    rows, inverse = far(ROWS, WIDTH), torch.full((ROWS, 2), -1)
    last = fill(rows[-2:, -16:])
    inverse[-1] = torch.tensor([ROWS - 1, ROWS - 2])
    y = permute.sum_rows(rows, inverse)
    assert y.numel() > 2**31
    close(y[-1, -16:], last.double().sum(0))


def permute_rows() -> None:
    x, order_R = far(ROWS, WIDTH), torch.arange(ROWS)
    last = fill(x[-1:, -16:])
    rows = permute._permute(x, order_R, order_R[:, None], torch.tensor([0, ROWS]), ROWS)
    assert rows.numel() > 2**31
    close(rows[-1, -16:], last[0].double())


CASES: dict[str, Callable[[], None]] = {
    "gemm, rows": lambda: gemm_rows(False),
    "gemm, gathered rows": lambda: gemm_rows(True),
    "gemm, result": gemm_out,
    "gemm, weight by expert": lambda: gemm_weight(EXPERTS, LONG, SHORT, False),
    "gemm, weight by expert, transposed": lambda: gemm_weight(EXPERTS, LONG, SHORT, True),
    "gemm, weight of one expert": lambda: gemm_weight(1, 2**25 + 16, SHORT, False),
    "gemm, weight of one expert, transposed": lambda: gemm_weight(1, 2**16, WIDTH + 16, True),
    "gemm, weight of one tile, transposed": lambda: gemm_weight(1, WIDE, TILE + 16, True),
    "weight gradient, result by expert": lambda: wgrad_out(EXPERTS, 2**14, 2**14),
    "weight gradient, result of one expert": lambda: wgrad_out(1, 2**16 + 16, WIDTH),
    "weight gradient, rows": lambda: wgrad_rows(False),
    "weight gradient, gathered rows": lambda: wgrad_rows(True),
    "up, sources": up_sources,
    "up, rows": up_rows,
    "up, weight": up_weight,
    "gradient of up, sources": up_grad_sources,
    "gradient of up, rows": up_grad_rows,
    "gradient of up, weight by expert": lambda: up_grad_weight(EXPERTS, LONG, SHORT),
    "gradient of up, weight of one tile": lambda: up_grad_weight(1, WIDE, TILE + 16),
    "combine": combine,
    "permute": permute_rows,
}


def main(names: list[str]) -> None:
    faulthandler.enable()
    torch.manual_seed(0)
    prepare()
    for name in names or CASES:
        try:
            CASES[name]()
            print(f"passed: {name}", flush=True)
        except Exception as error:  # run the other cases, too
            print(f"failed: {name}: {error!r}", flush=True)
    print(f"peak: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB")


if __name__ == "__main__":
    main(sys.argv[1:])
