"""The gate with extreme scores, biases and logits keeps its contract on every path.

T tokens, E experts, K top-k.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from equimoe.kernels.topk_gate import GateOutput, topk_gate  # noqa: E402
from tests.kernels.paths import PATHS, on, relative_error  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, Triton's interpreter runs the kernels
INF, NAN = math.inf, math.nan
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter uses numpy, which warns
SOFTMAX: dict[str, Any] = {"score": "softmax"}
SIGMOID: dict[str, Any] = {"score": "sigmoid"}
RAW: dict[str, Any] = SIGMOID | {"normalize": False}
AFTER: dict[str, Any] = SOFTMAX | {"softmax_after_topk": True}


def run(path: str, logits_TE: Tensor, k: int, **how: Any) -> tuple[GateOutput, Tensor]:
    """Return the gate's output, and the logits' gradient of a combination of all differentiable results."""
    leaf_TE = logits_TE.detach().to(DEVICE).requires_grad_()
    with on(path) as backend:
        gate = topk_gate(leaf_TE, k, backend=backend, **how)
        cos = [torch.arange(1, t.numel() + 1, device=DEVICE).cos().view(t.shape) for t in (gate[1], gate[4])]
        loss = (gate.weights_TK * cos[0]).sum() + (gate.prob_sums_BE * cos[1]).sum() + 1e-4 * gate.z_sum
        return gate, torch.autograd.grad(loss, leaf_TE)[0]


def choice(path: str, logits_TE: Tensor, k: int, **how: Any) -> GateOutput:
    with on(path) as backend, torch.no_grad():
        return topk_gate(logits_TE.to(DEVICE), k, backend=backend, **how)


def check(path: str, logits_TE: Tensor, k: int, **how: Any) -> GateOutput:
    """Compare weights, sums and gradient with the fp64 reference, for the same choice."""
    gate, dlogits_TE = run(path, logits_TE, k, **how)
    expected, dexpected_TE = run("reference", logits_TE.double(), k, **how | {"ids_TK": gate.ids_TK})
    for name in ("weights_TK", "prob_sums_BE", "z_sum"):
        assert relative_error(getattr(gate, name), getattr(expected, name)) < 2e-5, name
    assert relative_error(dlogits_TE, dexpected_TE) < 1e-4
    assert torch.equal(gate.counts_BE, expected.counts_BE)
    return gate


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("level", [-100.0, -1000.0])
def test_tiny_sigmoids_still_sum_to_one(path: str, level: float) -> None:
    k, logits_TE = 3, torch.randn(8, 8)
    logits_TE += torch.tensor([level, -110, -95, -88, -70, -45, -40, -20])[:, None]  # around the thresholds
    for how in ({}, {"normalize": False}, {"groups": 4, "kept_groups": 2}, {"softmax_after_topk": True}):
        gate = check(path, logits_TE, k, **SIGMOID | how)
        if how.get("normalize", True):
            assert torch.allclose(gate.weights_TK.sum(1), torch.ones(8, device=DEVICE))
            if "groups" not in how:
                assert torch.equal(gate.ids_TK.cpu(), logits_TE.topk(k).indices), (
                    "the highest logits, although all scores underflow"
                )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", [SOFTMAX, SIGMOID, SIGMOID | {"scale": 2.5}, AFTER])
def test_a_choice_of_tiny_scores_is_weighed(path: str, how: dict[str, Any]) -> None:
    """A bias or given ids may choose experts whose scores are negligible."""
    logits_TE = torch.randn(7, 6)
    logits_TE[:, 3:] -= torch.tensor([0.0, 30, 59, 61, 90, 200, 900])[:, None]
    ids_TK = torch.tensor([[4, 3], [5, 4], [3, 5], [4, 5], [3, 4], [5, 3], [5, 5]], device=DEVICE)
    bias_E = torch.tensor([0.0, 0, 0, 5, 5, 5], device=DEVICE)
    for choice in ({"ids_TK": ids_TK}, {"bias_E": bias_E}):
        gate = check(path, logits_TE, 2, **how | choice)
        assert torch.allclose(gate.weights_TK.sum(1), torch.full((7,), how.get("scale", 1.0), device=DEVICE))
        assert bool((gate.ids_TK >= 3).all())


@pytest.mark.parametrize("path", PATHS)
def test_fp64_is_exact_too(path: str) -> None:
    if path == "triton":
        pytest.skip("computes in fp32")
    logits_TE = torch.tensor([[-39.0, -38, -41], [-800, -801, -803], [-41, -40.5, -900]], dtype=torch.float64)
    gate, dlogits_TE = run(path, logits_TE, 2, **SIGMOID)
    chosen_TK = logits_TE.to(DEVICE).gather(1, gate.ids_TK)
    assert relative_error(gate.weights_TK, chosen_TK.softmax(1)) < 1e-15 * 20
    assert relative_error(dlogits_TE, run("reference", logits_TE, 2, **SIGMOID)[1]) < 1e-13


BIASES = {
    "all -inf": [-INF] * 6,
    "all but one -inf": [-INF, -INF, -INF, 0.0, -INF, -INF],
    "all +inf": [INF] * 6,
    "both": [INF, -INF, 0.0, -INF, INF, -INF],
    "NaN": [0.0, NAN, -INF, NAN, INF, -1.0],
    "all NaN": [NAN] * 6,
    "the lowest number": [torch.finfo(torch.float32).min, -INF, -INF, 1.0, torch.finfo(torch.float32).min, -INF],
    "the highest number": [torch.finfo(torch.float32).max] * 6,
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    "how", [SOFTMAX, SIGMOID, SIGMOID | {"groups": 3, "kept_groups": 2}, SOFTMAX | {"groups": 2, "kept_groups": 1}]
)
def test_any_bias_chooses_different_experts(how: dict[str, Any], bias: str) -> None:
    logits_TE = torch.randn(5, 6)
    logits_TE[1] = 0.0  # ties
    logits_TE[2, 4], logits_TE[3] = NAN, -INF
    bias_E, mask_T = torch.tensor(BIASES[bias], device=DEVICE), torch.tensor([True, True, True, False, True]).to(DEVICE)
    gates = [choice(path, logits_TE, 3, bias_E=bias_E, mask_T=mask_T, **how) for path in PATHS]
    size = 6 // how.get("groups", 1)
    for ids in gates[0].ids_TK.tolist():
        assert len(set(ids)) == 3 and set(ids) <= set(range(6))
        assert len({e // size for e in ids}) <= how.get("kept_groups", 1)
    for path, gate in zip(PATHS, gates, strict=True):
        assert torch.equal(gate.ids_TK, gates[0].ids_TK), path
        assert torch.equal(gate.counts_BE, gates[0].counts_BE) and gate.counts_BE.sum() == 4 * 3, path


@pytest.mark.parametrize("path", PATHS)
def test_excluded_experts_come_last(path: str) -> None:
    bias_E = torch.tensor([-INF, 0.0, -INF, -INF, 0.0, -INF], device=DEVICE)
    gate = check(path, torch.randn(9, 6), 3, bias_E=bias_E, **SIGMOID)
    assert all(set(ids[:2]) == {1, 4} and ids[2] == 0 for ids in gate.ids_TK.tolist())


@pytest.mark.parametrize("path", PATHS)
def test_a_groups_worth_is_summed_in_the_scores_dtype(path: str) -> None:
    """In fp64 the second group would be better; in fp32 both have value 1, and the first is kept."""
    bias_E = torch.tensor([0.0, 1.0, 1e-9, 1.0], device=DEVICE)
    logits_TE = torch.full((1, 4), -200.0)  # scores of 0
    gate = choice(path, logits_TE, 1, bias_E=bias_E, groups=2, kept_groups=1, **SIGMOID)
    assert gate.ids_TK.tolist() == [[1]]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", [SOFTMAX, SIGMOID, RAW, AFTER])
def test_nan_logits(path: str, how: dict[str, Any]) -> None:
    """NaN is chosen first, and affects only its own token."""
    logits_TE = torch.randn(8, 6)
    bad_TE = logits_TE.clone()
    bad_TE[2, 3], bad_TE[5], bad_TE[6, 1] = NAN, NAN, NAN
    good = torch.tensor([0, 1, 3, 4, 7], device=DEVICE)
    mask_T = torch.ones(8, dtype=torch.bool, device=DEVICE)
    mask_T[6] = False
    found, dfound_TE = run(path, bad_TE, 2, mask_T=mask_T, **how)
    clean, dclean_TE = run(path, logits_TE, 2, mask_T=mask_T, **how)
    assert torch.equal(found.ids_TK[good], clean.ids_TK[good])
    assert torch.equal(found.weights_TK[good], clean.weights_TK[good])
    # the incoming gradients are the same, so the unaffected tokens' gradients agree bit for bit
    assert torch.equal(dfound_TE[good], dclean_TE[good]) and bool(dfound_TE[[2, 5, 6]].isnan().any(1).all())
    assert bool(found.prob_sums_BE.isnan().any()) and bool(found.z_sum.isnan())
    expected = run("reference", bad_TE, 2, mask_T=mask_T, **how)[0]
    assert torch.equal(found.ids_TK, expected.ids_TK) and torch.equal(found.counts_BE, expected.counts_BE)
    assert torch.equal(found.weights_TK.isnan(), expected.weights_TK.isnan())
    first = 3 if how["score"] == "sigmoid" else 0  # a softmax that contains NaN is all NaN
    assert found.ids_TK[2, 0] == first and bool(found.weights_TK[5].isnan().all())
    mask_T[[2, 5]] = False
    masked, sums = (choice(path, logits, 2, mask_T=mask_T, **how) for logits in (bad_TE, logits_TE))
    assert torch.equal(masked.prob_sums_BE, sums.prob_sums_BE) and torch.equal(masked.z_sum, sums.z_sum)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", [SOFTMAX, SIGMOID, AFTER])
def test_infinite_logits(path: str, how: dict[str, Any]) -> None:
    """An expert with logit -inf has weight 0. Undefined weights are NaN on every path, and z_sum is not finite."""
    logits_TE = torch.randn(5, 6)
    logits_TE[1, 2:], logits_TE[2], logits_TE[3, 1] = -INF, -INF, INF
    expected = run("reference", logits_TE, 3, **how)[0]
    found, dfound_TE = run(path, logits_TE, 3, **how)
    assert torch.equal(found.ids_TK, expected.ids_TK)
    assert torch.allclose(found.weights_TK, expected.weights_TK, atol=1e-6, equal_nan=True)
    assert found.weights_TK[1, 2] == 0 and bool(found.weights_TK[2].isnan().all())
    assert not found.z_sum.isfinite() and not expected.z_sum.isfinite()
    assert bool(dfound_TE[[2, 3]].isnan().all())
    assert bool(dfound_TE[[0, 1, 4]].isfinite().all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits_TE": torch.zeros(2, 4, 6)}, r"logits_TE=torch.float32\[2, 4, 6\]"),
        ({"logits_TE": torch.zeros(8, 6, dtype=torch.complex64)}, "logits_TE=torch.complex64"),
        ({"logits_TE": torch.zeros(8, 6).to(torch.float8_e4m3fn)}, "fp32, bf16, fp16 or fp64"),
        ({"bias_E": torch.zeros(6, dtype=torch.int64)}, "bias_E=torch.int64"),
        ({"bias_E": torch.zeros(1, 6)}, r"bias_E=torch.float32\[1, 6\]"),
        ({"bias_E": torch.zeros(6, device="meta")}, "bias_E is on meta: move it to cpu"),
        ({"mask_T": torch.ones(8, 1, dtype=torch.bool)}, r"mask_T=torch.bool\[8, 1\]"),
        ({"mask_T": torch.ones(8, dtype=torch.bool, device="meta")}, "mask_T is on meta"),
        ({"ids_TK": torch.zeros(8, 2, dtype=torch.int32)}, r"ids_TK=torch.int32\[8, 2\]"),
        ({"ids_TK": torch.zeros(16, dtype=torch.int64)}, r"ids_TK=torch.int64\[16\]"),
        ({"ids_TK": torch.zeros(8, 2, dtype=torch.int64, device="meta")}, "ids_TK is on meta"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"logits_TE": torch.zeros(8, 6)} | changes
    with pytest.raises(ValueError, match=message) as raised:
        topk_gate(values.pop("logits_TE"), 2, **values)
    assert "\n" not in str(raised.value)
