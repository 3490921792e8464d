"""Checks that the router's three functions in plain torch equal the fused op, and that new functions work."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from equimoe.kernels.topk_gate import FUSED_SCORES, topk_gate
from equimoe.moe import BalanceConfig, MoE, MoEConfig, RouterConfig, counting_pass
from equimoe.moe.config import Score
from equimoe.moe.routing import Router
from equimoe.moe.routing.router import _composed
from equimoe.moe.routing.score import SCORES
from equimoe.moe.routing.select import GROUP_WORTHS

T, E, K, D = 12, 8, 3, 6
#: a score that only these tests know
SQUARED = "squared"


def run(route: Any, logits_TE: Tensor, **given: Any) -> tuple[Any, Tensor]:
    logits_TE = logits_TE.clone().requires_grad_()
    gate = route(logits_TE, **given)
    generator = torch.Generator().manual_seed(1)
    values = [gate.weights_TK, gate.prob_sums_BE, gate.z_sum]
    loss = sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in values)
    return gate, torch.autograd.grad(loss, logits_TE)[0]


@pytest.mark.parametrize("low", [0.0, -300.0])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    "weights", [{}, {"normalize_weights": False}, {"softmax_after_topk": True}], ids=["normalized", "plain", "after"]
)
@pytest.mark.parametrize("score", FUSED_SCORES)
def test_composed_equals_the_fused_op(score: Any, weights: dict[str, bool], groups: int, low: float) -> None:
    """With bias, mask, sequences and given choices; also if scores underflow in narrow dtypes."""
    config = RouterConfig(score=score, groups=groups, kept_groups=max(groups // 2, 1), weight_scale=1.5, **weights)
    composed = _composed(K, config)
    torch.manual_seed(0)
    logits_TE = torch.randn(T, E, dtype=torch.float64) * 2 + low
    mask_T, bias_E = torch.rand(T) > 0.3, torch.randn(E, dtype=torch.float64) * 0.2
    ids_TK = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    for bias, mask, ids in product((None, bias_E), (None, mask_T), (None, ids_TK)):
        given: dict[str, Any] = {"bias_E": bias, "mask_T": mask, "sequences": 3, "ids_TK": ids}
        found, got = run(composed, logits_TE, **given)
        expected, want = run(
            topk_gate,
            logits_TE,
            k=K,
            score=score,
            groups=config.groups,
            kept_groups=config.kept_groups,
            normalize=config.normalize_weights,
            softmax_after_topk=config.softmax_after_topk,
            scale=1.5,
            backend="reference",
            **given,
        )
        for name in ("ids_TK", "counts_BE", "tokens_B"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        for name in ("weights_TK", "prob_sums_BE", "z_sum"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-11, atol=1e-300)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("worth", "expected"), [("two_best", [[3, 2], [1, 0]]), ("best", [[0, 1], [2, 3]])])
def test_groups_are_ranked_by_their_worth(worth: Any, expected: list[list[int]]) -> None:
    scores_TE = torch.tensor([[0.42, 0.03, 0.25, 0.30], [0.20, 0.35, 0.40, 0.05]])
    router = Router(D, 4, 2, RouterConfig(groups=2, group_worth=worth), 0.02)
    assert router.route(scores_TE.log(), bias_E=None, mask_T=None, sequences=1, ids_TK=None).ids_TK.tolist() == expected
    assert set(GROUP_WORTHS) == set(get_args(get_type_hints(RouterConfig)["group_worth"]))


#: score -> its formula, exact in fp64: one row for each score of the configuration
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.exp() / logits_TE.exp().sum(-1, keepdim=True),
    "sigmoid": lambda logits_TE: 1 / (1 + (-logits_TE).exp()),
    SQUARED: lambda logits_TE: 1 / (1 + (-logits_TE).exp()) ** 2,
}


@pytest.fixture(autouse=True)
def squared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a score that no kernel supports, the squared sigmoid. One entry in the dict must suffice."""
    monkeypatch.setitem(SCORES, SQUARED, lambda logits_TE: 2 * nn.functional.logsigmoid(logits_TE))


def test_every_score_of_the_configuration_exists_and_has_a_formula() -> None:
    assert set(SCORES) == set(FORMULAS) == {*get_args(Score), SQUARED}


@pytest.mark.parametrize("score", FORMULAS)
def test_a_score_is_its_formula(score: str) -> None:
    logits_TE = torch.tensor([[-40.0, -1.5, 0.0, 0.7, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(SCORES[score](logits_TE).exp(), FORMULAS[score](logits_TE), rtol=1e-12, atol=0)


@pytest.mark.parametrize("score", FORMULAS)
def test_a_tiny_score_does_not_underflow(score: str) -> None:
    """In fp32, these scores would be 0, and their quotient NaN."""
    logits_E = torch.tensor([-150.0, -151.0, 2.0], requires_grad=True)
    logs_E = SCORES[score](logits_E[None])[0]
    logs_E[:2].softmax(-1)[0].backward()
    exact_E = logits_E.detach().double().requires_grad_()
    scores_E = FORMULAS[score](exact_E[None])[0]
    (scores_E[0] / scores_E[:2].sum()).backward()
    torch.testing.assert_close(logs_E.detach(), scores_E.detach().log().float())
    torch.testing.assert_close(logits_E.grad, exact_E.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", FORMULAS)
def test_a_score_trains_and_balances(score: str) -> None:
    """Weights, probabilities and the balance loss use the score, whether or not the fused op supports it."""
    torch.manual_seed(0)
    router = RouterConfig()
    object.__setattr__(router, "score", score)  # the configuration allows only the names in Score
    config = MoEConfig(D, 8, E, K, router=router, balance=BalanceConfig(coefficient=0.1, estimator="exact"))
    layer = MoE(config).double()
    x_TD = torch.randn(T, D, dtype=torch.float64)
    with counting_pass():
        layer(x_TD)
    layer(x_TD).sum().mul(0).backward()  # only the balance loss remains
    weight = layer.router.weight.detach().clone().requires_grad_()
    scores_TE = FORMULAS[score](x_TD @ weight.T)
    ids_TK = scores_TE.topk(K).indices
    load_E = torch.zeros(E, dtype=torch.float64).scatter_add_(0, ids_TK.flatten(), torch.ones(T * K).double()) / (T * K)
    probabilities_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    (0.1 * E * (load_E * probabilities_TE.mean(0)).sum()).backward()
    torch.testing.assert_close(layer.router.weight.grad, weight.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.router.probabilities(x_TD), probabilities_TE.detach(), rtol=1e-10, atol=1e-12)
    routing = layer.router(x_TD)
    chosen_TK = scores_TE.detach().gather(1, ids_TK)
    torch.testing.assert_close(routing.weights_TK, chosen_TK / chosen_TK.sum(1, keepdim=True), check_dtype=False)


@pytest.mark.parametrize("score", FUSED_SCORES)
def test_probabilities_are_what_the_balance_loss_sums(score: Any) -> None:
    torch.manual_seed(0)
    router = Router(D, E, K, RouterConfig(score=score), 1.0)
    x_TD = torch.randn(T, D)
    torch.testing.assert_close(router.probabilities(x_TD).sum(0), router(x_TD).prob_sums_BE[0])
