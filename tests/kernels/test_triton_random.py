"""Random shapes for every Triton op: values and every gradient against fp64, under the interpreter.

T tokens, E experts, K choices, S source rows, D hidden, F expert width, R routed rows.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from equimoe.kernels.expert_mlp import expert_mlp  # noqa: E402
from equimoe.kernels.grouped_gemm import grouped_gemm  # noqa: E402
from equimoe.kernels.permute import combine, permute  # noqa: E402
from equimoe.kernels.sort_by_expert import sort_by_expert  # noqa: E402
from equimoe.kernels.topk_gate import topk_gate  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, Triton's interpreter runs the kernels

TOLERANCE = 2e-5
some = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # shrinking a failure under the interpreter would take minutes
)
seeds, drops = st.integers(0, 1 << 30), st.sampled_from([0.0, 0.4, 1.0])


def both(op, inputs: list[Tensor], grads: list[Tensor] | None = None) -> None:
    """Compare outputs and gradients of ``op(backend, *inputs)``, Triton in fp32 with the reference in fp64."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        outputs = op(backend, *leaves)
        generator = torch.Generator(DEVICE).manual_seed(0)
        mix = [torch.randn(y.shape, generator=generator, device=DEVICE).to(y.dtype) for y in outputs]
        found = torch.autograd.grad(outputs, leaves, mix, allow_unused=True)
        results.append([*(y.detach() for y in outputs), *(g for g in found if g is not None)])
    assert len(results[0]) == len(results[1])
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and got.isfinite().all()
        error, size = got.double() - want, want.norm()
        assert error.norm() <= TOLERANCE * size + 1e-12
        error_N = error.reshape(-1, want.shape[-1]).norm(dim=1)
        assert (error_N <= 10 * TOLERANCE * max(size / max(len(error_N), 1) ** 0.5, 1e-6)).all()


def choices(seed: int, sources: int, k: int, experts: int, drop: float) -> Tensor:
    torch.manual_seed(seed)
    ids_SK = torch.randint(0, experts, (sources, k), device=DEVICE)
    return ids_SK.masked_fill(torch.rand(sources, k, device=DEVICE) < drop, -1)


@some
@given(seeds, st.integers(1, 9), st.integers(1, 70), st.data(), st.sampled_from(["softmax", "sigmoid"]), st.booleans())
def test_topk_gate(seed: int, tokens: int, experts: int, data: st.DataObject, score: str, normalize: bool) -> None:
    k = data.draw(st.integers(1, min(experts, 9)))
    torch.manual_seed(seed)
    logits_TE = torch.randn(tokens, experts, device=DEVICE)
    mask_T = torch.rand(tokens, device=DEVICE) < 0.8

    def op(backend: str, logits: Tensor) -> list[Tensor]:
        gate = topk_gate(logits, k, score=score, normalize=normalize, mask_T=mask_T, backend=backend)
        return [gate.weights_TK, gate.prob_sums_BE, gate.z_sum.reshape(1)]

    both(op, [logits_TE])


@some
@given(seeds, st.integers(1, 12), st.integers(1, 4), st.integers(1, 6), st.integers(1, 40), drops)
def test_permute_and_combine(seed: int, sources: int, k: int, experts: int, hidden: int, drop: float) -> None:
    order = sort_by_expert(choices(seed, sources, k, experts, drop), experts, backend="torch")
    both(lambda backend, x: [permute(x, order, backend=backend)], [torch.randn(sources, hidden, device=DEVICE)])
    both(
        lambda backend, rows: [combine(rows, order, backend=backend)], [torch.randn(sources * k, hidden, device=DEVICE)]
    )


@pytest.mark.slow
@some
@given(seeds, st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 40))
def test_grouped_gemm(seed: int, counts: list[int], wide_in: int, wide_out: int) -> None:
    torch.manual_seed(seed)
    offsets_E = torch.tensor([0, *counts], device=DEVICE).cumsum(0)
    rows = torch.randn(sum(counts) + 2, wide_in, device=DEVICE)
    weight = torch.randn(len(counts), wide_out, wide_in, device=DEVICE) / wide_in**0.5
    both(lambda backend, x, w: [grouped_gemm(x, w, offsets_E, backend=backend)], [rows, weight])


@pytest.mark.slow
@some
@given(
    seeds, st.integers(1, 10), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 24), drops,
    st.sampled_from(["silu", "gelu", "gelu_tanh", "relu2"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_expert_mlp(
    seed: int, sources: int, k: int, experts: int, hidden: int, width: int, drop: float, activation: str, gated: bool,
    recompute: bool,
) -> None:  # fmt: skip
    order = sort_by_expert(choices(seed, sources, k, experts, drop), experts, backend="torch")
    x_SD, weights_SK = torch.randn(sources, hidden, device=DEVICE), torch.rand(sources, k, device=DEVICE)
    up_EUD = torch.randn(experts, width * (1 + gated), hidden, device=DEVICE) / hidden**0.5
    down_EDF = torch.randn(experts, hidden, width, device=DEVICE) / width**0.5
    kind = {"activation": activation, "gated": gated, "recompute": recompute}
    both(
        lambda backend, x, w, up, down: [expert_mlp(x, w, order, up, down, backend, **kind)],
        [x_SD, weights_SK, up_EUD, down_EDF],
    )
