"""A layer under torch.compile(fullgraph=True): the same outputs, gradients and counts as without, and no graph break.

B sequences, S tokens, D hidden.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equimoe.moe import (
    BalanceConfig,
    CapacityConfig,
    ExtraLossConfig,
    MoE,
    MoEConfig,
    RouterConfig,
    Step,
    ZeroComputationConfig,
    recompute,
)
from equimoe.moe.experts import LoRAExperts, ShardedLoRAExperts, SwiGLU
from equimoe.moe.model import Decoder, attend
from equimoe.moe.model.documents import Documents, document_starts
from tests.helpers.slow import slow_but

Call = Callable[..., Tensor]
B, S, D, MICRO_BATCHES = 3, 10, 16, 2
BASE = MoEConfig(hidden_size=D, intermediate_size=24, num_experts=8, top_k=2)
EXTRA = ExtraLossConfig(micro=0.01, sequence=0.01, data_parallel=0.01, device=0.01, communication=0.01)
CASES: dict[str, MoEConfig] = {
    "plain": BASE,
    "all together": replace(
        BASE,
        shared_intermediate_size=16,
        shared_gate=True,
        capacity=CapacityConfig(),
        router=RouterConfig(score="sigmoid", z_loss=0.01, entropy_loss=0.01, groups=4, kept_groups=2),
        balance=BalanceConfig(bias_update_rate=0.01, extra=EXTRA),
    ),
    "carry": replace(BASE, balance=BalanceConfig(estimator="carry")),
    "exact": replace(BASE, balance=BalanceConfig(estimator="exact")),
    "first choices": replace(BASE, balance=BalanceConfig(counts="first")),
    "not gated, recomputed": replace(BASE, gated=False, activation="relu2", recompute_experts=True),
    "capacity by position": replace(BASE, capacity=CapacityConfig(drop="position", scope="sequence")),
    "capacity of devices": replace(BASE, capacity=CapacityConfig(level="device")),
    "zero computation": replace(BASE, zero_computation=ZeroComputationConfig(zero=1, copy=1, constant=1)),
    "unequal": replace(BASE, intermediate_size=16, widths="8,8,8,16,16,24,24,24"),
    "expert choice": replace(
        BASE,
        router=RouterConfig(select="expert_choice", normalize_weights=False),
        balance=BalanceConfig(coefficient=0.0),
    ),
    "assigned on the host": replace(
        BASE,
        top_k=1,
        router=RouterConfig(select="base", score="sigmoid", normalize_weights=False),
        balance=BalanceConfig(coefficient=0.0),
    ),
}
FAST = ["all together"]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()  # it keeps the layers for whatever runs next


def twins(config: MoEConfig, dtype: torch.dtype = torch.float32) -> tuple[MoE, MoE]:
    torch.manual_seed(0)
    layer = MoE(config).to(dtype)
    return layer, copy.deepcopy(layer)


def compiled(module: nn.Module, backend: str = "aot_eager") -> Call:
    return torch.compile(module, fullgraph=True, backend=backend)


def batches(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(1)
    x = [torch.randn(B, S, D, dtype=dtype) for _ in range(MICRO_BATCHES)]
    return x, torch.rand(B, S) > 0.2


def train(layer: MoE, call: Call, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Train two steps, and return outputs, gradients, counts, biases and statistics."""
    (inputs, mask), step, found = batches(dtype), Step.of(layer), list[Tensor]()
    for _ in range(2):
        step.begin(MICRO_BATCHES, MICRO_BATCHES * int(mask.sum()))
        if layer.config.balance.estimator == "exact":
            for m, x in enumerate(inputs):
                with step.micro_batch(m, ahead=True), torch.no_grad():
                    call(x, mask)
        for m, x in enumerate(inputs):
            x = x.clone().requires_grad_()
            with step.micro_batch(m):
                y = call(x, mask)
                y.square().sum().backward()
            found += [y.detach(), x.grad]  # type: ignore[list-item]
        step.end()
        found += [p.grad for p in layer.parameters() if p.grad is not None]
        totals = layer.balancer.previous_step
        assert totals is not None and totals.micro_batches == MICRO_BATCHES
        found += [totals.counts_E, totals.local_prob_sums_ME, *(b.clone() for b in layer.buffers())]
        found += [layer.stats.counts, layer.stats.dropped_choices, torch.tensor(list(layer.stats.losses.values()))]
        layer.zero_grad()
    return found


def assert_same(found: list[Tensor], wanted: list[Tensor], **tolerance: Any) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("name", slow_but(FAST, ["plain", *FAST]))
def test_evaluation_is_one_graph(name: str) -> None:
    plain, other = (layer.eval() for layer in twins(CASES[name]))
    call, (inputs, mask) = compiled(other), batches()
    for x in inputs:
        with torch.no_grad():
            assert_same([call(x, mask)], [plain(x, mask)])
    assert other.balancer.visits == []


@pytest.mark.parametrize("name", slow_but([*FAST, "assigned on the host"], list(CASES)))
def test_training_with_a_step_is_one_graph(name: str) -> None:
    plain, other = twins(CASES[name])
    assert_same(train(other, compiled(other)), train(plain, plain))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LoRAExperts, ShardedLoRAExperts])
def test_experts_of_low_rank_are_one_graph(kind: type[LoRAExperts]) -> None:
    plain = MoE(BASE)
    plain.experts = kind(SwiGLU(D, 24, 0.1), 8, rank=4, alpha=8.0)
    other = copy.deepcopy(plain)
    assert_same(train(other, compiled(other)), train(plain, plain))


@pytest.mark.slow
def test_layers_with_dynamic_shapes_are_one_graph() -> None:
    config = replace(BASE, router=RouterConfig(score="sigmoid"))
    plain = nn.Sequential(MoE(config), MoE(config))
    other, found = copy.deepcopy(plain), []
    for model, call in (
        (plain, plain),
        (other, torch.compile(other, fullgraph=True, backend="aot_eager", dynamic=True)),
    ):
        torch.manual_seed(1)
        step = Step.of(model)
        for length in (S, 7):
            with step.micro_batch():
                call(torch.randn(B, length, D)).square().sum().backward()
        step.end()
        found.append([p.grad for p in model.parameters()])
    assert_same(found[1], found[0])


@pytest.mark.slow
def test_autocast() -> None:
    plain, other = twins(BASE)

    def under(call: Call) -> Call:
        def run(*args: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return call(*args)

        return run

    assert_same(train(other, under(compiled(other))), train(plain, under(plain)), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for a CPU")
def test_inductor() -> None:
    plain, other = twins(CASES["all together"])
    assert_same(train(other, compiled(other, "inductor")), train(plain, plain))


def test_what_was_dropped_is_not_counted() -> None:
    """A forward whose graph has gone without a backward does not count; neither does a copy count for its original."""
    layer, other = twins(BASE)
    call, ((x, _), _) = compiled(layer), batches()
    step = Step.of(layer)
    step.begin()
    with step.micro_batch(0):
        call(x)
    with step.micro_batch(1):
        call(x).sum().backward()
    assert [visit.number for visit in layer.balancer.visits] == [1] and other.balancer.visits == []
    step.end()


def test_a_late_backward_is_refused() -> None:
    layer, _ = twins(BASE)
    call, ((x, _), _) = compiled(layer), batches()
    step = Step.of(layer)
    with step.micro_batch():
        y = call(x)
    step.discard()
    with pytest.raises(ValueError, match="comes too late"):
        y.sum().backward()
    with pytest.raises(ValueError, match="outside of a micro-batch"):
        call(x)


def test_recomputation_counts_once() -> None:
    plain, other = twins(BASE)

    def again(call: Call) -> Call:
        return lambda *args: checkpoint(call, *args, use_reentrant=False)

    assert_same(train(other, again(compiled(other))), train(plain, again(plain)))


def decoder(**how: Any) -> Decoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 20, "seq_len": S, "num_heads": 2, "intermediate_size": 24}
    return Decoder(**sizes | {"num_layers": 3, "moe": CASES["all together"], "dense_layers": 1} | how)


@pytest.mark.parametrize(
    ("training", "packed"), slow_but([(False, True)], [(False, False), (False, True), (True, False), (True, True)])
)
def test_a_decoder_is_one_graph(training: bool, packed: bool) -> None:
    plain = decoder()
    other = copy.deepcopy(plain)
    ids, mask = torch.randint(20, (B, S)), batches()[1]
    starts = document_starts(ids // 8) if packed else None
    found = []
    for model, call in ((plain, plain), (other, compiled(other))):
        model.train(training)
        if not training:
            with torch.no_grad():
                found.append([call(ids, mask, starts)])
            continue
        step = Step.of(model)
        step.begin(1, int(mask.sum()))
        with step.micro_batch():
            y = call(ids, mask, starts)
            y.square().mean().backward()
        step.end()
        found.append([y.detach(), *(p.grad for p in model.parameters())])
    assert_same(found[1], found[0])


@pytest.mark.slow
def test_a_mask_by_blocks_is_made_in_a_graph() -> None:
    """On a CPU, FlexAttention itself has no backward."""
    q, k, v = torch.randn(3, B, 2, S, 16).unbind(0)
    starts = document_starts(torch.randint(3, (B, S)))

    def blocks(*qkv: Tensor) -> Tensor:
        return attend.by_blocks(*qkv, Documents(starts), window=4)

    found = torch.compile(blocks, fullgraph=True, backend="aot_eager")(q, k, v)
    assert_same([found], [attend.reference(q, k, v, Documents(starts), 4)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("recomputes", "remedy"),
    [(False, r"step = Step\.of\(model\)"), (True, "do not recompute .* or leave out fullgraph=True")],
)
def test_what_cannot_be_in_a_graph_names_the_remedy(recomputes: bool, remedy: str) -> None:
    layer = MoE(BASE)
    call = partial(recompute, layer) if recomputes else layer
    with pytest.raises(torch._dynamo.exc.Unsupported, match=remedy):
        torch.compile(call, fullgraph=True, backend="eager")(batches()[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", [False, True])
def test_otherwise_the_graph_breaks_there(recomputes: bool) -> None:
    """In evaluation, a decoder recomputes nothing and is one graph."""
    plain = decoder(num_layers=1, dense_layers=0, moe=BASE, recompute_blocks=recomputes)
    other, ids, found = copy.deepcopy(plain), torch.randint(20, (B, S)), []
    with torch.no_grad():
        assert_same([compiled(other.eval())(ids)], [plain.eval()(ids)])
    for model, call in ((plain, plain), (other, torch.compile(other, backend="aot_eager"))):
        model.train()
        y = call(ids)
        y.square().mean().backward()
        found.append([y.detach(), *(p.grad for p in model.parameters())])
    assert_same(found[1], found[0])
