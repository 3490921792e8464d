"""Compares the layer's output and gradients in one process with the definitions."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from equimoe.moe import BalanceConfig, CapacityConfig, MoE, MoEConfig, RouterConfig, recompute
from tests.helpers import oracle

SMALL = MoEConfig(hidden_size=12, intermediate_size=20, num_experts=5, top_k=2, init_std=0.3)
ROUTERS = {
    "softmax": RouterConfig(normalize_weights=False),
    "normalized": RouterConfig(),
    "mixtral": RouterConfig(softmax_after_topk=True),
    "sigmoid": RouterConfig(score="sigmoid", normalize_weights=False),
    "deepseek": RouterConfig(score="sigmoid", weight_scale=2.5, z_loss=1e-3),
}
#: Switch (arXiv 2101.03961), for one expert per token
SWITCH = ROUTERS["softmax"]


def make(**changes: object) -> MoE:
    torch.manual_seed(0)
    return MoE(replace(SMALL, **changes))


def gradients(layer: MoE) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.usefixtures("poison")
def test_forward_and_every_gradient(router: RouterConfig, top_k: int, backend: str) -> None:
    off = BalanceConfig(coefficient=0.0)
    if top_k == 1:
        router = replace(router, normalize_weights=False, softmax_after_topk=False)
    layer = make(router=replace(router, z_loss=0.0), top_k=top_k, backend=backend, balance=off)
    x = torch.randn(3, 7, 12, requires_grad=True)
    out_grad = torch.randn(3, 7, 12)
    y = layer(x)
    y.backward(out_grad)
    got = gradients(layer) | {"x": x.grad.clone()}

    layer64 = copy.deepcopy(layer).double()
    layer64.zero_grad()
    x64 = x.detach().double().requires_grad_()
    want = oracle.forward(layer64, x64.view(-1, 12)).view(x.shape)
    want.backward(out_grad.double())
    assert y.shape == x.shape and y.dtype == x.dtype
    assert oracle.relative_error(y, want) < 1e-6
    for name, grad in (gradients(layer64) | {"x": x64.grad}).items():
        assert oracle.relative_error(got[name], grad) < 1e-5, name


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_losses_hang_on_the_output(router: RouterConfig) -> None:
    """Training on y alone must give the router the gradient of coefficient * balance + z_loss * z."""
    layer = make(router=router, balance=BalanceConfig(coefficient=0.3)).double()
    x = torch.randn(9, 12, dtype=torch.float64)
    (layer(x) * 0).sum().backward()
    got = layer.router.weight.grad.clone()
    layer.zero_grad()
    logits_TE, *_ = oracle.route(layer, x)
    want = 0.3 * oracle.balance_loss(layer, x) + router.z_loss * logits_TE.logsumexp(-1).square().mean()
    want.backward()
    assert oracle.relative_error(got, layer.router.weight.grad) < 1e-10
    assert float(layer.router.weight.grad.norm()) > 1e-4


def test_coefficient_scales_the_gradient_and_zero_switches_it_off() -> None:
    norms = []
    for coefficient in (0.0, 0.1, 0.2):
        layer = make(balance=BalanceConfig(coefficient=coefficient))
        (layer(torch.randn(32, 12, generator=torch.Generator().manual_seed(1))) * 0).sum().backward()
        norms.append(float(layer.router.weight.grad.norm()))
    assert norms[0] == 0.0 and norms[2] == pytest.approx(2 * norms[1], rel=1e-6)


@pytest.mark.parametrize("num_experts", [4, 33, 300])
def test_ties_go_to_the_lower_index(num_experts: int) -> None:
    layer = make(num_experts=num_experts, top_k=3)
    with torch.no_grad():  # three levels of logits, so that nearly all are tied
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.randint(0, 3, (num_experts,)).float()
    ids_TK = layer.router(torch.ones(40, 12)).ids_TK
    level = layer.router.weight[:, 0].tolist()
    assert ids_TK.tolist() == [sorted(range(num_experts), key=lambda e: (-level[e], e))[:3]] * 40


def test_router_computes_in_fp32_under_autocast() -> None:
    layer, x = make(), torch.randn(64, 12)
    plain = layer.router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routed = layer.router(x)
        y = layer(x)
    assert torch.equal(plain.weights_TK, routed.weights_TK) and routed.prob_sums_BE.dtype == torch.float32
    assert y.dtype == x.dtype and oracle.relative_error(y, layer(x)) < 2e-2


def test_bf16_module() -> None:
    layer = make().bfloat16()
    x = torch.randn(64, 12).bfloat16().requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    want = copy.deepcopy(layer).double()(x.detach().double())
    assert y.dtype == torch.bfloat16 and oracle.relative_error(y, want) < 2e-2
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts(gated: bool) -> None:
    layer = make(shared_intermediate_size=6, shared_gate=gated)
    x = torch.randn(8, 12)
    mlp = layer.shared.mlp
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    shared = (torch.nn.functional.silu(gate) * up) @ mlp.down_proj.weight.T
    if gated:
        shared = torch.sigmoid(x @ layer.shared.gate.weight.T) * shared
    assert oracle.relative_error(layer(x), oracle.forward(layer, x) + shared) < 1e-5


@pytest.mark.parametrize("drop", ["probability", "position"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 8.0])
def test_capacity_against_a_loop(drop: str, factor: float) -> None:
    layer = make(capacity=CapacityConfig(factor, drop))
    x = torch.randn(24, 12)
    with torch.no_grad():
        _, _, ids_TK, weights_TK = oracle.route(layer, x)
    limit = math.ceil(factor * 2 * 24 / 5)
    kept_TK = torch.zeros(24, 2, dtype=torch.bool)
    for expert in range(5):
        asking = [(t, k) for t in range(24) for k in range(2) if ids_TK[t, k] == expert]
        if drop == "probability":
            asking.sort(key=lambda place: -float(weights_TK[place]))
        for place in asking[:limit]:
            kept_TK[place] = True
    assert oracle.relative_error(layer(x), oracle.forward(layer, x, kept_TK)) < 1e-5
    assert layer.stats.dropped_fraction == pytest.approx(1 - float(kept_TK.float().mean()))
    assert layer.stats.counts.tolist() == torch.bincount(ids_TK.flatten(), minlength=5).tolist()


def test_mask_keeps_padding_out_of_experts_and_counts() -> None:
    layer = make(balance=BalanceConfig(coefficient=0.5)).double()
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 6:] = mask[1, 2:] = False
    y = layer(x, mask)
    (y * 0).sum().backward()
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    assert oracle.relative_error(y[mask], oracle.forward(layer, x[mask])) < 1e-12
    assert int(layer.stats.tokens) == 8 and int(layer.stats.counts.sum()) == 16
    got = layer.router.weight.grad.clone()
    layer.zero_grad()
    (0.5 * oracle.balance_loss(layer, x[mask])).backward()
    assert oracle.relative_error(got, layer.router.weight.grad) < 1e-10


def test_stats_of_a_known_routing() -> None:
    layer = make(top_k=1, num_experts=4, router=SWITCH)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:3, :3] = 50 * torch.eye(3)
    x = torch.zeros(8, 12)
    x[:4, 0] = x[4:6, 1] = x[6:, 2] = 1.0
    layer(x)
    stats = layer.stats
    assert stats.counts.tolist() == [4, 2, 2, 0] and stats.counts.dtype == torch.int64 and int(stats.tokens) == 8
    assert stats.max_over_mean == 2.0 and stats.dead_experts == 1 and stats.dropped_fraction == 0.0
    assert stats.cv == pytest.approx(math.sqrt(2) / 2)
    assert stats.entropy == pytest.approx(1.5 / 2)
    # with certain routing P = f, so the loss is E * sum f^2
    assert stats.losses["micro"] == pytest.approx(4 * (0.25 + 2 / 16), rel=1e-4)
    assert stats.losses["global"] == stats.losses["micro"]


def test_balanced_routing_has_loss_one() -> None:
    layer = make(num_experts=4, top_k=1, router=SWITCH)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, :4] = 50 * torch.eye(4)
    x = torch.zeros(2, 8, 12)
    x[:, torch.arange(8), torch.arange(8) % 4] = 1.0
    (layer(x) * 0).sum().backward()
    losses = layer.stats.losses
    assert losses["micro"] == losses["sequence"] == losses["global"] == pytest.approx(1.0, abs=1e-9)
    assert float(layer.router.weight.grad.norm()) < 1e-9


@pytest.mark.parametrize("shape", [(12,), (0, 12), (1, 12), (3, 0, 12), (0, 5, 12), (2, 3, 4, 12)])
@pytest.mark.usefixtures("poison")
def test_shapes(shape: tuple[int, ...]) -> None:
    layer, x = make(), torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(math.isfinite(value) for value in layer.stats.losses.values())


@pytest.mark.parametrize("expanded", [False, True])
def test_non_contiguous_input(expanded: bool) -> None:
    layer = make()
    x = torch.randn(12, 7).T if not expanded else torch.randn(1, 12).expand(7, 12)
    assert oracle.relative_error(layer(x), layer(x.contiguous())) < 1e-6


def test_passes_that_change_no_statistic() -> None:
    layer, x, other = make(), torch.randn(6, 12), torch.randn(11, 12)
    (layer(x)).sum().backward()
    stats, seen = layer.stats, layer.balancer.visits
    with torch.no_grad():
        layer(other)
    layer.eval()(other).sum().backward()
    with torch.no_grad():
        layer(other)
    assert layer.stats is stats and layer.balancer.visits == seen


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant", "recompute"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_recomputation_counts_once_and_changes_no_gradient(kind: str, micro_batches: int) -> None:
    run = {
        "reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
        "non-reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
        "recompute": recompute,
    }[kind]
    config = replace(SMALL, balance=BalanceConfig(coefficient=0.5, micro_batches=micro_batches), top_k=2)
    torch.manual_seed(0)
    plain = torch.nn.Sequential(MoE(config), torch.nn.Tanh(), MoE(config))
    repeated = copy.deepcopy(plain)
    inputs = [torch.randn(9, 12) for _ in range(micro_batches)]
    for x in inputs:
        plain(x.clone().requires_grad_()).square().sum().backward()
        run(repeated, x.clone().requires_grad_()).square().sum().backward()
    for one, two in zip((plain[0], plain[2]), (repeated[0], repeated[2]), strict=True):
        assert [s.counts_BE.tolist() for s in one.balancer.visits] == [
            s.counts_BE.tolist() for s in two.balancer.visits
        ]
        for name, grad in gradients(one).items():
            # a reentrant region's first forward is not counted; the layer counts its micro-batch only in the backward
            assert torch.equal(grad, two.get_parameter(name).grad), name


def test_recompute_with_several_micro_batches_in_flight() -> None:
    """All forwards run before the first backward, and the backwards run in another order."""
    config = replace(SMALL, balance=BalanceConfig(coefficient=0.5, micro_batches=3))
    torch.manual_seed(0)
    plain = MoE(config)
    for how in (recompute, lambda layer, x: checkpoint(layer, x, use_reentrant=False)):
        one, two = copy.deepcopy(plain), copy.deepcopy(plain)
        inputs = [torch.randn(9, 12) for _ in range(3)]
        outs = [(one(x), how(two, x.clone().requires_grad_())) for x in inputs]
        for i in (1, 0, 2):
            outs[i][0].square().sum().backward()
            outs[i][1].square().sum().backward()
        assert len(two.balancer.visits) == 3
        for name, grad in gradients(one).items():
            assert torch.equal(grad, two.get_parameter(name).grad), name


def test_recomputation_never_routes_again() -> None:
    """The decision must be repeated even if the router's weight changes between forward and backward."""
    layer = make()
    x = torch.randn(9, 12, requires_grad=True)
    y = recompute(layer, x)
    chosen = layer.balancer.visits[0].decision.chosen_TK
    routed = []
    layer.router.register_forward_hook(lambda module, args, out: routed.append(out.ids_TK))
    with torch.no_grad():
        layer.router.weight.mul_(-1)
    y.sum().backward()
    assert len(routed) == 1 and torch.equal(routed[0], chosen)


def test_deep_copy_is_independent() -> None:
    layer = make()
    layer(torch.randn(5, 12)).sum().backward()
    twin = copy.deepcopy(layer)
    assert twin.balancer.visits == [] and torch.equal(twin.router.weight, layer.router.weight)
    twin(torch.randn(3, 12)).sum().backward()
    assert len(layer.balancer.visits) == 1


def test_weights_are_laid_out_as_hugging_face_does() -> None:
    shapes = {name: tuple(p.shape) for name, p in make().named_parameters()}
    assert shapes == {
        "router.weight": (5, 12),
        "experts.gate_up_proj": (5, 40, 12),
        "experts.down_proj": (5, 12, 20),
    }


@pytest.mark.parametrize(
    "router",
    [RouterConfig(), RouterConfig(score="sigmoid"), RouterConfig(softmax_after_topk=True, normalize_weights=False)],
    ids=["normalised", "sigmoid", "softmax after top-k"],
)
def test_one_choice_whose_weight_is_always_one_is_refused(router: RouterConfig) -> None:
    """Only the balance loss would train such a router. With one expert there is nothing to learn."""
    field = "softmax_after_topk" if router.softmax_after_topk else "normalize_weights"
    with pytest.raises(ValueError, match=f"^router.{field}=True: with top_k=1 this makes .*set it to False"):
        make(top_k=1, router=router)
    make(top_k=1, num_experts=1, router=router)


def test_switch_routing_trains_the_router_on_the_task() -> None:
    layer = make(top_k=1, router=SWITCH, balance=BalanceConfig(coefficient=0.0))
    layer(torch.randn(8, 12)).square().sum().backward()
    assert layer.router.weight.grad is not None and float(layer.router.weight.grad.norm()) > 1e-6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": 6}, r"top_k=6: must be at most num_experts=5"),
        ({"top_k": 0}, r"top_k=0: must be an integer of at least 1"),
        ({"num_experts": 2.5}, r"num_experts=2.5: must be an integer"),
        ({"backend": "cuda"}, r"backend='cuda'"),
        ({"shared_gate": True}, r"shared_gate=True: needs shared experts; set shared_intermediate_size"),
        ({"shared_intermediate_size": -1}, r"shared_intermediate_size=-1"),
    ],
)
def test_configuration_errors(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**wrong)


def test_section_errors() -> None:
    for build, message in (
        (lambda: RouterConfig(score="tanh"), "router.score='tanh'"),
        (lambda: BalanceConfig(scope="batch"), "balance.scope='batch': use one of global, micro, sequence"),
        (lambda: BalanceConfig(micro_batches=0), "balance.micro_batches=0"),
        (lambda: CapacityConfig(0.0), "capacity.factor=0.0"),
        (lambda: CapacityConfig(drop="last"), "capacity.drop='last'"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 12, dtype=torch.int64), r"x.dtype=torch.int64: must be a floating dtype"),
        (torch.zeros(3, 11), r"x.shape=\(3, 11\): the last dimension must be hidden_size=12"),
        (torch.zeros(()), r"x.shape=\(\)"),
    ],
)
def test_input_errors(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(x)


def test_mask_errors() -> None:
    for mask in (torch.ones(3), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask="):
            make()(torch.zeros(3, 12), mask)


def test_stats_before_the_first_forward() -> None:
    with pytest.raises(RuntimeError, match="no training forward yet"):
        _ = make().stats
