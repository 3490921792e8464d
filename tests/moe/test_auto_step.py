"""Checks where an optimizer step begins and ends, for several micro-batches in one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from equimoe.moe import MoE, Placement, counting_pass
from tests.helpers import oracle
from tests.helpers.one_layer import balance_only, batches, make, seen


@pytest.mark.parametrize("given", [None, 3])
def test_counts_accumulate_and_start_anew_with_the_optimizer(given: int | None) -> None:
    layer = make(micro_batches=given)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        for x in batches(3):
            balance_only(layer, x)
        assert seen(layer) == [5, 8, 11]
        optimizer.step()
        optimizer.zero_grad()
        assert seen(layer) == []
        assert layer.balancer.previous_step.micro_batches == 3
        assert int(layer.balancer.previous_step.tokens) == 24


@pytest.mark.parametrize("given", [None, 2])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_skipped_step_ends_the_step(steps_before: int, given: int | None) -> None:
    """On overflow, a gradient scaler's step is followed by zero_grad without an update."""
    layer = make(micro_batches=given)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(steps_before):
        for x in batches(2):
            balance_only(layer, x)
        optimizer.step()
        optimizer.zero_grad()
    for x in batches(2):
        balance_only(layer, x)
    optimizer.zero_grad()  # skipped
    balance_only(layer, torch.randn(4, 6))
    assert seen(layer) == [4]


@pytest.mark.parametrize(("given", "refused"), [(2, "one after 2 more"), (3, "one after 1 more"), (4, "")])
def test_micro_batches_is_how_often_the_layer_runs(given: int, refused: str) -> None:
    """A layer that runs twice in each of two forwards has four micro-batches, and two backward passes."""
    layer = make(micro_batches=given)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        sum(layer(x).sum() for x in batches(2)).backward()
    message = f"micro_batches={given}: no update came after that many training forwards of the layer, but {refused}; "
    with pytest.raises(ValueError, match=message) if refused else nullcontext():
        optimizer.step()
    assert refused or layer.balancer.previous_step.micro_batches == 4


def test_a_step_shorter_than_told_is_warned_of() -> None:
    layer = make(micro_batches=4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    for length in (4, 1):
        for x in batches(length):
            balance_only(layer, x)
        told = pytest.warns(UserWarning, match="4 micro-batches were announced, but this step has 1, .* 1/4")
        with told if length < 4 else nullcontext():
            optimizer.step()
        optimizer.zero_grad()


def test_twice_as_many_micro_batches_as_told_are_no_two_steps() -> None:
    """Unless the gradients of the first one are cleared, before or after the next forward."""
    layer, inputs = make(micro_batches=2), batches(2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for cleared in ("before", "after", ""):
        for x in inputs:
            balance_only(layer, x)
        if cleared == "before":
            layer.zero_grad()
        loss = layer(inputs[0]).sum()
        if cleared == "after":
            layer.zero_grad()
        loss.backward()
        balance_only(layer, inputs[1])
        if cleared:
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(ValueError, match="=2: no update came after .* but one after 2 more; if a step was broken off"):
        optimizer.step()


def test_a_step_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are kept, and no optimizer steps that holds the router."""
    monkeypatch.setattr("equimoe.moe.balance.auto.MAX_VISITS", 3)
    layer = make()
    for x in batches(3):
        balance_only(layer, x)
    with pytest.raises(
        ValueError, match=r"after 3 training forwards of the layer; set balance.micro_batches to the la"
    ):
        layer(batches(1)[0])


def test_gradients_that_an_engine_takes_away_are_no_skipped_step() -> None:
    """An engine moves param.grad to its main gradients after every micro-batch; the step must go on."""
    layer = make()
    layer.router.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for x in batches(3):
        balance_only(layer, x)
    assert seen(layer) == [5, 8, 11]


def test_zero_grad_between_forward_and_backward_keeps_the_micro_batch() -> None:
    layer = make()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        loss = (layer(torch.randn(4, 6)) * 0).sum()
        optimizer.zero_grad()
        loss.backward()
        assert seen(layer) == [4]
        optimizer.step()


def test_another_models_optimizer_changes_nothing() -> None:
    layer, other = make(), torch.nn.Linear(2, 2)
    own, foreign = (torch.optim.SGD(module.parameters(), lr=0.1) for module in (layer, other))
    balance_only(layer, torch.randn(4, 6))
    own.step()
    balance_only(layer, torch.randn(4, 6))
    foreign.step()
    assert seen(layer) == [4]
    own.step()
    assert seen(layer) == []


MASTERS: dict[str, Callable[[MoE], list[torch.Tensor]]] = {
    "one by one": lambda layer: [p.detach().clone() for p in layer.parameters()],
    "one by one, as parameters": lambda layer: [torch.nn.Parameter(p.detach().clone()) for p in layer.parameters()],
    "only the router's": lambda layer: [layer.router.weight.detach().clone()],
    "flat": lambda layer: [torch.cat([p.detach().flatten() for p in layer.parameters()])],
    "a rank's part of a flat buffer": lambda layer: [layer.router.weight.detach().flatten()[:1].clone()],
}


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("kind", MASTERS)
def test_master_weights_in_a_wrapper_are_refused(kind: str, taken: bool) -> None:
    """Also if the wrapper takes the gradients away after each backward, as ZeRO 2 does, which looks as if updates were
    skipped. With a given number of micro-batches, or a step that the loop drives, they are accepted."""
    layer = make()
    masters = MASTERS[kind](layer)
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.SGD(masters, lr=0.1)
    for x in batches(2):
        balance_only(layer, x)
        if taken:
            layer.zero_grad()
    with pytest.raises(ValueError, match=r"SGD: .* perhaps copies .*set balance.micro_batches .*Step.of\(model\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        *((kind, (2, 2, 2)) for kind in MASTERS),
        # parameters of the same shapes may be another model's, so they do not end a shorter step
        *((kind, (2, 1, 2, 1)) for kind in MASTERS if "parameters" not in kind),
    ],
)
def test_an_optimizer_of_copies_ends_a_step_of_known_length(kind: str, lengths: tuple[int, ...]) -> None:
    """The last step of an epoch may be shorter. The expert bias moves, although no weight changes visibly."""
    biases = []
    for copies in (False, True):
        layer, found = make(micro_batches=2, bias_update_rate=0.1), []
        held = MASTERS[kind](layer) if copies else list(layer.parameters())
        optimizer = torch.optim.SGD(held, lr=0.0)
        for step, length in enumerate(lengths):
            for m in range(length):
                (layer(batches(2 * len(lengths))[2 * step + m]) * 0).sum().backward()
            if copies:
                for master in held:
                    master.grad = torch.zeros_like(master)
            optimizer.step()
            layer.zero_grad()
            assert layer.balancer.previous_step.micro_batches == length
            found.append(layer.router.bias_E.tolist())
        biases.append(found)
    assert biases[0] == biases[1] and any(biases[0][0])


def test_an_optimizer_of_biases_and_norms_holds_no_copies() -> None:
    """It may step before the matrices' optimizer, as beside Muon."""
    layer, norm = make(), torch.nn.LayerNorm(6)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (norm, layer)]
    for x in batches(2):
        balance_only(layer, norm(x))
    for optimizer in optimizers:
        optimizer.step()
    assert seen(layer) == [] and layer.balancer.previous_step.micro_batches == 2


def router_gradient(layer: MoE) -> torch.Tensor:
    return layer.router.weight.grad.clone()


@pytest.mark.parametrize("given", [None, 4])
def test_rolling_gradient_is_that_of_the_counts_so_far(given: int | None) -> None:
    """Each micro-batch's probabilities are multiplied by the counts so far, as in Algorithm 1 of arXiv 2501.11873."""
    layer = make(micro_batches=given).double()
    inputs = [torch.randn(7, 6, dtype=torch.float64) for _ in range(4)]
    if given is None:  # a previous step determines the expected number of micro-batches
        for x in inputs:
            balance_only(layer, x)
        layer.zero_grad()
    for x in inputs:
        balance_only(layer, x)
    got = router_gradient(layer)
    layer.zero_grad()
    counts_E = torch.zeros(4, dtype=torch.float64)
    for i, x in enumerate(inputs):
        _, probs_TE, ids_TK, _ = oracle.route(layer, x)
        counts_E += torch.bincount(ids_TK.flatten(), minlength=4)
        (4 * (counts_E / (2 * 7 * (i + 1)) * probs_TE.mean(0)).sum() / 4).backward()
    assert oracle.relative_error(got, router_gradient(layer)) < 1e-12


def whole_batch_gradient(layer: MoE, inputs: list[torch.Tensor]) -> torch.Tensor:
    layer.zero_grad()
    oracle.balance_loss(layer, torch.cat(inputs)).backward()
    return router_gradient(layer)


def test_exact_estimator_equals_the_whole_batch() -> None:
    layer = make(estimator="exact", micro_batches=3).double()
    inputs = [x.double() for x in batches(3)]
    with counting_pass():
        for x in inputs:
            layer(x)
    for x in inputs:
        balance_only(layer, x)
    assert seen(layer) == [5, 8, 11]
    got = router_gradient(layer)
    assert oracle.relative_error(got, whole_batch_gradient(layer, inputs)) < 1e-12


def test_forwards_before_the_first_backward_are_exact_too() -> None:
    layer = make(micro_batches=3).double()
    inputs = [x.double() for x in batches(3)]
    outs = [layer(x) for x in inputs]
    for out in outs:
        (out * 0).sum().backward()
    got = router_gradient(layer)
    assert oracle.relative_error(got, whole_batch_gradient(layer, inputs)) < 1e-12


def test_counts_stay_exact_over_512_micro_batches_in_bf16() -> None:
    layer = make(micro_batches=512).bfloat16()
    for _ in range(512):
        balance_only(layer, torch.randn(3, 6).bfloat16())
    assert int(layer.balancer.step.layers[0].totals(layer.balancer.visits[0])[-1]) == 512 * 3


def test_micro_scope_is_the_mean_of_micro_batch_losses() -> None:
    layer = make(scope="micro", micro_batches=3).double()
    inputs = [x.double() for x in batches(3)]
    for x in inputs:
        balance_only(layer, x)
    got = router_gradient(layer)
    layer.zero_grad()
    sum(oracle.balance_loss(layer, x) / 3 for x in inputs).backward()
    assert oracle.relative_error(got, router_gradient(layer)) < 1e-12


def test_sequence_scope_is_the_mean_of_sequence_losses() -> None:
    layer = make(scope="sequence").double()
    x_BSD = torch.randn(4, 9, 6, dtype=torch.float64)
    mask_BS = torch.ones(4, 9, dtype=torch.bool)
    mask_BS[1, 5:] = mask_BS[2] = False
    (layer(x_BSD, mask_BS) * 0).sum().backward()
    got = router_gradient(layer)
    layer.zero_grad()
    valid = [x[m] for x, m in zip(x_BSD, mask_BS, strict=True) if m.any()]
    (sum(oracle.balance_loss(layer, x) for x in valid) / len(x_BSD)).backward()  # a sequence without a token has loss 0
    assert oracle.relative_error(got, router_gradient(layer)) < 1e-12


@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0), lambda: 1024.0])
def test_gradient_scale_follows_a_gradient_scaler(scale: Any) -> None:
    layer, scaled, x = make(), make(), batches(1)[0]
    scaled.place(Placement(gradient_scale=scale))
    balance_only(layer, x)
    balance_only(scaled, x)
    assert torch.equal(router_gradient(scaled), 1024 * router_gradient(layer))


def test_optimizers_within_the_backward() -> None:
    """Each weight has an optimizer of its own, which steps as soon as the weight's gradient is complete."""
    layer = make(bias_update_rate=0.01)
    optimizers = {p: torch.optim.SGD([p], lr=0.0) for p in layer.parameters()}
    gradients = []

    def update(p: torch.Tensor) -> None:
        if p is layer.router.weight:
            gradients.append(p.grad.clone())
        optimizers[p].step()
        optimizers[p].zero_grad()

    hooks = [p.register_post_accumulate_grad_hook(update) for p in layer.parameters()]
    for x in batches(3):
        layer.router.bias_E.zero_()  # the oracle chooses without it
        balance_only(layer, x)
        assert oracle.relative_error(gradients[-1], whole_batch_gradient_of_a_copy(layer, x)) < 1e-6
        assert layer.balancer.previous_step.micro_batches == 1
        assert bool(layer.router.bias_E.any())
    for hook in hooks:
        hook.remove()  # garbage collection does not see that they refer to the layer


def whole_batch_gradient_of_a_copy(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    own = make()
    own.load_state_dict(layer.state_dict(), strict=False)
    return whole_batch_gradient(own, [x])


def test_a_compiled_update_ends_the_step() -> None:
    layer = make()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    update = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        for x in batches(2):
            balance_only(layer, x)
        update()
        optimizer.zero_grad()
        assert layer.balancer.previous_step.micro_batches == 2 and seen(layer) == []
    torch.compiler.reset()  # it keeps the optimizer, and so the layer, for whatever runs next
