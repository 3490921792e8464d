"""Checks zero-computation experts and gating residuals (MoE++) against their definition in fp64.

T tokens, D hidden, E all experts, K top-k.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.moe import (
    BalanceConfig,
    CapacityConfig,
    MoE,
    MoEConfig,
    PassedLogits,
    Placement,
    RouterConfig,
    Step,
    ZeroComputationConfig,
    recompute,
)
from equimoe.moe.collectives import record_traffic, world_axis
from equimoe.moe.dispatch import build_dispatcher
from equimoe.moe.observe.speed import forward_flops
from equimoe.moe.train.build import build_model
from tests.helpers import oracle, small
from tests.helpers.fork import run_ranks

MLPS, D, ALPHA = 5, 10, 0.3
FREE = ZeroComputationConfig(zero=1, copy=2, constant=2, tau=0.4)
E = MLPS + FREE.number
#: a copy expert alone; no constant expert; no copy expert
OTHERS = (
    ZeroComputationConfig(0, 1, 0, 0.5),
    ZeroComputationConfig(2, 1, 0, 1.0),
    ZeroComputationConfig(1, 0, 3, 0.75),
)


def config(k: int, free: ZeroComputationConfig | None = FREE, **changes: Any) -> MoEConfig:
    return MoEConfig(
        D,
        7,
        MLPS,
        k,
        router=RouterConfig(gate="residual", normalize_weights=k > 1),
        balance=BalanceConfig(coefficient=ALPHA, estimator="exact"),
        zero_computation=free,
        init_std=0.5,
        **changes,
    )


class Model(torch.nn.Module):
    """Two layers, each of which adds to the hidden states; the second gets the first one's logits."""

    def __init__(self, of: MoEConfig) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([MoE(of), MoE(of)])
        self.call: Any = lambda layer, x, mask, passed: layer(x, mask, passed=passed)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        passed = PassedLogits()
        for layer in self.layers:
            x = x + self.call(layer, x, mask, passed)
            passed = passed.next()
        return x


def model(k: int, free: ZeroComputationConfig = FREE, **changes: Any) -> Model:
    torch.manual_seed(0)
    return Model(config(k, free, **changes)).double()


def batches(masked: bool = True) -> list[tuple[Tensor, Tensor]]:
    """Return two micro-batches of different sizes, and their valid tokens."""
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(n, 7, D, generator=generator, dtype=torch.float64) for n in (3, 1)]
    return [
        (x, torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % 4 != 1 if masked else x[..., 0] < 1e9) for x in parts
    ]


def mixed(y: Tensor) -> Tensor:
    return (y * torch.linspace(1, 99, y.numel(), dtype=y.dtype).cos().view(y.shape)).sum()


def of_expert(w: dict[str, Tensor], e: int, x_D: Tensor, free: ZeroComputationConfig) -> Tensor:
    if e < MLPS:
        gate, up = (w["experts.gate_up_proj"][e] @ x_D).chunk(2)
        return w["experts.down_proj"][e] @ (gate * torch.sigmoid(gate) * up)
    if e < MLPS + free.zero:
        return x_D * 0
    if e < MLPS + free.zero + free.copy:
        return x_D
    j = e - MLPS - free.zero - free.copy
    a, b = (w["local.mixing"][j] @ x_D).exp()
    return (a * x_D + b * w["local.vectors"][j]) / (a + b)


def defined(of: Model, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return outputs, chosen experts and all gradients of a step, token by token, as the paper defines them."""
    c = of.layers[0].config
    k, free = c.top_k, c.zero_computation
    weights = {n: p.detach().clone().requires_grad_() for n, p in of.named_parameters()}
    by_layer = [{n[9:]: p for n, p in weights.items() if n.startswith(f"layers.{i}.")} for i in range(2)]
    inputs = [x.clone().requires_grad_() for x, _ in parts]
    outputs, probs, chosen = [], [[], []], [[], []]
    for x, (_, mask) in zip(inputs, parts, strict=True):
        rows = []
        for x_D, valid in zip(x.flatten(0, 1), mask.flatten().tolist(), strict=True):
            logits = torch.zeros(c.all_experts, dtype=torch.float64)
            for i, w in enumerate(by_layer):
                logits = w["router.weight"] @ x_D + w["router.residual_weight"] @ logits
                p = logits.exp() / logits.exp().sum()
                values = p.tolist()
                ids = sorted(range(c.all_experts), key=lambda e: (-values[e], e))[:k]  # noqa: B023
                total = sum(p[e] for e in ids) if c.router.normalize_weights else 1.0
                if valid:
                    x_D = x_D + sum(p[e] / total * of_expert(w, e, x_D, free) for e in ids)
                    probs[i].append(p)
                    chosen[i] += ids
            rows.append(x_D)
        outputs.append(torch.stack(rows).view(x.shape))
    loss = sum(mixed(y) for y in outputs)
    for p, ids in zip(probs, chosen, strict=True):
        share_E = torch.bincount(torch.tensor(ids), minlength=c.all_experts).double() / len(ids)
        eta_E = torch.tensor([1.0] * MLPS + [free.tau] * free.number, dtype=torch.float64)
        loss = loss + ALPHA * c.all_experts * (eta_E * share_E * torch.stack(p).mean(0)).sum()
    loss.backward()
    found = {n: p.grad for n, p in weights.items() if p.grad is not None}
    found |= {f"x{i}": x.grad for i, x in enumerate(inputs)} | {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"chosen {i}": torch.tensor(ids).view(-1, k) for i, ids in enumerate(chosen)}


def trained(of: Model, parts: list[tuple[Tensor, Tensor]], ahead: bool = False) -> dict[str, Tensor]:
    of.zero_grad()
    step, found = Step.of(of), {}
    inputs = [x.clone().requires_grad_() for x, _ in parts]
    if ahead:
        with torch.no_grad():
            for i, (x, mask) in enumerate(parts):
                with step.micro_batch(i, ahead=True):
                    of(x, mask)
    for i, (x, (_, mask)) in enumerate(zip(inputs, parts, strict=True)):
        with step.micro_batch(i):
            found[f"y{i}"] = of(x, mask)
        if ahead:
            mixed(found[f"y{i}"]).backward()
    if not ahead:
        sum(mixed(y) for y in found.values()).backward()
    step.end()
    found |= {f"x{i}": x.grad for i, x in enumerate(inputs)}
    return found | {n: p.grad for n, p in of.named_parameters()}


def recomputed(layer: MoE, x: Tensor, mask: Tensor | None, passed: PassedLogits) -> Tensor:
    return recompute(lambda *given: layer(given[0], given[1], passed=given[2]), x, mask, passed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("how", ["plain", "recomputed", "counted ahead", "reference backend"])
@pytest.mark.parametrize("k", [1, 3, E])
def test_outputs_and_gradients_are_as_defined(k: int, how: str) -> None:
    """Two layers, and two micro-batches with masked tokens, whose load is balanced together."""
    of, parts = model(k, backend="reference" if how == "reference backend" else "torch"), batches()
    if how == "recomputed":
        of.call = recomputed
    want, got = defined(of, parts), trained(of, parts, ahead=how == "counted ahead")
    for name in got:
        assert oracle.relative_error(got[name], want.get(name, torch.zeros(()))) < 1e-11, name
    first_residual = got["layers.0.router.residual_weight"]
    assert not first_residual.any() and got["layers.1.router.residual_weight"].norm() > 1e-3
    used = set(want["chosen 0"].flatten().tolist())
    assert used & set(range(MLPS)) and used & set(range(MLPS, E))


@pytest.mark.parametrize("free", OTHERS, ids=["copy", "no constants", "no copies"])
def test_fewer_kinds_of_experts(free: ZeroComputationConfig) -> None:
    of, parts = model(3, free), batches(masked=False)
    want, got = defined(of, parts), trained(of, parts)
    assert max(oracle.relative_error(got[name], want.get(name, torch.zeros(()))) for name in got) < 1e-11


def test_the_residual_reaches_the_router_before() -> None:
    """Its gradient through the logits is missing if these are detached."""
    of, parts = model(3), batches()
    whole = trained(of, parts)["layers.0.router.weight"]

    def detached(layer: MoE, x: Tensor, mask: Tensor | None, passed: PassedLogits) -> Tensor:
        before = passed.before_TE
        inner = PassedLogits(None if before is None else before.detach())
        y = layer(x, mask, passed=inner)
        passed.own_TE = inner.own_TE
        return y

    of.call = detached
    assert oracle.relative_error(trained(of, parts)["layers.0.router.weight"], whole) > 1e-3


@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_the_loss_has_no_gradient_at_the_shares_of_the_paper(tau: float) -> None:
    """It pulls the load to 1 / eta: an MLP gets tau times the choices of a zero-computation expert."""
    free = replace(FREE, tau=tau)
    layer = model(1, free).layers[0]
    shares = torch.tensor(layer.config.load_shares, dtype=torch.float64)
    assert float(shares[0] / shares[-1]) == pytest.approx(tau) and float(shares.sum()) == pytest.approx(1)
    paper = tau * MLPS / (tau * MLPS + free.number)
    assert layer.config.mlps_per_token == pytest.approx(paper)
    weighted = layer.balancer._weighted(shares)
    assert float(weighted.std()) < 1e-12


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("drop", ["probability", "position"])
def test_capacity_is_weighted_by_tau(drop: Any, scope: Any) -> None:
    """Equation 8 times K: all capacities together are factor * K * T, and an MLP's is tau times the others'."""
    factor, k, tokens = 0.7, 3, 33
    layer = model(k, capacity=CapacityConfig(factor, drop, scope=scope)).layers[0].eval()
    x_TD = torch.randn(tokens, D, dtype=torch.float64)
    mask_T = torch.arange(tokens) % 5 != 2
    valid, whole = int(mask_T.sum()), FREE.tau * MLPS + FREE.number
    routing = layer.router(x_TD, mask_T)
    kept_TK, weights = layer.capacity(routing).ids_TK, routing.weights_TK.tolist()
    for e in range(E):
        limit = math.ceil(factor * k * valid * (FREE.tau if e < MLPS else 1.0) / whole)
        asking = [(t, j) for t, j in (routing.ids_TK == e).nonzero().tolist()]
        if drop == "probability":
            asking.sort(key=lambda place: -weights[place[0]][place[1]])
        assert {tuple(p) for p in (kept_TK == e).nonzero().tolist()} == set(asking[:limit]), e
    assert (kept_TK < 0).sum() > (routing.ids_TK < 0).sum()


def test_only_choices_of_mlps_are_sent() -> None:
    """Four ranks with two MLPs each; other experts are computed where the token is."""
    of = replace(config(4), num_experts=8, balance=BalanceConfig(coefficient=0.0))

    def script(rank: int, world: int) -> tuple[int, int, int, float]:
        torch.manual_seed(0)
        layer, axis = MoE(of).double(), world_axis()
        whole = copy.deepcopy(layer)
        for name, weight in list(layer.experts.named_parameters()):
            setattr(layer.experts, name, torch.nn.Parameter(weight.detach().chunk(world)[rank].clone()))
        layer.dispatcher = build_dispatcher(of, Placement(ep=axis))
        x_TD = torch.randn(17 + rank, D, generator=torch.Generator().manual_seed(rank)).double()
        ids_TK = layer.router(x_TD).ids_TK
        with record_traffic() as entries, torch.no_grad():
            y_TD = layer(x_TD)
        with torch.no_grad():
            error = oracle.relative_error(y_TD, whole(x_TD))
        elsewhere = int(((ids_TK < 8) & (ids_TK // 2 != rank)).sum())
        free = int((ids_TK >= 8).sum())
        out = entries[[e.verb for e in entries].index("exchange_rows")].sent
        row = -(-(D * 8 + 8) // 16) * 16  # a row and its weight travel together
        return out, elsewhere * row, free, error

    for sent, want, free, error in run_ranks(script, 4):
        assert sent == want > 0 and free > 0 and error < 1e-12


def test_parameters_and_operations() -> None:
    """Active parameters and operations count the MLPs of a balanced load; constant experts compute for all tokens."""
    plain = small.CONFIG
    free = ZeroComputationConfig(1, 1, 2, tau=0.5)
    with_free = small.changed(plain, zero_computation=free)
    model, base = build_model(with_free, 50), build_model(plain, 50)
    moe, layers = plain.moe, len(base.moe_layers())
    hidden, number = moe.hidden_size, moe.num_experts
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters())
    assert more == layers * (4 * hidden + 2 * 3 * hidden)
    found, before = forward_flops(model), forward_flops(base)
    share = 0.5 * number / (0.5 * number + 4)
    assert found["experts"] == pytest.approx(before["experts"] * share)
    assert found["router"] - before["router"] == 2 * layers * 4 * hidden
    assert found["shared"] - before["shared"] == 2 * layers * 2 * 3 * hidden


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"free": lambda: ZeroComputationConfig(0, 0, 0)}, "zero_computation.copy=0: there is no expert"),
        ({"free": lambda: ZeroComputationConfig(tau=0.0)}, "zero_computation.tau=0.0: must be above 0"),
        ({"free": lambda: ZeroComputationConfig(zero=-1)}, "zero_computation.zero=-1: must be an integer"),
        ({"k": E + 1}, f"top_k={E + 1}: must be at most num_experts=5 and the 5 of zero_computation"),
        ({"capacity": CapacityConfig(pad=True)}, "capacity.pad=True: experts of zero_computation"),
        ({"capacity": CapacityConfig(level="device")}, "capacity.level='device': zero_computation has"),
        ({"router": RouterConfig(groups=5, kept_groups=3)}, "router.groups=5: zero_computation has no groups"),
        ({"router": RouterConfig(groups=3, kept_groups=3)}, "router.groups=3: zero_computation has no groups"),
        (
            {"k": 1, "router": RouterConfig(gate="slots"), "balance": BalanceConfig(coefficient=0.0)},
            "router.gate='slots': gives its slots to experts that ranks own",
        ),
        ({"balance": BalanceConfig("device")}, "balance.scope='device': balances ranks"),
        ({"balance": BalanceConfig(bias_update_rate=0.001)}, "balance.bias_update_rate=0.001: evens out choices"),
    ],
)
def test_settings_that_have_no_meaning(changes: dict[str, Any], message: str) -> None:
    changes = dict(changes)
    free, k = changes.pop("free", lambda: FREE), changes.pop("k", 3)
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        replace(config(k, free()), **changes)


def test_the_triton_backend_says_what_runs_in_torch() -> None:
    with pytest.warns(UserWarning, match="zero_computation has no Triton kernel and runs in torch"):
        MoE(config(3, backend="triton"))
