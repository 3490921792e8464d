"""What "auto" runs on a GPU that nobody has measured: which kernels, how many, and how many bytes they move."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.permute import combine
from equimoe.kernels.sort_by_expert import ExpertOrder
from equimoe.moe import MoE, MoEConfig
from tests.helpers.fake_cuda import Watch, needs_fake_cuda, on_fake_cuda

pytest.importorskip("triton", reason="needs triton, which is not to be had on this system")
pytestmark = needs_fake_cuda

#: 30B-b: tokens, hidden, expert width, experts, choices
T, D, F, E, K = 32768, 4096, 512, 128, 8
GB = 1e9


def order() -> ExpertOrder:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device="cuda")

    return ExpertOrder(empty(T * K), empty(T, K), empty(E + 1))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_sum_over_k_moves_little_more_than_its_rows(backend: str) -> None:
    def body() -> tuple[float, int]:
        rows = torch.empty(T * K, D, dtype=torch.bfloat16, device="cuda")
        with Watch() as watch:
            combine(rows, order(), backend=backend)
        return watch.bytes / GB, watch.ops.total()

    moved, kernels = on_fake_cuda(body)
    floor = 2 * (T * K * D + T * D) / GB
    assert moved < 1.5 * floor and kernels <= 12, (moved, floor, kernels)


def test_auto_moves_less_and_launches_fewer_kernels_than_torch() -> None:
    def body() -> dict[str, tuple[float, int, dict[str, int]]]:
        found = {}
        for backend in ("auto", "torch"):
            x, gate_up, down = (
                torch.empty(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
                for shape in ((T, D), (E, 2 * F, D), (E, D, F))
            )
            weights = torch.empty(T, K, device="cuda", requires_grad=True)
            with Watch() as watch:
                expert_mlp(x, weights, order(), gate_up, down, backend).backward(torch.empty_like(x))
            assert not watch.waits and not watch.mixed
            found[backend] = (watch.bytes / GB, watch.ops.total(), dict(watch.ops))
        return found

    found = on_fake_cuda(body)
    (moved, kernels, ops), (torch_moved, torch_kernels, _) = found["auto"], found["torch"]
    assert ops["aten._grouped_mm"] == 6
    assert [ops[f"equimoe.{name}"] for name in ("permute", "activate", "activate_backward", "combine")] == [3, 1, 1, 2]
    assert not {"aten.index_select", "aten.silu", "aten.embedding_bag"} & set(ops), ops
    assert moved < 0.8 * torch_moved and kernels < 0.5 * torch_kernels, found


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def test_what_each_dtype_and_width_gets() -> None:
    """fp16, fp32 and odd widths get Triton, which copies no weights; fp64 has no Triton products."""

    def body() -> dict[str, set[str]]:
        found = {}
        for name, dtype in DTYPES.items():
            for width in (48, 44):
                torch.set_default_dtype(dtype)
                with torch.device("cuda"):
                    layer = MoE(
                        replace(
                            MoEConfig(hidden_size=32, intermediate_size=48, num_experts=8, top_k=2),
                            intermediate_size=width,
                        )
                    )
                    x = torch.randn(4, 16, 32, requires_grad=True)
                torch.set_default_dtype(torch.float32)
                with Watch() as watch:
                    layer(x).float().sum().backward()
                assert not watch.waits and not watch.mixed
                found[f"{name} {width}"] = {op for op in watch.ops if op.startswith("equimoe.") or "grouped_mm" in op}
        return found

    found = on_fake_cuda(body)
    sort, triton = {"equimoe.sort_by_expert"}, {"equimoe.expert_mlp", "equimoe.expert_mlp_backward"}
    parts = {f"equimoe.{name}" for name in ("permute", "combine", "activate", "activate_backward", "zero_without_rows")}
    expected = {f"{name} {width}": sort | triton for name in DTYPES for width in (48, 44)}
    expected["bf16 48"] = sort | parts | {"aten._grouped_mm"}
    expected = {name: ops | {"equimoe.topk_gate", "equimoe.topk_gate_backward"} for name, ops in expected.items()}
    expected["fp64 48"] = expected["fp64 44"] = sort
    assert found == expected
