"""Compares the router with the definitions.  T tokens, D hidden, E experts, K top-k, G groups."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.kernels import topk_gate as op
from equimoe.moe import BalanceConfig, MoE, MoEConfig, RouterConfig
from equimoe.moe.routing import Router
from equimoe.moe.types import Routing
from tests.helpers import oracle

D, E, K, T = 12, 12, 3, 20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU Triton interprets
ROUTERS = {
    "softmax": RouterConfig(normalize_weights=False, z_loss=1e-2),
    "normalized": RouterConfig(z_loss=1e-2),
    "after top-k": RouterConfig(softmax_after_topk=True, weight_scale=0.5),
    "sigmoid": RouterConfig(score="sigmoid", normalize_weights=False),
    "sigmoid after top-k": RouterConfig(score="sigmoid", softmax_after_topk=True, z_loss=1e-2),
    "deepseek": RouterConfig(score="sigmoid", weight_scale=2.5, z_loss=1e-2, groups=4, kept_groups=2),
    "softmax groups": RouterConfig(groups=6, kept_groups=3),
}
BACKENDS = ["reference", "torch", pytest.param("triton", marks=pytest.mark.skipif(not find_spec("triton"), reason=""))]


def make(backend: str = "torch", config: RouterConfig | None = None, dtype: torch.dtype = torch.float32) -> Router:
    torch.manual_seed(0)
    return Router(D, E, K, config or RouterConfig(), 0.4, backend).to(DEVICE, dtype)


def outputs_and_gradients(router: Router, x_TD: Tensor, *args: Any) -> tuple[Routing, dict[str, Tensor]]:
    x_TD = x_TD.detach().to(router.weight.dtype).requires_grad_()
    router.zero_grad()
    routing = router(x_TD, *args)
    outputs = {name: getattr(routing, name) for name in ("weights_TK", "prob_sums_BE", "z_sum")}
    sum(
        (value * torch.linspace(1, 99, value.numel(), device=DEVICE).cos().view(value.shape).to(value.dtype)).sum()
        for value in outputs.values()
    ).backward()
    return routing, outputs | {"x": x_TD.grad, "weight": router.weight.grad.clone()}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("replayed", [False, True], ids=["decided", "replayed"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked sequences"])
@pytest.mark.parametrize("config", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_values_and_gradients(backend: str, config: RouterConfig, masked: bool, replayed: bool) -> None:
    """In fp64; Triton in fp32."""
    dtype, tolerance = (torch.float32, 2e-5) if backend == "triton" else (torch.float64, 1e-12)
    x_TD = torch.randn(T, D, device=DEVICE)
    args: list[Any] = [torch.rand(T, device=DEVICE) > 0.3, 4] if masked else [None, 1]
    if replayed:  # the choices of another router
        args.append(make("torch", config)(x_TD.roll(1, 0), *args).decision)
    found, got = outputs_and_gradients(make(backend, config, dtype), x_TD, *args)
    expected, want = outputs_and_gradients(make("reference", config, torch.float64), x_TD, *args)
    for name in ("ids_TK", "counts_BE", "tokens_B"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    if replayed:
        ids_TK = args[2].ids_TK
        assert found.decision is args[2]
        assert torch.equal(found.counts_BE.sum(0), torch.bincount(ids_TK[ids_TK >= 0], minlength=E))
    for name, value in want.items():
        assert got[name].dtype == dtype and oracle.relative_error(got[name], value) < tolerance, name


@pytest.mark.parametrize("config", ROUTERS.values(), ids=ROUTERS)
def test_layer_gradients_in_fp64(config: RouterConfig) -> None:
    """Gradients must be right through experts, masks and the balance loss per sequence."""
    results = []
    for backend in ("torch", "reference"):
        torch.manual_seed(0)
        balance = BalanceConfig(scope="sequence", coefficient=0.3)
        layer = MoE(MoEConfig(D, 8, E, K, config, balance, backend=backend, init_std=0.4)).double()  # type: ignore
        x = torch.randn(4, 5, D, dtype=torch.float64, requires_grad=True)
        y = layer(x, torch.arange(20).view(4, 5) % 7 != 2)
        y.square().sum().backward()
        results.append({"y": y, "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()})
    for name, value in results[1].items():
        assert value.norm() > 0 and oracle.relative_error(results[0][name], value) < 1e-11, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_choices_stay_in_the_best_groups(backend: str, score: str) -> None:
    """The value of a group of 3 is the sum of its two best biased scores; 2 of 4 groups are kept."""
    router = make(backend, RouterConfig(score=score, groups=4, kept_groups=2))  # type: ignore[arg-type]
    router.bias_E = torch.randn(E, device=DEVICE) * 0.2
    x_TD = torch.randn(T, D, device=DEVICE)
    chosen_TK = router(x_TD).decision.chosen_TK
    logits_TE = (x_TD @ router.weight.T).double()
    wanted_TE = (logits_TE.softmax(1) if score == "softmax" else logits_TE.sigmoid()) + router.bias_E.double()
    differ = 0
    for wanted_E, chosen in zip(wanted_TE.tolist(), chosen_TK.tolist(), strict=True):
        worth = {g: sum(sorted(wanted_E[3 * g : 3 * g + 3])[1:]) for g in range(4)}
        kept = sorted(worth, key=lambda g: -worth[g])[:2]
        best = sorted((e for e in range(E) if e // 3 in kept), key=lambda e: -wanted_E[e])
        assert chosen == best[:K] and {e // 3 for e in chosen} <= set(kept)
        differ += sorted(range(E), key=lambda e: -wanted_E[e])[:K] != chosen
    assert differ > 3, "the limit never mattered"


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_chooses_and_never_weighs(backend: str) -> None:
    config = RouterConfig(score="sigmoid", groups=4, kept_groups=2)
    router, x_TD = make(backend, config), torch.randn(T, D, device=DEVICE)
    router.bias_E = bias_E = (torch.randn(E, device=DEVICE) * 0.3).requires_grad_()
    biased, grads = outputs_and_gradients(router, x_TD)
    router.bias_E = bias_E.detach() + 0.5
    shifted, same = outputs_and_gradients(router, x_TD)
    assert torch.equal(biased.ids_TK, shifted.ids_TK)
    assert all(torch.equal(grads[name], same[name]) for name in grads) and bias_E.grad is None
    router.bias_E = None
    plain = router(x_TD)
    assert not torch.equal(plain.ids_TK, biased.ids_TK)
    weighed = router(x_TD, decision=biased.decision)  # without the bias
    assert torch.equal(weighed.weights_TK, biased.weights_TK) and torch.equal(weighed.counts_BE, biased.counts_BE)
    assert torch.equal(plain.prob_sums_BE, biased.prob_sums_BE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 4])
def test_ties_go_to_the_lower_index(backend: str, groups: int) -> None:
    router = make(backend, RouterConfig(groups=groups, kept_groups=max(groups // 2, 1)))
    assert router(torch.zeros(2, D, device=DEVICE)).ids_TK.tolist() == [[0, 1, 2]] * 2
    router.bias_E = torch.zeros(E, device=DEVICE)
    router.bias_E[torch.tensor([7, 8])] = 1.0
    assert router(torch.zeros(2, D, device=DEVICE)).ids_TK.tolist() == [[7, 8, 0]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_compiles_as_one_graph(backend: str) -> None:
    router = make(backend, RouterConfig(score="sigmoid", groups=4, kept_groups=2))
    router.bias_E = torch.randn(E, device=DEVICE) * 0.1
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for tokens in (10, 14):
        x_TD, mask_T = torch.randn(tokens, D, device=DEVICE), torch.rand(tokens, device=DEVICE) > 0.3
        for decision in (None, router(x_TD.neg(), mask_T, 2).decision):
            found, got = outputs_and_gradients(compiled, x_TD, mask_T, 2, decision)
            expected, want = outputs_and_gradients(router, x_TD, mask_T, 2, decision)
            assert torch.equal(found.ids_TK, expected.ids_TK) and torch.equal(found.counts_BE, expected.counts_BE)
            assert all(torch.equal(got[name], want[name]) for name in want)


def test_backend_is_the_layers() -> None:
    config = MoEConfig(D, 8, E, K, backend="reference")
    assert MoE(config).router.route.keywords["backend"] == "reference"


def test_fp64_never_goes_to_triton_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    pick = op.pick
    monkeypatch.setattr(op, "pick", lambda name, table, backend: pick(name, table, backend.replace("auto", "triton")))
    x_TD = torch.randn(3, D, dtype=torch.float64, device=DEVICE)
    assert make("auto").double()(x_TD).weights_TK.dtype == torch.float64
    with pytest.raises(ValueError, match="computes in fp32; use backend='torch'"):
        make("triton").double()(x_TD)


def test_bias_is_saved_when_used_and_stays_in_fp32() -> None:
    router = make()
    assert list(router.state_dict()) == ["weight"]
    router.bias_E = torch.full((E,), 1 / 3, device=DEVICE)
    twin = copy.deepcopy(router).bfloat16()
    assert list(twin.state_dict()) == ["weight", "bias_E"] and twin.weight.dtype == torch.bfloat16
    assert twin.bias_E is not router.bias_E and torch.equal(twin.bias_E, router.bias_E)
    assert twin.bias_E.dtype == torch.float32 and router.to("meta").bias_E.is_meta


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"groups": 0}, r"router.groups=0: must be an integer of at least 1"),
        ({"groups": 2.0}, r"router.groups=2.0"),
        ({"groups": 2, "kept_groups": 3}, r"router.kept_groups=3: must be at most router.groups=2"),
        ({"groups": 5}, r"router.groups=5: must divide num_experts=12"),
        ({"groups": 6}, r"router.kept_groups=1: the number of experts in the kept groups, 2, is less than top_k=3"),
    ],
)
def test_mistakes_with_groups(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(D, 8, E, K, replace(RouterConfig(), **wrong))
