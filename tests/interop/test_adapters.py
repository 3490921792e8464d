"""Blocks of a user's own are swapped by an adapter; what cannot be swapped is refused by name."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F

from equimoe.moe import BalanceConfig, MoE, MoEConfig, RouterConfig
from equimoe.moe.interop import ADAPTERS, Adapter, SwappedMoE, swap, unswap
from tests.helpers.fork import run_ranks

E, K, D, WIDTH = 4, 2, 8, 12
OFF = BalanceConfig(coefficient=0.0)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, WIDTH, bias=False), nn.Linear(D, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.ModuleList):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self):
            token, choice = torch.where(ids == i)
            y = y.index_add(0, token, expert(x[token]) * weights[token, choice, None])
        return y


class Gate(nn.Linear):
    """A router that a user may have written: noisy, and with scores of its own."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        weights, ids = (logits + 0.1 * torch.randn_like(logits)).sigmoid().topk(K)
        return logits, weights, ids


class Block(nn.Module):
    """With ``config`` and ``router``, two names that the layer uses too."""

    def __init__(self, router: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.config, self.top_k = "mine", K
        self.choose = router(D, E)
        self.experts = Experts(Expert() for _ in range(E))
        self.shared = Expert()

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, D)
        if isinstance(self.choose, Gate):
            _, weights, ids = self.choose(x_TD)
        else:
            weights, ids = self.choose(x_TD).topk(K)
            weights = weights.softmax(-1)
        return (self.experts(x_TD, ids, weights) + self.shared(x_TD)).view(x.shape)


class Model(nn.Module):
    def __init__(self, router: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block = nn.Linear(D, D), Block(router)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.block(self.first(x), **kwargs)


def stacked(block: Any) -> tuple[Tensor, Tensor]:
    gate_up = torch.stack([torch.cat([expert.gate.weight, expert.up.weight]) for expert in block.experts])
    return gate_up, torch.stack([expert.down.weight for expert in block.experts])


STACKED = Adapter(
    routing=lambda block, config: (block.top_k, RouterConfig(softmax_after_topk=True)),
    router="choose",
    weights=stacked,
    shared=lambda block, x: block.shared(x),
)
CALLED = replace(STACKED, weights=None, activation=lambda block, config: None)


def gradients(model: nn.Module, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    x = torch.randn(2, 5, D)
    model.zero_grad()
    y = model(x, **kwargs)
    y.square().sum().backward()
    return y, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("router", "adapter"),
    [
        (nn.Linear, STACKED),
        (nn.Linear, CALLED),
        (Gate, replace(STACKED, own_router=True)),
        (Gate, replace(CALLED, own_router=True)),
    ],
    ids=["stacked", "called", "stacked, own router", "called, own router"],
)
def test_a_block_of_ones_own(router: type[nn.Linear], adapter: Adapter) -> None:
    model = Model(router)
    names = list(model.state_dict())
    expected, right = gradients(model)
    swap(model, OFF, adapters={Block: adapter})
    y, found = gradients(model)
    torch.testing.assert_close(y, expected)
    assert found.keys() == right.keys() and list(model.state_dict()) == names
    for name, grad in right.items():
        torch.testing.assert_close(found[name], grad)
    assert int(model.block.stats.counts.sum()) == 10 * K
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2:] = False
    y, _ = gradients(model, mask=mask)
    torch.testing.assert_close(y, expected)
    assert int(model.block.stats.counts.sum()) == 7 * K
    unswap(model)
    assert type(model.block) is Block and model.block.config == "mine" and not hasattr(model.block, "balancer")
    assert torch.equal(gradients(model)[0], expected)


@pytest.mark.parametrize("adapter", [STACKED, CALLED])
def test_a_swapped_model_is_freed_without_garbage_collection(adapter: Adapter) -> None:
    """A layer that still lives would check the updates of other models."""
    gc.disable()
    try:
        model = swap(WithAttention(hands_on=True), adapters={Block: adapter})
        model(torch.randn(2, 6, D), torch.ones(2, 6, dtype=torch.long)).sum().backward()
        balancers = [weakref.ref(layer.mlp.balancer) for layer in model.layers]  # type: ignore[union-attr]
        del model
        assert [balancer() for balancer in balancers] == [None, None]
    finally:
        gc.enable()


class Attention(nn.Module):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        assert not kwargs, kwargs
        return x


class Layer(nn.Module):
    def __init__(self, hands_on: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.hands_on = Attention(), Block(), hands_on

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        x = self.self_attn(x, **kwargs) if self.hands_on else self.self_attn(x)
        return self.mlp(x) if mask is None else self.mlp(x, mask)


class WithAttention(nn.Module):
    def __init__(self, hands_on: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(hands_on), Layer(hands_on)])

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, **kwargs)
        return x


def test_the_mask_comes_with_the_keyword_arguments() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    x = torch.randn(2, 6, D)
    model = swap(WithAttention(hands_on=True), adapters={Block: STACKED})
    for layer in model.layers:  # type: ignore[union-attr]
        for given, tokens in ((mask, 8), (None, 12), (torch.ones(2, 1, 6, 6), 12)):
            model(x, given)
            assert int(layer.mlp.stats.tokens) == tokens
    model(x[:, -1:], mask)  # as with a cache
    assert int(model.layers[0].mlp.stats.tokens) == 0  # type: ignore[union-attr, index]


@pytest.mark.parametrize("shared", ["block", "layer"])
def test_the_mask_comes_to_every_place_of_a_block(shared: str) -> None:
    mask, x = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]), torch.randn(2, 6, D)
    model = WithAttention(hands_on=True)
    if shared == "block":
        model.layers[1].mlp = model.layers[0].mlp
    else:
        model.layers[1] = model.layers[0]
    swap(model, adapters={Block: STACKED})
    y = model(x, mask)
    visits = model.layers[0].mlp.balancer.visits  # type: ignore[union-attr]
    assert [int(visit.tokens_B.sum()) for visit in visits] == [8, 8] and y.requires_grad
    del y, visits
    unswap(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_mask_that_gets_lost_is_an_error() -> None:
    mask, x = torch.ones(2, 6, dtype=torch.long), torch.randn(2, 6, D)
    model = swap(WithAttention(hands_on=False), adapters={Block: STACKED})
    with pytest.raises(ValueError, match=r"^attention_mask: it does not reach Block, .* 'self_attn'; call .* mask="):
        model(x, mask)
    model(x, mask, mask=mask.bool())
    model = swap(WithAttention(hands_on=False), adapters={Block: replace(STACKED, attention=None)})
    model(x, mask)


def test_swapped_blocks_are_layers_and_are_refused_a_second_time() -> None:
    model = swap(Model(), adapters={Block: STACKED})
    assert isinstance(model.block, SwappedMoE) and isinstance(model.block, Block) and isinstance(model.block, MoE)
    with pytest.raises(ValueError, match="^swap: block is a layer of this package already; call swap once$"):
        swap(model, adapters={Block: STACKED})
    unswap(model)
    with pytest.raises(ValueError, match="^unswap: Model is not swapped; call swap first$"):
        unswap(model)
    with pytest.raises(ValueError, match="^swap: block is a layer of this package already"):
        swap(nn.ModuleDict({"block": MoE(MoEConfig(D, WIDTH, E, K))}))


def test_a_wrapped_block_is_not_unswapped() -> None:
    model = swap(Model(), adapters={Block: STACKED})
    model.block.__class__ = type("Wrapped", (type(model.block),), {})
    with pytest.raises(ValueError, match="^unswap: a wrapper has made a Wrapped of a block; unwrap the model first$"):
        unswap(model)


@pytest.mark.parametrize(
    ("build", "adapters", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "swap: no MoE block in Sequential is known; known are Deepseek"),
        (Model, {}, r"swap: the MoE block Block of Model is known; known are .*; describe others: adapters="),
        (Model, {Block: replace(STACKED, router="gate")}, r"swap: block \(Block\) has no submodule 'gate'"),
        (
            Model,
            {Block: replace(STACKED, router="experts")},
            r"swap: the router block.experts .* has no weight",
        ),
        (
            Model,
            {Block: replace(STACKED, weights=None)},
            r"swap: the experts of block .* have gate_up_proj None",
        ),
        (
            Model,
            {Block: replace(STACKED, weights=lambda block: stacked(block)[::-1])},
            r"gate_up_proj \[4, 8, 12\] and down_proj \[4, 24, 8\] instead of floating-point \[4, 2F, 8\]",
        ),
        (
            Model,
            {Block: replace(STACKED, refused=("top_k",))},
            "block.top_k=2: this layer adds no noise",
        ),
        (
            Model,
            {Block: replace(STACKED, routing=lambda block, config: (9, RouterConfig()))},
            "top_k=9: must be at most num_experts=4",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(build: Any, adapters: Any, message: str) -> None:
    model = build()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="^" * message.startswith("swap") + message):
        swap(model, adapters=adapters)
    assert [type(module) for module in model.modules()] == classes


def test_a_bias_needs_a_place_and_a_replaced_forward_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^balance.bias_update_rate=0.1: Block has no expert bias, .* use 0$"):
        swap(Model(), BalanceConfig(bias_update_rate=0.1), adapters={Block: STACKED})
    model = Model()
    model.block.experts.forward = model.block.experts.forward
    with pytest.raises(ValueError, match="^swap: another library has replaced the forward of Experts in block; call"):
        swap(model, adapters={Block: STACKED})


def test_weights_that_are_split_over_ranks_are_refused() -> None:
    def rank_main(rank: int, world: int) -> str:
        mesh, model = torch.distributed.init_device_mesh("cpu", (world,)), Model()
        model.block.shared = parallelize_module(model.block.shared, mesh, {"up": ColwiseParallel()})
        with pytest.raises(ValueError, match="^swap: block.shared.up.weight is split over ranks; load without tp_plan"):
            swap(model, adapters={Block: STACKED})
        return "refused"

    assert run_ranks(rank_main, 2) == ["refused"] * 2


def test_a_group_says_which_ranks_hold_different_tokens() -> None:
    def rank_main(rank: int, world: int) -> int:
        groups = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2])]
        model = swap(Model(), OFF, adapters={Block: STACKED}, group=groups[rank // 2])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradients(model)
        optimizer.step()
        totals = model.block.balancer.previous_step
        return int(totals.tokens)

    assert run_ranks(rank_main, 3) == [20, 20, 10]


@pytest.mark.engines
def test_the_adapters_are_named_by_classes_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="needs Transformers, which `make engines` installs")
    modules = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "granitemoe", "phimoe"]
    found = {
        name
        for module in [*modules, "gpt_oss"]
        for name in dir(getattr(getattr(transformers.models, module), f"modeling_{module}"))
    }
    assert ADAPTERS.keys() <= found
