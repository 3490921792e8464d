"""Checks unusual steps: interrupted, of other lengths, with layers called twice, recomputed, copied or compiled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equimoe.moe import BalanceConfig, MoE, MoEConfig, Step, counting_pass, recompute, use_gradient_scaler
from equimoe.moe.balance.hooks import untraced
from tests.helpers import oracle

Run = Callable[..., Any]
HOW: dict[str, Run] = {
    "plain": lambda function, *args: function(*args),
    "non-reentrant": lambda function, *args: checkpoint(function, *args, use_reentrant=False),
    "reentrant": lambda function, *args: checkpoint(function, *args, use_reentrant=True),
    "recompute": recompute,
}


def make(**balance: Any) -> MoE:
    torch.manual_seed(0)
    config = BalanceConfig(**{"coefficient": 1.0, **balance})
    return MoE(MoEConfig(6, 8, 4, 2, balance=config, init_std=0.7)).double()


def batches(count: int, seed: int = 1) -> list[Tensor]:
    """Return batches of one shape but different domains, so that another batch's decision fits and is wrong."""
    generator = torch.Generator().manual_seed(seed)
    shape: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return [torch.randn(7, 6, **shape) + 2 * torch.randn(1, 6, **shape) for _ in range(count)]


def count(layer: MoE, inputs: list[Tensor]) -> None:
    with counting_pass():
        for x in inputs:
            layer(x)


def backward(layer: MoE, inputs: list[Tensor]) -> None:
    for x in inputs:
        (layer(x) * 0).sum().backward()


def whole(layer: MoE, inputs: list[Tensor]) -> Tensor:
    return torch.autograd.grad(oracle.balance_loss(layer, torch.cat(inputs)), layer.router.weight)[0]


def seen(layer: MoE) -> int:
    return len(layer.balancer.visits)


# ---- steps of other lengths, and interrupted steps ----------------------------------------------------------------


def test_exact_whatever_the_number_of_micro_batches() -> None:
    """The number of micro-batches is that of the counting pass, not that of the previous step."""
    layer = make(estimator="exact")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    for number in (4, 2, 3, 1):
        inputs = batches(number, seed=number)
        count(layer, inputs)
        backward(layer, inputs)
        assert oracle.relative_error(layer.router.weight.grad, whole(layer, inputs)) < 1e-12, number
        optimizer.step()
        optimizer.zero_grad()


def test_an_incomplete_step_weighs_as_configured() -> None:
    """If only two of four micro-batches are trained, each still has a weight of a quarter."""
    layer, inputs = make(micro_batches=4), batches(2)
    backward(layer, inputs)
    loss, counts_E = torch.zeros(()), torch.zeros(4, dtype=torch.float64)
    for n, x in enumerate(inputs, start=1):
        _, probs_TE, ids_TK, _ = oracle.route(layer, x)
        counts_E = counts_E + torch.bincount(ids_TK.flatten(), minlength=4)
        loss = loss + 4 * (counts_E / (2 * 7 * n) * probs_TE.mean(0)).sum() / 4
    want = torch.autograd.grad(loss, layer.router.weight)[0]
    assert oracle.relative_error(layer.router.weight.grad, want) < 1e-12


def count_and_fail(layer: MoE, inputs: list[Tensor]) -> None:
    with pytest.raises(KeyError), counting_pass():
        layer(inputs[0])
        raise KeyError


@pytest.mark.parametrize("given", [None, 2])
def test_counts_of_a_block_that_raised_are_not_those_of_what_is_trained_next(given: int | None) -> None:
    """The loop gives up counting, and trains other micro-batches."""
    layer, fresh = (make(micro_batches=given) for _ in range(2))
    inputs, used = batches(2, seed=9), []
    layer.router.register_forward_hook(lambda router, args, routing: used.append(routing.ids_TK))
    count_and_fail(layer, batches(2))
    assert seen(layer) == 0
    backward(layer, inputs)
    backward(fresh, inputs)
    assert all(torch.equal(oracle.route(fresh, x)[2], ids_TK) for x, ids_TK in zip(inputs, used[1:], strict=True))
    assert seen(layer) == 2 and torch.equal(layer.router.weight.grad, fresh.router.weight.grad)


def test_a_micro_batch_that_raised_leaves_no_counts_in_a_step_that_the_loop_drives() -> None:
    """Also while its output, and so its graph, is still held."""
    layer, fresh, held = make(), make(), []
    step = Step.of(layer)
    with pytest.raises(KeyError), step.micro_batch():
        held.append(layer(batches(1)[0]))
        raise KeyError
    assert seen(layer) == 0
    for own, steps in ((layer, step), (fresh, Step.of(fresh))):
        for x in batches(2, seed=9):
            with steps.micro_batch(1):
                (own(x) * 0).sum().backward()
            steps.end()
    assert held and torch.equal(layer.router.weight.grad, fresh.router.weight.grad)


BROKEN: dict[str, Callable[[MoE, list[Tensor]], None]] = {
    "while counting": count_and_fail,
    "in the first forward": lambda layer, inputs: [count(layer, inputs), layer(inputs[0])],
    "in the second forward": lambda layer, inputs: [
        count(layer, inputs),
        backward(layer, inputs[:1]),
        layer(inputs[1]),
    ],
    "after a backward": lambda layer, inputs: [count(layer, inputs), backward(layer, inputs[:2])],
}


@pytest.mark.parametrize("given", [None, 3])
@pytest.mark.parametrize("where", BROKEN)
def test_decisions_of_a_broken_step_are_not_taken_for_the_next(where: str, given: int | None) -> None:
    """Decisions of a counting pass that were not trained must not route other tokens."""
    layer = make(estimator="exact", micro_batches=given)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    BROKEN[where](layer, batches(3))
    optimizer.zero_grad()
    inputs = batches(3, seed=9)
    count(layer, inputs)
    for x in inputs:
        fresh = oracle.route(layer, x)[2]
        (layer(x) * 0).sum().backward()
        used = next(m for m in reversed(layer.balancer.visits) if m.done).decision.chosen_TK
        assert torch.equal(used.sort().values, fresh.sort().values)
    assert oracle.relative_error(layer.router.weight.grad, whole(layer, inputs)) < 1e-12
    optimizer.step()
    optimizer.zero_grad()
    count(layer, inputs)
    backward(layer, inputs)
    assert seen(layer) == 3
    assert oracle.relative_error(layer.router.weight.grad, whole(layer, inputs)) < 1e-12


@pytest.mark.parametrize("given", [None, 2])
def test_gradients_cleared_between_counting_and_training(given: int | None) -> None:
    """The skipped step's visits still exist while the next step is counted ahead."""
    layer = make(estimator="exact", micro_batches=given)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    for seed in (1, 2, 3):
        inputs = batches(2, seed)
        count(layer, inputs)
        counted = [visit.number for visit in layer.balancer.visits[-2:]]
        optimizer.zero_grad()
        backward(layer, inputs)
        assert [visit.number for visit in layer.balancer.visits] == counted
        assert oracle.relative_error(layer.router.weight.grad, whole(layer, inputs)) < 1e-12


@pytest.mark.parametrize("updated", [True, False])
def test_a_forward_without_backward_goes_with_the_step_that_is_broken_off(updated: bool) -> None:
    """Before the first update, an optimizer of copies may have taken the gradients, so an update is refused."""
    layer, fresh = make(micro_batches=2), make(micro_batches=2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    first, inputs = batches(2), batches(2, seed=9)
    if updated:
        backward(layer, first)
        optimizer.step()
        optimizer.zero_grad()
    backward(layer, first[:1])
    layer(first[1])
    layer.zero_grad()
    backward(layer, inputs)
    backward(fresh, inputs)
    same = torch.equal(layer.router.weight.grad, fresh.router.weight.grad)
    assert (seen(layer), same) == ((2, True) if updated else (1, False))
    with nullcontext() if updated else pytest.raises(ValueError, match="if a step was broken off, drive the steps"):
        optimizer.step()


def test_forwards_that_are_never_trained_on_take_no_memory() -> None:
    layer = make()
    for x in batches(4):
        layer(x)
    assert len(layer.balancer.layer.visits) == 1


def test_a_recomputation_that_fails() -> None:
    """After an error in a recomputation, the next tokens must be routed by the router."""
    layer, plain = make(coefficient=0.0), make(coefficient=0.0)
    first, second = batches(2)

    def fails(x: Tensor) -> Tensor:
        y = layer(x)
        if torch.is_grad_enabled():
            raise KeyError
        return y

    with pytest.raises(KeyError):
        checkpoint(fails, first.requires_grad_(), use_reentrant=True).sum().backward()
    layer.zero_grad()
    checkpoint(layer, second.clone().requires_grad_(), use_reentrant=True).square().sum().backward()
    plain(second).square().sum().backward()
    assert_same_gradients(layer, plain)


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler_that_skips_does_not_move_the_bias(fused: bool) -> None:
    """On overflow, a fused optimizer is called too, and told to do nothing."""
    layer = make(bias_update_rate=0.01).float()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    use_gradient_scaler(layer, scaler)
    moved = []
    for factor in (1.0, torch.inf, 1.0):
        before, weight = layer.router.bias_E.clone(), layer.router.weight.detach().clone()
        scaler.scale(factor * layer(batches(1)[0].float()).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert seen(layer) == (0 if fused or factor == 1.0 else 1)
        moved.append(bool((layer.router.bias_E != before).any()))
        assert moved[-1] == (not torch.equal(layer.router.weight, weight))
    assert moved == [True, False, True]


# ---- layers that run several times, and recomputation -------------------------------------------------------------


def assert_same_gradients(one: nn.Module, two: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or oracle.relative_error(p.grad, q.grad) < 1e-12, name


@pytest.mark.parametrize("given", [None, 4])
def test_a_layer_that_runs_twice_in_a_forward(given: int | None) -> None:
    """Each run of the layer is a micro-batch: two forwards of the model are four of the layer."""
    layer, inputs = make(estimator="exact", micro_batches=given), batches(4)
    with counting_pass():
        for x in inputs:
            layer(x)
    for one, two in (inputs[:2], inputs[2:]):
        ((layer(one) + layer(two)) * 0).sum().backward()
    assert oracle.relative_error(layer.router.weight.grad, whole(layer, inputs)) < 1e-12


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant", "recompute"])
def test_a_layer_that_runs_twice_in_a_recomputed_region(kind: str, after: bool) -> None:
    """With ``after``, a later module is recomputed first, before the backward has read the layer's visit."""
    results = []
    for run in (HOW["plain"], HOW[kind]):
        torch.manual_seed(0)
        model = nn.ModuleList([make(), nn.Linear(6, 6).double() if after else nn.Identity()])

        def region(x: Tensor, y: Tensor, model: nn.ModuleList = model) -> Tensor:
            return model[1](model[0](x).tanh() + 2 * model[0](y).tanh())

        run(region, *(x.requires_grad_() for x in batches(2))).square().sum().backward()
        assert seen(model[0]) == 2
        results.append(model)
    assert_same_gradients(*results)


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant", "recompute"])
def test_several_micro_batches_in_one_backward(kind: str) -> None:
    """Each micro-batch must keep its own routing. There is no balance loss, because reentrant checkpointing counts in
    the backward, with other loads."""
    results = []
    for run in (HOW["plain"], HOW[kind]):
        model = nn.Sequential(make(coefficient=0.0), nn.Tanh(), nn.Linear(6, 6).double())
        torch.manual_seed(0)
        nn.init.normal_(model[2].weight)
        outs = [run(model, x.requires_grad_()).square().sum() for x in batches(3)]
        (outs[0] + 2 * outs[1] + 3 * outs[2]).backward()
        assert seen(model[0]) == 3
        results.append(model)
    assert_same_gradients(*results)


def test_our_recomputation_repeats_each_of_several_decisions() -> None:
    """Decisions are repeated even if the router would now choose other experts."""
    layer, found = make(coefficient=0.0), []
    layer.router.register_forward_hook(lambda router, args, routing: found.append(str(routing.ids_TK.tolist())))
    outs = [recompute(layer, x.requires_grad_()).square().sum() for x in batches(3)]
    layer.router.weight.data = -layer.router.weight.data
    sum(outs).backward()
    assert len(set(found[:3])) == 3 and sorted(found[:3]) == sorted(found[3:])


@pytest.mark.parametrize("inner", ["non-reentrant", "recompute"])
@pytest.mark.parametrize("outer", ["non-reentrant", "reentrant", "recompute"])
def test_nested_recomputation(outer: str, inner: str) -> None:
    """Checkpointing is nested: around each layer, and around the whole model."""
    results = []
    for kinds in (("plain", "plain"), (outer, inner)):
        layers = nn.ModuleList([make(coefficient=0.1), make(coefficient=0.1)])

        def model(x: Tensor, layers: nn.ModuleList = layers, run: Run = HOW[kinds[1]]) -> Tensor:
            for layer in layers:
                x = x + run(lambda x, layer=layer: layer(x.tanh()).tanh(), x).tanh()
            return x

        outs = [HOW[kinds[0]](model, x.requires_grad_()) for x in batches(1 if outer == "reentrant" else 3)]
        sum(out.square().sum() for out in outs).backward()
        assert [seen(layer) for layer in layers] == [len(outs)] * 2
        results.append(layers)
    assert_same_gradients(*results)


# ---- copies, frozen routers, compiled layers ----------------------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_in_the_middle_of_a_step(clone: Callable[[MoE], MoE]) -> None:
    layer = make(bias_update_rate=0.01)
    optimizer, inputs = torch.optim.SGD(layer.parameters(), lr=0.1), batches(2)
    backward(layer, inputs)
    twin = clone(layer)
    assert seen(twin) == 0 and seen(layer) == 2
    with pytest.raises(RuntimeError, match="no training forward yet"):
        _ = twin.stats
    backward(twin, inputs)
    optimizer.step()  # the other model's
    assert seen(layer) == 0 and bool(layer.router.bias_E.any())
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert seen(twin) == 0 and torch.equal(twin.router.bias_E, layer.router.bias_E)


@pytest.mark.parametrize("listed", [True, False])
def test_a_frozen_router(listed: bool) -> None:
    """The step must end and the bias must move, whether or not the optimizer lists the frozen weight."""
    layer = make(bias_update_rate=0.01)
    layer.router.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if listed or p.requires_grad], lr=0.1)
    for step in range(1, 3):
        for x in batches(2):
            layer(x).sum().backward()
        assert seen(layer) == 2 and layer.router.weight.grad is None
        optimizer.step()
        optimizer.zero_grad()
        assert seen(layer) == 0
        assert float(layer.router.bias_E.abs().max()) == pytest.approx(0.01 * step)


def test_two_backwards_through_one_forward_of_a_frozen_layer() -> None:
    """Modules before the layer get the balance loss's gradient once."""
    before, layer = nn.Linear(6, 6).double(), make().requires_grad_(False)
    loss = (layer(before(batches(1)[0])) * 0).sum()
    loss.backward(retain_graph=True)
    once = before.weight.grad.clone()
    loss.backward()
    assert bool(once.any()) and torch.equal(before.weight.grad, once)


def test_bias_loaded_from_a_checkpoint_in_bf16_is_fp32() -> None:
    layer = make(bias_update_rate=0.001)
    state = {name: value.bfloat16() for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.router.weight.dtype == torch.bfloat16 and layer.router.bias_E.dtype == torch.float32


def test_generation_in_training_mode_leaves_no_trace() -> None:
    layer, inputs = make(), batches(2)
    backward(layer, inputs[:1])
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            layer(inputs[1])
    assert seen(layer) == 1


def test_compiled() -> None:
    """Every backward must read the counts of its own step, not those of the first trace."""
    models = [nn.Sequential(nn.Linear(6, 6).double(), make(bias_update_rate=0.01)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    dispatcher = models[1][1].dispatcher  # slow to trace, and not tested here
    dispatcher.send, dispatcher.finish = map(torch.compiler.disable, (dispatcher.send, dispatcher.finish))
    compiled = torch.compile(models[1], backend="eager")
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in models]
    for step in range(2):
        for x in batches(2, seed=step):
            for run in (models[0], compiled):
                run(x).square().sum().backward()
        assert_same_gradients(*models)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    biases = [model[1].router.bias_E for model in models]
    assert torch.equal(*biases) and bool(biases[0].any())
    torch.compiler.reset()  # it keeps the layers for whatever runs next


def test_what_is_untraced_reaches_no_limit_of_recompilations() -> None:
    sums: list[float] = []

    def run(x: Tensor, *more: Tensor) -> Tensor:
        assert not torch.compiler.is_compiling()
        sums.append(x.sum().item())  # torch.compile cannot trace this into a graph
        return x + len(more)

    first, second = untraced()(lambda x, *more: run(x, *more)), untraced()(run)
    compiled = torch.compile(lambda x, *more: second(first(x, *more) * 2, *more) * 2, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        for number in range(4):
            x = torch.ones(2 + number)
            assert torch.equal(compiled(x, *[x] * number), 4 * x + 6 * number)
    assert sums == [value for n in range(4) for value in (2.0 + n, (2 + 2 * n) * (2.0 + n))]
    torch.compiler.reset()
