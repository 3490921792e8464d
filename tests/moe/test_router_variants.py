"""Compares every router beyond the plain best K with its definition.  T tokens, D hidden, E experts, K top-k."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.moe import BalanceConfig, MoE, Step, recompute
from equimoe.moe.routing import Router
from tests.helpers import oracle
from tests.helpers.router_rows import DEVICE, ROWS, D, E, Row, codes_of, config_of, layer_of, router_of

T = 21
#: a tensor, a mask and codes
Args = tuple[Tensor, Tensor | None, Tensor | None]
OUTPUTS = ("weights_TK", "prob_sums_BE", "z_sum", "entropy_sum")
CASES = [pytest.param(name, k, id=f"{name}, k={k}") for name, row in ROWS.items() for k in row.ks]
#: with Triton, which is slow on a CPU, one number of experts each
ON_BACKENDS = [pytest.param(name, k, "torch", id=f"{name}, k={k}") for name, row in ROWS.items() for k in row.ks] + [
    pytest.param(name, row.ks[-2 if len(row.ks) > 1 else -1], "triton", id=f"{name}, triton")
    for name, row in ROWS.items()
    if find_spec("triton")
]


def expected(
    row: Row, router: Router, x_TD: Tensor, k: int, mask_T: Tensor
) -> tuple[list[list[int]], list[list[bool]], dict[str, Tensor]]:
    """Return each token's experts, which of them are computed, and the outputs and gradients by definition, in fp64."""
    weights = {n: p.detach().double().requires_grad_() for n, p in router.named_parameters()}
    x_TD = x_TD.double().requires_grad_()
    logits_TE = row.logits(weights, x_TD)
    scores_TE = row.score(logits_TE)
    ids = [row.choose(logits, k) for logits in logits_TE.tolist()]
    if row.choose_all is not None:
        ids = row.choose_all(logits_TE.detach(), mask_T, k)
    width = row.width or k
    weights_TK = torch.zeros(len(ids), width, dtype=torch.float64, device=x_TD.device)
    for t, chosen in enumerate(ids):
        total = scores_TE[t, chosen].sum() if row.config.normalize_weights else 1.0
        for place, e in enumerate(chosen):
            weights_TK[t, place] = scores_TE[t, e] / total * row.config.weight_scale
    probs_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    if row.balance_probs is not None:
        probs_TE = row.balance_probs(weights, x_TD)
    valid_T1 = mask_T[:, None].double()
    outputs = {
        "weights_TK": weights_TK,
        "prob_sums_BE": (probs_TE * valid_T1).view(3, T // 3, E).sum(1),
        "z_sum": (logits_TE.exp().sum(1).log() ** 2 * valid_T1[:, 0]).sum(),
    }
    if row.config.entropy_loss:
        outputs["entropy_sum"] = -(probs_TE * probs_TE.log()).sum(1)[mask_T].sum()
    mixed(outputs).backward()
    gradients = {name: w.grad for name, w in weights.items()} | {"x": x_TD.grad}
    kept = [[True] * width] * len(ids) if row.keep is None else row.keep(weights_TK.detach())
    return ids, kept, outputs | {name: g for name, g in gradients.items() if g is not None}


def mixed(outputs: dict[str, Tensor]) -> Tensor:
    """Return a scalar that depends on every output."""
    return sum(  # type: ignore[return-value]
        (v * torch.linspace(1, 99, v.numel(), device=v.device, dtype=v.dtype).cos().view(v.shape)).sum()
        for v in outputs.values()
    )


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(("name", "k", "backend"), ON_BACKENDS)
@pytest.mark.filterwarnings("ignore:backend='triton'")
def test_outputs_and_gradients_are_as_defined(name: str, k: int, backend: str, masked: bool) -> None:
    """Also when the decision is given. In fp64; Triton in fp32."""
    row, tolerance = ROWS[name], 1e-11 if backend == "torch" else 3e-5
    router = router_of(row, k, backend)
    x_TD = torch.randn(T, D, device=DEVICE)
    if backend == "torch":
        router, x_TD = router.double(), x_TD.double()
    mask_T = torch.arange(T, device=DEVICE) % 4 != 1 if masked else torch.ones(T, dtype=torch.bool, device=DEVICE)
    torch.manual_seed(5)
    ids, kept, want = expected(row, router, x_TD, k, mask_T)
    decision = None
    for _ in ("decided", "given"):
        torch.manual_seed(5)
        x_TD = x_TD.detach().requires_grad_()
        router.zero_grad()
        routing = router(x_TD, mask_T if masked else None, 3, decision, codes_of(row, T))
        outputs = {n: value for n in OUTPUTS if (value := getattr(routing, n)) is not None}
        mixed(outputs).backward()
        got = outputs | {n: p.grad for n, p in router.named_parameters()} | {"x": x_TD.grad}
        for t, chosen in enumerate(ids):
            chosen = chosen + [-1] * ((row.width or k) - len(chosen))
            assert routing.decision.chosen_TK[t].tolist() == chosen, t
            assert routing.ids_TK[t].tolist() == [
                e if ok and mask_T[t] else -1 for e, ok in zip(chosen, kept[t], strict=True)
            ]
        counted_TK = routing.decision.chosen_TK[mask_T]
        load_E = torch.bincount(counted_TK[counted_TK >= 0], minlength=E)
        assert torch.equal(routing.counts_BE.sum(0), load_E) and int(routing.tokens_B.sum()) == int(mask_T.sum())
        for n, value in want.items():
            assert oracle.relative_error(got[n], value) < tolerance, n
        decision = routing.decision


def losses_of(layer: MoE, parts: list[Args], how: Any) -> dict[str, Tensor]:
    """Train on all parts from one seed; return the gradients and the last counts."""
    torch.manual_seed(3)
    layer.zero_grad()
    how(layer, parts)
    return {n: p.grad.clone() for n, p in layer.named_parameters()} | {"random state": torch.get_rng_state()}


def plainly(layer: MoE, parts: list[Args]) -> None:
    step = Step.of(layer)
    with step.micro_batch(0):
        first = layer(*parts[0]).square().sum()
    with step.micro_batch(1):
        second = layer(*parts[1]).square().sum()
    (first + second).backward()
    step.end()


def recomputed(layer: MoE, parts: list[Args]) -> None:
    step = Step.of(layer)
    outputs = []
    for number, (part, *rest) in enumerate(parts):
        with step.micro_batch(number):
            outputs.append(recompute(layer, part.clone().requires_grad_(), *rest).square().sum())
    sum(outputs).backward()  # type: ignore[attr-defined]
    step.end()


def counted_ahead(layer: MoE, parts: list[Args]) -> None:
    step = Step.of(layer)
    before = torch.get_rng_state()
    with torch.no_grad():
        for number, part in enumerate(parts):
            with step.micro_batch(number, ahead=True):
                layer(*part)
    torch.set_rng_state(before)
    for number, part in enumerate(parts):
        with step.micro_batch(number):
            layer(*part).square().sum().backward()
    step.end()


@pytest.mark.parametrize(("name", "k"), CASES)
def test_recomputation_and_counting_draw_the_same(name: str, k: int) -> None:
    """Gradients with the load of the whole step equal, whether it was counted ahead, recomputed or neither."""
    row = ROWS[name]
    balance = replace(row.layer.get("balance", BalanceConfig(coefficient=0.3)), estimator="exact")
    layer = layer_of(row, k, balance=balance).double()
    parts = [(torch.randn(n, D, dtype=torch.float64), None, codes_of(row, n)) for n in (8, 13)]
    want = losses_of(layer, parts, plainly)
    for how in (recomputed, counted_ahead):
        got = losses_of(layer, parts, how)
        assert torch.equal(got.pop("random state"), want["random state"])
        for n, value in got.items():
            assert oracle.relative_error(value, want[n]) < 1e-12, (how.__name__, n)


@pytest.mark.parametrize(("name", "k"), CASES)
def test_no_tokens_and_only_masked_tokens(name: str, k: int) -> None:
    for tokens in (0, 5):
        layer = MoE(config_of(ROWS[name], k))
        mask, codes = torch.zeros(tokens, dtype=torch.bool), codes_of(ROWS[name], tokens)
        y = layer(torch.randn(tokens, D, requires_grad=True), mask, codes)
        y.sum().backward()
        assert y.shape == (tokens, D) and not y.any() and int(layer.stats.counts.sum()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_compiles_as_one_graph(name: str) -> None:
    """Compiled code draws the same random numbers."""
    torch._dynamo.reset()
    row = ROWS[name]
    router, x_TD = router_of(row, row.ks[0]), torch.randn(T, D, device=DEVICE)
    mask_T = torch.arange(T, device=DEVICE) % 4 != 1
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    found = []
    for module in (router, compiled):
        torch.manual_seed(2)
        router.zero_grad()
        routing = module(x_TD, mask_T, 3, None, codes_of(row, T))
        mixed({n: value for n in OUTPUTS if (value := getattr(routing, n)) is not None}).backward()
        found.append([*routing.decision, routing.counts_BE, *(p.grad for p in router.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
