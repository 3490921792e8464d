"""Forward and every gradient of the Triton backend against fp64; on the CPU under Triton's interpreter.

S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K routed rows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.sort_by_expert import ExpertOrder, sort_by_expert
from tests.helpers.slow import slow_but

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "weights", "gate_up", "down")
#: largest permitted error: relative by norm, and of the worst row relative to the rows' root mean square
TOLERANCE = {torch.float32: (5e-6, 5e-5), torch.bfloat16: (2e-2, 1e-1), torch.float16: (2e-3, 1e-2)}


def make(sources=23, choices=2, hidden=37, width=19, experts=3, ids="random") -> tuple[Tensor, list[Tensor], Tensor]:
    ids_SK = torch.randint(0, experts, (sources, choices))
    if ids == "some dropped":
        ids_SK[torch.rand(sources, choices) < 0.4] = -1
    elif ids == "one expert":
        ids_SK[:] = experts - 1
    elif ids == "all dropped":
        ids_SK[:] = -1
    inputs = [
        torch.randn(sources, hidden),
        torch.rand(sources, choices),
        torch.randn(experts, 2 * width, hidden) / hidden**0.5,
        torch.randn(experts, hidden, width) / width**0.5,
    ]
    return ids_SK.to(DEVICE), [t.to(DEVICE) for t in inputs], torch.randn(sources, hidden, device=DEVICE)


def run(inputs: list[Tensor], order: ExpertOrder, dy_SD: Tensor, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [t.detach().to(wide if i == 1 else dtype).requires_grad_() for i, t in enumerate(inputs)]
    y_SD = expert_mlp(leaves[0], leaves[1], order, leaves[2], leaves[3], backend=backend)
    grads = torch.autograd.grad(y_SD, leaves, dy_SD.to(dtype))
    return {"y": y_SD.detach(), **dict(zip(NAMES, grads, strict=True))}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    by_norm, by_row = TOLERANCE[dtype]
    for name, want in expected.items():
        got = found[name].double()
        assert found[name].dtype == (torch.float32 if name == "weights" else dtype), name
        assert got.shape == want.shape and got.isfinite().all(), name
        error_N, scale_N = ((t.reshape(-1, want.shape[-1]).norm(dim=1)) for t in (got - want, want))
        assert (error_N[scale_N == 0] == 0).all(), f"{name}: must be exactly zero"
        assert error_N.norm() <= by_norm * scale_N.norm(), name
        if (scale_N > 0).any():
            assert error_N.max() <= by_row * scale_N[scale_N > 0].square().mean().sqrt(), f"{name}: worst row"


SHAPES = [(23, 2, 37, 19, 3), (40, 3, 16, 33, 5), (1, 1, 8, 8, 1), (0, 2, 8, 8, 4), (9, 4, 32, 16, 16)]


@pytest.mark.parametrize(
    ("ids", "dtype"),
    slow_but(
        [("some dropped", torch.bfloat16), ("all dropped", torch.float32)],
        [
            *(("some dropped", dtype) for dtype in TOLERANCE),
            ("all dropped", torch.float32),
            ("random", torch.bfloat16),
            ("one expert", torch.float32),
        ],
    ),
)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape: tuple[int, ...], ids: str, dtype: torch.dtype) -> None:
    ids_SK, inputs, dy_SD = make(*shape, ids=ids)
    order = sort_by_expert(ids_SK, shape[4])
    rounded = [t if i == 1 else t.to(dtype) for i, t in enumerate(inputs)]
    expected = run(rounded, order, dy_SD.to(dtype), torch.float64, "reference")
    compare(run(rounded, order, dy_SD, dtype, "triton"), expected, dtype)


@pytest.mark.parametrize("wanted", [("x",), ("weights",), ("gate_up",), ("down",), ()])
def test_each_gradient_alone(wanted: tuple[str, ...]) -> None:
    ids_SK, inputs, dy_SD = make(ids="some dropped")
    order = sort_by_expert(ids_SK, 3)
    expected = run(inputs, order, dy_SD, torch.float64, "reference")
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in zip(NAMES, inputs, strict=True)}
    y_SD = expert_mlp(leaves["x"], leaves["weights"], order, leaves["gate_up"], leaves["down"], backend="triton")
    assert y_SD.requires_grad == bool(wanted)
    if wanted:
        y_SD.backward(dy_SD)
    assert {n for n, leaf in leaves.items() if leaf.grad is not None} == set(wanted)
    compare({n: leaves[n].grad for n in wanted}, {n: expected[n] for n in wanted}, torch.float32)
    compare({"y": y_SD.detach()}, {"y": expected["y"]}, torch.float32)


def test_it_keeps_the_pre_activation_and_no_other_rows() -> None:
    ids_SK, inputs, _ = make()
    order, saved = sort_by_expert(ids_SK, 3), []
    leaves = [t.requires_grad_() for t in inputs]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        expert_mlp(leaves[0], leaves[1], order, leaves[2], leaves[3], backend="triton")
    assert [list(t.shape) for t in saved if t.is_floating_point() and t.shape[0] == 46] == [[46, 38]]


@pytest.mark.parametrize(("gated", "recompute"), slow_but([(False, True)], [(True, False), (False, True)]))
def test_compiles_in_one_graph_and_repeats_bit_for_bit(gated: bool, recompute: bool) -> None:
    """Both passes: the gradients come from the backward of the same compiled graph."""
    ids_SK, inputs, dy_SD = make(12, 2, 18, 19, ids="some dropped")
    inputs[2] = inputs[2] if gated else inputs[2][:, :19].contiguous()
    order = sort_by_expert(ids_SK, 3)
    options = {"activation": "gelu", "gated": gated, "recompute": recompute}

    def step(*leaves: Tensor) -> Tensor:
        return expert_mlp(leaves[0], leaves[1], order, leaves[2], leaves[3], backend="triton", **options)

    leaves = [t.requires_grad_() for t in inputs]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    first, again, third = (torch.autograd.grad(f(*leaves), leaves, dy_SD) for f in (step, step, compiled))
    for a, b, c in zip(first, again, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [True, False])
def test_custom_ops(gated: bool) -> None:
    """Schemas, fake implementations and autograd agree with the ops, for fixed and symbolic sizes."""
    ids_SK, inputs, dy_SD = make(6, 2, 8, 7, ids="some dropped")
    inputs[2] = inputs[2] if gated else inputs[2][:, :7].contiguous()
    order = sort_by_expert(ids_SK, 3)
    expert_mlp(inputs[0], inputs[1], order, inputs[2], inputs[3], backend="triton", gated=gated)  # registers the ops
    for keep in (True, False):
        arguments = ([t.detach().requires_grad_() for t in inputs], order, ("silu", gated, keep, None, None))
        torch.library.opcheck(torch.ops.equimoe.expert_mlp.default, [t for part in arguments for t in part])
        pre_RU = torch.randn(12 if keep else 0, inputs[2].shape[1], device=DEVICE)
        for needs in ([True] * 4, [False, True, False, False]):
            rest = (dy_SD, pre_RU, *inputs, *order, "silu", gated, keep, needs, None, None)
            torch.library.opcheck(torch.ops.equimoe.expert_mlp_backward.default, rest)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_captured_graph_follows_other_routing(recompute: bool) -> None:
    """The host needs no sizes: a captured CUDA graph gives correct results for other routings."""
    sources, experts, dtype = 512, 8, torch.bfloat16
    ids_SK, inputs, dy_SD = make(sources, 2, 256, 128, experts)
    leaves = [t.to(torch.float32 if i == 1 else dtype).requires_grad_() for i, t in enumerate(inputs)]
    dy_SD = dy_SD.to(dtype)

    def step() -> list[Tensor]:
        order = sort_by_expert(ids_SK, experts, backend="triton")
        y_SD = expert_mlp(leaves[0], leaves[1], order, leaves[2], leaves[3], backend="triton", recompute=recompute)
        return [y_SD, *torch.autograd.grad(y_SD, leaves, dy_SD)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles everything before the capture
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for ids in ("random", "some dropped", "one expert", "all dropped"):
        other_SK, others, _ = make(sources, 2, 256, 128, experts, ids=ids)
        ids_SK.copy_(other_SK)
        with torch.no_grad():
            leaves[0].copy_(others[0])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True)), ids


def test_strided_inputs_and_gradients() -> None:
    ids_SK, inputs, _ = make()
    order = sort_by_expert(ids_SK, 3)
    found = []
    for leaves in (inputs, [t.mT.contiguous().mT for t in inputs]):
        leaves = [t.detach().requires_grad_() for t in leaves]
        expert_mlp(leaves[0], leaves[1], order, leaves[2], leaves[3], backend="triton").sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_nan_stays_within_its_expert() -> None:
    ids_SK, inputs, dy_SD = make(33, 1)
    ids_SK[:] = torch.arange(33, device=DEVICE)[:, None] % 3
    ids_SK[0], ids_SK[1] = -1, 2
    order = sort_by_expert(ids_SK, 3)
    clean = run(inputs, order, dy_SD, torch.float64, "reference")
    inputs[0][:2], dy_SD[:2] = float("nan"), float("nan")
    found = run(inputs, order, dy_SD, torch.float32, "triton")
    assert (found["y"][0] == 0).all() and (found["x"][0] == 0).all() and (found["weights"][0] == 0).all()
    for names, kept in ((("gate_up", "down"), slice(0, 2)), (("y", "x", "weights"), slice(2, None))):
        compare({n: found[n][kept] for n in names}, {n: clean[n][kept] for n in names}, torch.float32)


def test_fp64_is_refused() -> None:
    ids_SK, inputs, dy_SD = make(4)
    with pytest.raises(ValueError, match="use backend='torch'"):
        run(inputs, sort_by_expert(ids_SK, 3), dy_SD, torch.float64, "triton")


def test_what_is_kept_of_dropped_rows_is_zero() -> None:
    """The pre-activation is an output of a custom op, so all of it must be written."""
    ids_SK, inputs, _ = make(ids="some dropped")
    order = sort_by_expert(ids_SK, 3)
    expert_mlp(inputs[0], inputs[1], order, inputs[2], inputs[3], backend="triton")  # registers the op
    _, pre_RU = torch.ops.equimoe.expert_mlp(*inputs, *order, "silu", True, True, None, None)
    kept = int(order.offsets_E[-1])
    assert 0 < kept < len(pre_RU) and pre_RU[:kept].isfinite().all() and (pre_RU[kept:] == 0).all()
