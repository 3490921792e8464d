"""The router's product against fp64: values, gradients, accuracy of fp32 from 16-bit products.

T tokens, D hidden, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from equimoe.kernels.router_logits import router_logits, triton_ops  # noqa: E402
from equimoe.kernels.self_check import error_of  # noqa: E402
from equimoe.moe import MoEConfig  # noqa: E402
from equimoe.moe.routing import build_router  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, Triton's interpreter runs the kernels
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: error of an fp32 sum, and of rounding it to another dtype, relative to the sum of absolute products
TOLERANCE = {FP32: 1e-6, BF16: 5e-3, FP16: 1e-3}
#: tokens, hidden, experts, dtypes of the hidden states and of the weight
CASES = {
    "bf16 by fp32, odd": (37, 45, 5, BF16, FP32),
    "fp32 by fp32, odd": (19, 67, 34, FP32, FP32),
    "bf16 by bf16": (33, 48, 16, BF16, BF16),
}
MORE = {
    "fp16 by fp32": (21, 33, 6, FP16, FP32),
    "fp32 by bf16": (21, 33, 6, FP32, BF16),
    "bf16 by fp64": (21, 33, 6, BF16, torch.float64),
    "one token": (1, 64, 3, BF16, FP32),
    "one expert": (20, 16, 1, FP32, FP32),
    "long sums": (3, 4096, 16, BF16, FP32),
    "long sums of fp32": (3, 4096, 16, FP32, FP32),
}
ALL = CASES | MORE


def inputs(case: str, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Make hidden states and weights whose magnitudes differ by row and column, and the logits' gradient."""
    tokens, hidden, experts, x_dtype, weight_dtype = ALL[case]

    def skewed(*shape: int) -> Tensor:
        sizes = torch.randn(shape[0], 1) + torch.randn(1, shape[1])
        return (torch.randn(shape) * (spread * sizes).exp()).to(DEVICE)

    x_TD = skewed(tokens, hidden)
    x_TD = x_TD.clamp(-6e4, 6e4) if x_dtype == FP16 else x_TD
    return x_TD.to(x_dtype), skewed(experts, hidden).to(weight_dtype), skewed(tokens, experts)


def results(x_TD: Tensor, weight_ED: Tensor, dlogits_TE: Tensor, backend: str) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x_TD, weight_ED)]
    y_TE = router_logits(*leaves, backend=backend)
    return y_TE.detach(), *torch.autograd.grad(y_TE, leaves, dlogits_TE.to(y_TE.dtype))


def check(case: str, spread: float, backend: str) -> None:
    x_TD, weight_ED, dlogits_TE = inputs(case, spread)
    found = results(x_TD, weight_ED, dlogits_TE, backend)
    assert [t.dtype for t in found] == [FP32, x_TD.dtype, weight_ED.dtype]
    x, w, d = (t.double() for t in (x_TD, weight_ED, dlogits_TE))
    for got, (left, right) in zip(found, ((x, w.T), (d, w), (d.T, x)), strict=True):
        want, scale = left @ right, left.abs() @ right.abs()
        assert got.shape == want.shape and got.isfinite().all()
        limit = TOLERANCE.get(got.dtype, TOLERANCE[FP32])
        assert ((got.double() - want).abs() <= limit * scale + 1e-37).all(), float(((got - want).abs() / scale).max())


@pytest.mark.parametrize("case", CASES)
def test_against_fp64(case: str) -> None:
    check(case, 2.0, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("spread", [0.0, 2.0, 6.0])
@pytest.mark.parametrize("case", ALL)
def test_against_fp64_widely(case: str, spread: float, backend: str) -> None:
    check(case, min(spread, 2.0) if FP16 in ALL[case] else spread, backend)


def test_what_cancels_keeps_its_bits() -> None:
    """All experts share a large direction; only their small differences choose between them."""
    common_D = torch.randn(64, device=DEVICE)
    x_TD = (common_D * 8).to(BF16).expand(20, 64) * torch.ones(20, 1, device=DEVICE, dtype=BF16)
    weight_ED = common_D + 1e-4 * torch.randn(8, 64, device=DEVICE)
    found = router_logits(x_TD, weight_ED, backend="triton").double()
    want = x_TD.double() @ weight_ED.double().T
    between, expected = (t - t.mean(1, keepdim=True) for t in (found, want))
    rounded = x_TD.double() @ weight_ED.to(BF16).double().T
    assert (between - expected).norm() < 0.02 * expected.norm()
    assert (rounded - rounded.mean(1, keepdim=True) - expected).norm() > expected.norm(), "bf16 weights would do"


def test_strides_and_partial_gradients() -> None:
    x_TD, weight_ED = torch.randn(21, 40, device=DEVICE)[:, ::2], torch.randn(20, 6, device=DEVICE).mT
    dlogits_TE = torch.randn(6, 1, device=DEVICE).mT.expand(21, 6)
    found = results(x_TD, weight_ED, dlogits_TE, "triton")
    contiguous = results(x_TD.contiguous(), weight_ED.contiguous(), dlogits_TE.contiguous(), "triton")
    assert all(torch.equal(a, b) for a, b in zip(found, contiguous, strict=True))
    for trained in (0, 1):
        leaves = [x_TD.detach(), weight_ED.detach()]
        leaves[trained].requires_grad_()
        router_logits(*leaves, backend="triton").backward(dlogits_TE)
        assert torch.equal(leaves[trained].grad, found[1 + trained]) and leaves[1 - trained].grad is None


def test_tokens_in_chunks_repeat_and_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "STEPS", 1)
    x_TD, weight_ED, dlogits_TE = (torch.randn(size, device=DEVICE) for size in ((150, 20), (5, 20), (150, 5)))
    first, again = (results(x_TD, weight_ED, dlogits_TE, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.testing.assert_close(first[2].double(), dlogits_TE.double().T @ x_TD.double(), rtol=1e-5, atol=1e-5)
    few, dfew, _ = results(x_TD[40:67], weight_ED, dlogits_TE[40:67], "triton")
    assert torch.equal(few, first[0][40:67]) and torch.equal(dfew, first[1][40:67])
    monkeypatch.setattr(triton_ops, "MOST_CHUNKS", 2)
    assert torch.allclose(results(x_TD, weight_ED, dlogits_TE, "triton")[2], first[2], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_stay_with_their_token_and_are_seen(value: float) -> None:
    x_TD, weight_ED = torch.randn(20, 18, device=DEVICE).to(BF16), torch.randn(5, 18, device=DEVICE)
    x_TD[7, 3] = value
    logits_TE = router_logits(x_TD, weight_ED, backend="triton")
    bad_T = ~logits_TE.isfinite().all(1)
    assert not logits_TE[7].isfinite().any() and bad_T.nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("size", [1e-30, 1e-36, 1e-40])
def test_tiny_numbers_are_as_exact_as_promised(size: float) -> None:
    x_TD, weight_ED = size * torch.randn(20, 18, device=DEVICE), 1e30 * torch.randn(5, 18, device=DEVICE)
    error = router_logits(x_TD, weight_ED, backend="triton").double() - x_TD.double() @ weight_ED.double().T
    of_sums, of_terms = (
        1e-6 * x_TD.double().abs() @ weight_ED.double().abs().T,
        1.2e-38 * weight_ED.double().abs().sum(1),
    )
    assert (error.abs() <= of_sums + (of_terms if size < 2e-31 else 0)).all()


@pytest.mark.parametrize("sizes", [(0, 8, 3), (4, 0, 3)])
def test_nothing_to_sum(sizes: tuple[int, int, int]) -> None:
    tokens, hidden, experts = sizes
    x_TD, weight_ED = torch.zeros(tokens, hidden, device=DEVICE), torch.zeros(experts, hidden, device=DEVICE)
    found = results(x_TD, weight_ED, torch.ones(tokens, experts, device=DEVICE), "triton")
    assert [t.shape for t in found] == [(tokens, experts), (tokens, hidden), (experts, hidden)]
    assert not any(t.any() for t in found)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_router_routes_alike_with_both_backends(dtype: torch.dtype) -> None:
    config = MoEConfig(hidden_size=24, intermediate_size=8, num_experts=6, top_k=2, backend="torch")
    x_TD = torch.randn(40, 24, device=DEVICE, dtype=dtype)
    routed = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        router = build_router(replace(config, backend=backend)).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            routing = router(x_TD)
        (dweight_ED,) = torch.autograd.grad(routing.weights_TK.square().sum(), router.weight)
        routed.append((routing.decision.ids_TK, routing.weights_TK.detach(), dweight_ED))
    (ids, weights, grad), (other_ids, other_weights, other_grad) = routed
    assert torch.equal(ids, other_ids) and other_weights.dtype == torch.float32
    torch.testing.assert_close(other_weights, weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other_grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_self_check_of_auto_sees_missing_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    error, largest = error_of("router_logits", "triton", BF16, device)
    assert error <= largest / 10
    plain = triton_ops._forward
    monkeypatch.setattr(triton_ops, "_forward", lambda x_TD, weight_ED: plain(x_TD, weight_ED.to(BF16).float()))
    error, largest = error_of("router_logits", "triton", BF16, device)
    assert error > largest


def test_mistakes() -> None:
    x_TD, weight_ED = torch.zeros(4, 8), torch.zeros(3, 8)
    for arguments, message in (
        ((x_TD[0], weight_ED), r"x_TD=torch.float32\[8\]: give two dimensions"),
        ((x_TD, weight_ED.long()), "weight_ED=torch.int64"),
        ((x_TD, weight_ED[:, :7]), r"weight_ED=\[3, 7\]: needs 8 columns"),
        ((x_TD.double(), weight_ED.double(), "triton"), "use backend='torch'"),
        ((x_TD, weight_ED.to("meta")), "weight_ED is on meta"),
        ((x_TD, weight_ED, "fast"), "backend='fast'.*'triton'"),
    ):
        with pytest.raises(ValueError, match=message):
            router_logits(*arguments)
