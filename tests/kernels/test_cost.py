"""Compares the lower bounds with published numbers, and the saved bytes with those of real runs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import cost
from benchmarks.shared import shapes, timing
from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.sort_by_expert import sort_by_expert

#: measured on an H200: 788 TFLOP/s of dense bf16, a copy at 4.3 TB/s
H200 = cost.Rates(788e12, 4.3e12)

#: forward GFLOP, forward MB, floors in microseconds forward and backward, MiB of x and pre-activation
TABLE = {
    "Qwen3-30B-8k": (618.5, 2259, 865, 1657, 224),
    "Qwen3-30B-32k": (2473.9, 5411, 3461, 6627, 896),
    "Mixtral-8x7B-8k": (5772.4, 5168, 7388, 14729, 960),
    "Qwen3-235B-32k": (9895.6, 13196, 13192, 25807, 1792),
    "OLMoE-32k": (3298.5, 5528, 4504, 8718, 1152),
    "gpt-oss-20b-32k": (6523.0, 6701, 8544, 16864, 1620),
    "DeepSeek-V3-32k": (23089.7, 35848, 30447, 59892, 2496),
}
#: TFLOP/s at the floor, forward and backward
CAPS = {
    "1.4B-a": (592, 641), "1.4B-b": (661, 676), "1.4B-c": (700, 694), "7B-a": (601, 675), "7B-b": (665, 713),
    "7B-c": (702, 733), "30B-a": (617, 687), "30B-b": (684, 728), "30B-c": (722, 749), "120B-a": (692, 734),
    "120B-b": (733, 757), "120B-c": (754, 768),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_work_traffic_and_floors_of_published_shapes(name: str) -> None:
    shape, (gflop, megabytes, forward, backward, mebibytes) = shapes.BY_NAME[name], TABLE[name]
    assert round(shape.forward_flops / 1e9, 1) == gflop
    assert round(sum(stage.bytes for stage in cost.layer_forward(shape)) / 1e6) == megabytes
    assert round(cost.floor(cost.layer_forward(shape), H200) * 1e6) == forward
    assert round(cost.floor(cost.layer_backward(shape), H200) * 1e6) == backward
    assert cost.kept_bytes(shape) == mebibytes << 20


@pytest.mark.parametrize("name", CAPS)
def test_caps_of_the_twelve_configurations(name: str) -> None:
    shape = shapes.BY_NAME[name]
    forward = shape.forward_flops / cost.floor(cost.layer_forward(shape), H200)
    backward = shape.backward_flops / cost.floor(cost.layer_backward(shape), H200)
    assert (round(forward / 1e12), round(backward / 1e12)) == CAPS[name]


def test_every_stage_of_one_shape() -> None:
    """Compare microseconds of arithmetic and of traffic with a table for 7B-a. All operations sum to 18*T*K*F*D."""
    shape = shapes.BY_NAME["7B-a"]
    stages = [*cost.path_forward(shape)[1:], *cost.path_backward(shape)]
    found = {s.name: (round(s.flops / H200.flops * 1e6), round(s.bytes / H200.bytes * 1e6)) for s in stages}
    assert found == {
        "up": (392, 135), "down": (196, 187), "combine": (1, 158), "dh": (196, 158), "down_wgrad": (196, 64),
        "up_dgrad": (392, 234), "up_wgrad": (392, 111), "dx_sum": (0, 158),
    }  # fmt: skip
    products = sum(s.flops for s in stages if s.name not in ("combine", "dx_sum"))
    assert products == shape.forward_flops + shape.backward_flops
    assert [s.name for s in stages if s.memory_bound(H200)] == ["combine", "dx_sum"]


def test_a_sum_of_ops_is_the_path() -> None:
    shape = shapes.BY_NAME["30B-b"]
    ops = cost.ops(shape)
    for part, stages in (("forward", cost.path_forward(shape)[1:]), ("backward", cost.path_backward(shape))):
        assert cost.floor(ops[f"expert_mlp {part}"], H200) == cost.floor(stages, H200)
    assert ops["combine"][0].bytes >= 2 * (shape.rows + shape.T) * shape.D


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_a_run_keeps_is_what_the_formula_says(backend: str) -> None:
    """Beyond x and the pre-activation, a run keeps 64-bit indices, router weights, and rows that pad experts to 16."""
    if backend == "triton":
        pytest.importorskip("triton")
    shape = shapes.Shape("s", 160, 96, 64, 4, 2)
    gate_up, down = shapes.expert_weights(shape, torch.bfloat16, torch.device("cpu"))
    batch = shapes.make_batch(shape, "uniform", torch.bfloat16, torch.device("cpu"))
    order = sort_by_expert(batch.ids_TK, shape.E)

    def forward() -> torch.Tensor:
        return expert_mlp(batch.x_TD, batch.weights_TK, order, gate_up, down, backend=backend)

    kept = timing.kept_for_backward(forward, (gate_up, down))
    small = 8 * (2 * shape.rows + shape.E + 1) + 4 * shape.rows
    more = 0
    if backend == "torch":  # on a CPU: padding, and which rows the few rows are of
        places = shape.rows + 15 * shape.E
        more = 4 * shape.F * 15 * shape.E + (8 + 4) * places + 2 * 8 * shape.rows + 4 * shape.E
    assert 0 <= kept - cost.kept_bytes(shape) - small <= more


def test_what_is_kept_counts_memory_once_and_no_weights() -> None:
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    assert timing.kept_for_backward(lambda: (x @ weight) + (x @ weight), (weight,)) == 4 * 8 * 4
    assert timing.kept_for_backward(lambda: x @ weight, ()) == (4 + 8) * 8 * 4
