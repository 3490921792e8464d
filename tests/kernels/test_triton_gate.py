"""T tokens, E experts, K top-k, B sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from equimoe.kernels.topk_gate import GateOutput, topk_gate  # noqa: E402
from tests.helpers.slow import slow_but  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, Triton's interpreter runs the kernels
#: largest permitted relative error of a row in fp32; by norm a fifth of it, since rows may nearly cancel
TOLERANCE = 1e-5
SOFTMAX: dict[str, Any] = {}
MIXTRAL: dict[str, Any] = {"softmax_after_topk": True}
SIGMOID: dict[str, Any] = {"score": "sigmoid", "scale": 2.5}
RAW: dict[str, Any] = {"normalize": False}

# tokens, experts, k, sequences, has a bias, share of masked tokens, options
CASES = {
    "softmax": (37, 12, 3, 1, False, 0.0, SOFTMAX),
    "softmax, masked sequences": (210, 7, 2, 3, False, 0.3, SOFTMAX),
    "raw": (33, 65, 5, 1, True, 0.2, RAW),
    "after top-k": (40, 8, 2, 4, False, 0.3, MIXTRAL),
    "after top-1": (9, 5, 1, 1, False, 0.0, MIXTRAL),
    "top-1": (9, 5, 1, 1, False, 0.0, SOFTMAX),
    "sigmoid": (34, 20, 4, 2, True, 0.2, SIGMOID),
    "sigmoid, raw": (34, 20, 4, 1, False, 0.0, SIGMOID | RAW),
    "sigmoid after top-k": (34, 20, 4, 1, True, 0.2, SIGMOID | MIXTRAL),
    "groups": (35, 24, 4, 1, True, 0.2, SIGMOID | {"groups": 4, "kept_groups": 2}),
    "odd groups": (35, 27, 6, 5, True, 0.2, SIGMOID | {"groups": 9, "kept_groups": 4}),
    "groups of one": (20, 6, 2, 1, False, 0.0, {"groups": 6, "kept_groups": 3}),
    "groups of two": (20, 6, 3, 1, False, 0.0, RAW | {"groups": 3, "kept_groups": 2}),
    "all groups": (20, 6, 5, 1, True, 0.0, {"groups": 3, "kept_groups": 3}),
    "every expert": (10, 5, 5, 1, False, 0.0, SOFTMAX),
    "one expert": (70, 1, 1, 2, False, 0.2, SOFTMAX),
    "many choices": (3, 150, 64, 1, False, 0.0, SOFTMAX),
    "many experts": (3, 1025, 4, 1, True, 0.3, SIGMOID),
    "all masked": (12, 6, 2, 2, False, 1.0, SOFTMAX),
    "one token": (1, 10, 3, 1, True, 0.0, SIGMOID),
    "both limits": (1, 4096, 64, 1, False, 0.0, SOFTMAX),
    "odd at the limits": (1, 4095, 63, 1, True, 0.0, SIGMOID | {"groups": 45, "kept_groups": 7}),
}


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Compare by relative error, as a whole and of the worst row. Rows that should be zero must be zero."""
    assert found.shape == expected.shape and bool(found.isfinite().all())
    found, expected = torch.atleast_2d(found.double(), expected.double())
    error, scale = (found - expected).norm(dim=1), expected.norm(dim=1)
    # a row smaller than a hundredth of the mean is the difference of larger terms
    floor = 0.01 * scale.mean()
    assert found.numel() == 0 or error.norm() <= tolerance / 5 * scale.norm(), float(error.norm() / scale.norm())
    assert (error <= tolerance * scale.maximum(floor)).all(), float((error / scale.maximum(floor)).max())


def inputs(
    tokens: int, experts: int, bias: bool, masked: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor | None]]:
    logits_TE = torch.randn(tokens, experts, device=DEVICE).to(dtype)
    bias_E = torch.randn(experts, device=DEVICE) * 0.3 if bias else None
    mask_T = torch.rand(tokens, device=DEVICE) >= masked if masked else None
    return logits_TE, {"bias_E": bias_E, "mask_T": mask_T}


def with_gradient(logits_TE: Tensor, k: int, dout: list[Tensor], **kwargs: Any) -> tuple[GateOutput, Tensor]:
    logits_TE = logits_TE.detach().requires_grad_()
    gate = topk_gate(logits_TE, k, **kwargs)
    outputs = (gate.weights_TK, gate.prob_sums_BE, gate.z_sum)
    grads = [d.to(o.dtype) for d, o in zip(dout, outputs, strict=True)]
    return gate, torch.autograd.grad(outputs, logits_TE, grads)[0]


def random_gradients(tokens: int, experts: int, k: int, sequences: int) -> list[Tensor]:
    shapes = ((tokens, k), (sequences, experts), ())
    return [torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in shapes]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", slow_but([case for case in CASES if "limits" not in case], CASES))
def test_values_and_gradients(case: str, backend: str) -> None:
    tokens, experts, k, sequences, bias, masked, options = CASES[case]
    logits_TE, tensors = inputs(tokens, experts, bias, masked)
    dout = random_gradients(tokens, experts, k, sequences)
    options = options | tensors | {"sequences": sequences}
    found, dfound_TE = with_gradient(logits_TE, k, dout, backend=backend, **options)
    expected, dexpected_TE = with_gradient(logits_TE.double(), k, dout, backend="reference", **options)
    for name in ("ids_TK", "counts_BE", "tokens_B"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == torch.int64 and torch.equal(a, b), name
    for name in ("weights_TK", "prob_sums_BE", "z_sum"):
        assert getattr(found, name).dtype == torch.float32
        close(getattr(found, name), getattr(expected, name))
    assert dfound_TE.dtype == torch.float32
    close(dfound_TE, dexpected_TE)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    "options", [SOFTMAX, RAW, MIXTRAL, SIGMOID | {"groups": 3, "kept_groups": 2}, SIGMOID | MIXTRAL]
)
def test_a_given_choice_is_weighed_and_counted(options: dict[str, Any], backend: str) -> None:
    """The given choice may be any: not the best, in any order, even one expert twice."""
    logits_TE, tensors = inputs(40, 12, True, 0.3)
    ids_TK = torch.randint(0, 12, (3, 40), device=DEVICE).t()
    dout = random_gradients(40, 12, 3, 2)
    options = options | tensors | {"sequences": 2, "ids_TK": ids_TK}
    found, dfound_TE = with_gradient(logits_TE, 3, dout, backend=backend, **options)
    expected, dexpected_TE = with_gradient(logits_TE.double(), 3, dout, backend="reference", **options)
    assert torch.equal(found.ids_TK, ids_TK) and torch.equal(found.counts_BE, expected.counts_BE)
    assert (ids_TK.sort(1).values.diff(dim=1) == 0).any(), "no expert twice"
    for name in ("weights_TK", "prob_sums_BE", "z_sum"):
        close(getattr(found, name), getattr(expected, name))
    close(dfound_TE, dexpected_TE)
    chosen = topk_gate(logits_TE, 3, backend=backend, **options | {"ids_TK": None})
    repeated = topk_gate(logits_TE, 3, backend=backend, **options | {"ids_TK": chosen.ids_TK})
    assert all(torch.equal(a, b) for a, b in zip(chosen, repeated, strict=True))


def test_gradients_that_are_expanded_or_strided() -> None:
    wide_TE = torch.randn(40, 22, device=DEVICE)
    for weight_TK in (torch.ones((), device=DEVICE).expand(40, 3), torch.randn(3, 40, device=DEVICE).t()):
        grads = []
        for logits_TE in (wide_TE[:, ::2], wide_TE[:, ::2].contiguous()):
            logits_TE = logits_TE.detach().requires_grad_()
            gate = topk_gate(logits_TE, 3, sequences=2, normalize=False, backend="triton")
            outputs = (gate.weights_TK, gate.prob_sums_BE, gate.z_sum)
            if logits_TE.is_contiguous():
                weight_TK = weight_TK.contiguous()
            dprob_BE = torch.full((1, 1), 2.0, device=DEVICE).expand(2, 11)
            dout = (weight_TK, dprob_BE, torch.ones((), device=DEVICE))
            grads.append(torch.autograd.grad(outputs, logits_TE, dout)[0])
        assert torch.equal(*grads) and bool(grads[0].any())


@pytest.mark.parametrize("output", ["weights_TK", "prob_sums_BE", "z_sum"])
@pytest.mark.parametrize("options", [SOFTMAX, RAW, MIXTRAL, SIGMOID, SIGMOID | RAW, SIGMOID | MIXTRAL])
def test_each_gradient_alone(options: dict[str, Any], output: str) -> None:
    logits_TE, tensors = inputs(18, 10, True, 0.3)
    grads = []
    for logits, backend in ((logits_TE, "triton"), (logits_TE.double(), "reference")):
        gate = topk_gate(logits.requires_grad_(), 3, backend=backend, sequences=2, **tensors, **options)
        value = getattr(gate, output)
        weight = torch.linspace(1, 99, value.numel(), device=DEVICE, dtype=torch.float64).cos().view(value.shape)
        grads.append(torch.autograd.grad((value * weight.to(value.dtype)).sum(), logits)[0])
    close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [SOFTMAX, SIGMOID])
def test_half_precision_logits(dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits_TE, tensors = inputs(40, 11, False, 0.2, dtype)
    dout = random_gradients(40, 11, 3, 1)
    found, dfound_TE = with_gradient(logits_TE, 3, dout, backend="triton", **options, **tensors)
    expected, dexpected_TE = with_gradient(logits_TE.double(), 3, dout, backend="reference", **options, **tensors)
    assert torch.equal(found.ids_TK, expected.ids_TK) and found.weights_TK.dtype == torch.float32
    close(found.weights_TK, expected.weights_TK)
    close(found.prob_sums_BE, expected.prob_sums_BE)
    assert dfound_TE.dtype == dtype
    close(dfound_TE, dexpected_TE, 5 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("options", "k"), [(SOFTMAX, 6), (SOFTMAX, 19), (SIGMOID | {"groups": 5, "kept_groups": 2}, 6)]
)
def test_ties_go_to_the_lower_index(options: dict[str, Any], k: int, backend: str) -> None:
    logits_TE = torch.randint(-1, 2, (60, 20), device=DEVICE).float()
    bias_E = -torch.full((20,), 0.5, device=DEVICE)  # negative and zero scores too
    for tensors in ({}, {"bias_E": bias_E}):
        found = topk_gate(logits_TE, k, backend=backend, **options, **tensors)
        expected = topk_gate(logits_TE, k, backend="reference", **options, **tensors)
        assert torch.equal(found.ids_TK, expected.ids_TK) and torch.equal(found.counts_BE, expected.counts_BE)
    flat = topk_gate(torch.zeros(3, 9, device=DEVICE), 4, backend=backend)
    assert torch.equal(flat.ids_TK, torch.arange(4, device=DEVICE).expand(3, 4))


def test_minus_zero_ties_with_zero() -> None:
    bias_E = torch.tensor([-0.0, 0.0, -0.0], device=DEVICE)
    logits_TE = torch.full((1, 3), -200.0, device=DEVICE)  # sigmoid 0
    gate = topk_gate(logits_TE, 3, score="sigmoid", bias_E=bias_E, backend="triton")
    assert gate.ids_TK.tolist() == [[0, 1, 2]]
    assert bool(gate.weights_TK.isfinite().all()) and bool(gate.prob_sums_BE.isfinite().all())


def test_bias_never_weighs_and_decides_by_sign() -> None:
    logits_TE = torch.randn(8, 6, device=DEVICE)
    bias_E = torch.tensor([-9.0, -8.0, 9.0, -7.0, 8.0, -6.0], device=DEVICE)
    gate = topk_gate(logits_TE, 2, bias_E=bias_E, normalize=False, backend="triton")
    assert gate.ids_TK.tolist() == [[2, 4]] * 8
    close(gate.weights_TK, logits_TE.double().softmax(1)[:, [2, 4]])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_logits_still_choose_different_experts(value: float, backend: str) -> None:
    logits_TE = torch.randn(4, 6, device=DEVICE)
    logits_TE[1] = value
    logits_TE[2, 3] = value
    for options in (SOFTMAX, SIGMOID | {"groups": 3, "kept_groups": 2}):
        ids_TK = topk_gate(logits_TE, 4, backend=backend, **options).ids_TK
        assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 6 for row in ids_TK.tolist())
        good = topk_gate(logits_TE[::3], 4, backend=backend, **options).ids_TK
        assert torch.equal(ids_TK[::3], good)


def test_large_and_tiny_logits() -> None:
    logits_TE = torch.randn(6, 8, device=DEVICE) * 100
    for options in (SOFTMAX, RAW, MIXTRAL):
        dout = random_gradients(6, 8, 2, 1)
        found, dfound_TE = with_gradient(logits_TE, 2, dout, backend="triton", **options)
        expected, dexpected_TE = with_gradient(logits_TE.double(), 2, dout, backend="torch", **options)
        close(found.weights_TK, expected.weights_TK, 5e-5)
        close(found.z_sum, expected.z_sum, 5e-5)
        close(dfound_TE, dexpected_TE, 5e-5)


@pytest.mark.usefixtures("poison")
def test_no_tokens_and_strides() -> None:
    gate = topk_gate(torch.zeros(0, 5, device=DEVICE, requires_grad=True), 2, sequences=3, backend="triton")
    assert gate.ids_TK.shape == (0, 2) and gate.tokens_B.tolist() == [0, 0, 0]
    assert not gate.counts_BE.any() and not gate.prob_sums_BE.any() and float(gate.z_sum.detach()) == 0
    (gate.weights_TK.sum() + gate.z_sum).backward()
    wide = torch.randn(9, 30, device=DEVICE)
    mask_T = torch.tensor([True, False] * 30, device=DEVICE)[::2]
    strided = topk_gate(wide.t(), 2, mask_T=mask_T, backend="triton")
    plain = topk_gate(wide.t().contiguous(), 2, mask_T=mask_T.contiguous(), backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


def test_repeats_bit_for_bit() -> None:
    logits_TE, tensors = inputs(300, 9, True, 0.1)
    dout = random_gradients(300, 9, 2, 2)
    runs = [with_gradient(logits_TE, 2, dout, sequences=2, backend="triton", **tensors) for _ in range(2)]
    (first, dfirst_TE), (second, dsecond_TE) = runs
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and torch.equal(dfirst_TE, dsecond_TE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, r"k=0: must lie in 1\.\.6"),
        ({"k": 7}, "k=7"),
        ({"score": "tanh"}, "score='tanh'"),
        ({"groups": 4}, "groups=4: must divide the 6"),
        ({"groups": 3, "kept_groups": 4}, "kept_groups=4"),
        ({"groups": 6, "kept_groups": 1}, "hold 1 experts"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"bias_E": torch.zeros(5)}, r"bias_E=torch.float32\[5\]"),
        ({"mask_T": torch.zeros(8)}, "mask_T=torch.float32"),
        ({"mask_T": torch.zeros(7, dtype=torch.bool)}, r"bool \[8\]"),
        ({"sequences": 3}, "sequences=3"),
        ({"ids_TK": torch.zeros(8, 3, dtype=torch.int64)}, r"ids_TK=torch.int64\[8, 3\]: must be int64 \[8, 2\]"),
        ({"ids_TK": torch.zeros(8, 2)}, "ids_TK=torch.float32"),
        ({"ids_TK": torch.full((8, 2), 6)}, r"ids_TK in \[6, 6\]: use 0..5"),
        ({"ids_TK": torch.full((8, 2), -1)}, r"ids_TK in \[-1, -1\]"),
        ({"backend": "fast"}, "backend='fast'.*'triton'"),
        ({"logits_TE": torch.zeros(6)}, "logits_TE"),
        ({"logits_TE": torch.zeros(8, 6, dtype=torch.int64)}, "logits_TE=torch.int64"),
        ({"logits_TE": torch.zeros(8, 6, dtype=torch.float64), "backend": "triton"}, "computes in fp32"),
        ({"logits_TE": torch.zeros(8, 4097), "backend": "triton"}, "4097 experts"),
        ({"logits_TE": torch.zeros(8, 99), "k": 65, "backend": "triton"}, "k=65"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"logits_TE": torch.zeros(8, 6), "k": 2} | changes
    with pytest.raises(ValueError, match=message):
        topk_gate(values.pop("logits_TE"), values.pop("k"), **values)
