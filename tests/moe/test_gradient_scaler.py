"""Checks that training with a gradient scaler equals training without one, or is refused."""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from equimoe.moe import BalanceConfig, MoE, MoEConfig, Placement, RouterConfig, Step, counting_pass, use_gradient_scaler
from tests.helpers import oracle
from tests.helpers.fork import run_ranks

STEPS, MICRO_BATCHES, WORLD = 4, 2, 2
REMEDY = r"^GradScaler: .* times too small; call equimoe.moe.use_gradient_scaler\(model, scaler\) once"


def make(coefficient: float = 0.5, z_loss: float = 0.1, micro_batches: int | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    balance = BalanceConfig(
        coefficient=coefficient, estimator="exact", bias_update_rate=0.01, micro_batches=micro_batches
    )
    moe = MoEConfig(8, 8, 8, 2, RouterConfig(z_loss=z_loss), balance=balance, init_std=0.6)
    return nn.Sequential(nn.Linear(8, 8), MoE(moe), nn.Linear(8, 8))


def scaler(**how: Any) -> torch.amp.GradScaler:
    """A scaler whose scale doubles after every other step."""
    return torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, "growth_interval": 2, **how})


def tokens(step: int, m: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * m + rank)
    return torch.randn(2, 6, 8, generator=generator) + 2 * torch.randn(8, generator=generator)


def train(
    model: nn.Module, inputs: Callable[[int, int], Tensor], micro_batches: int, scaler: torch.amp.GradScaler | None
) -> list[Tensor]:
    """Train as one would with a gradient scaler: accumulation, clipping of unscaled gradients, an overflow."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(STEPS):
        batches = [inputs(step, m) for m in range(micro_batches)]
        with counting_pass():
            for x in batches:
                model(x)
        for x in batches:
            loss = model(x).square().mean() / micro_batches
            (loss if scaler is None else scaler.scale(loss)).backward()
        overflow = step == 1
        if scaler is None:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            if not overflow:
                optimizer.step()
        else:
            if overflow:
                next(model.parameters()).grad[0] = torch.inf  # type: ignore[index]
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return [*(p.detach() for p in model.parameters()), *model.buffers()]


def alone() -> list[Tensor]:
    """One process with the whole batch of each step, without a scaler."""

    def inputs(step: int, _: int) -> Tensor:
        return torch.cat([tokens(step, m, rank) for m in range(MICRO_BATCHES) for rank in range(WORLD)])

    return train(make(), inputs, 1, None)


def test_two_ranks_with_a_scaler_equal_one_process_without() -> None:
    def script(rank: int, world: int) -> list[Tensor]:
        warnings.simplefilter("ignore")
        model, own = DistributedDataParallel(make()), scaler()
        use_gradient_scaler(model, own)
        found = train(model, lambda step, m: tokens(step, m, rank), MICRO_BATCHES, own)
        assert own.get_scale() == 1024.0, "halved by the overflow, then doubled"
        return found

    for found in run_ranks(script, WORLD):
        for value, right in zip(found, alone(), strict=True):
            assert oracle.relative_error(value, right) < 1e-6


def test_a_scaler_that_the_layer_does_not_know_is_refused_before_the_update() -> None:
    model = make()
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(ValueError, match=REMEDY) as refused:
        train(model, lambda step, m: tokens(step, m, 0), MICRO_BATCHES, scaler())
    assert "1024 times" in str(refused.value) and "\n" not in str(refused.value)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def update(model: nn.Module, scaler: torch.amp.GradScaler, fused: bool = False) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, fused=fused)
    scaler.scale(model(tokens(0, 0, 0)).square().mean()).backward()
    scaler.step(optimizer)


def frozen_experts(model: nn.Sequential) -> None:
    model[1].requires_grad_(False)


def another_scaler(model: nn.Sequential) -> None:
    use_gradient_scaler(model, scaler())


def a_number(model: nn.Sequential) -> None:
    model[1].place(Placement(gradient_scale=1024.0))  # type: ignore[operator]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("prepare", [lambda model: None, frozen_experts, another_scaler, a_number])
def test_refused_also(prepare: Callable[[nn.Sequential], None], fused: bool) -> None:
    model = make()
    prepare(model)
    with pytest.raises(ValueError, match=REMEDY):
        update(model, scaler(), fused)


def test_refused_in_a_step_that_the_loop_drives() -> None:
    model = make()
    with Step.of(model).micro_batch(), pytest.raises(ValueError, match=REMEDY):
        update(model, scaler())


def test_a_copy_does_not_know_the_scaler() -> None:
    model, own = make(), scaler()
    use_gradient_scaler(model, own)
    with pytest.raises(ValueError, match=REMEDY):
        update(copy.deepcopy(model), own)


@pytest.mark.parametrize(
    ("losses", "enabled"), [({}, False), ({"coefficient": 0.0, "z_loss": 0.0}, True)], ids=["switched off", "no losses"]
)
def test_nothing_to_refuse(losses: dict[str, float], enabled: bool) -> None:
    update(make(**losses), scaler(enabled=enabled))


def test_whoever_gives_a_function_knows_the_scale() -> None:
    model = make()
    model[1].place(Placement(gradient_scale=lambda: 1024.0))  # type: ignore[operator]
    update(model, scaler())


def test_another_models_scaler_is_not_refused() -> None:
    """As of a discriminator in 16 bits, between the backward and the update of a generator in fp32."""
    model, other = make(), nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(tokens(0, 0, 0)).square().mean().backward()
    update(other, scaler())
    optimizer.step()


def test_a_scaler_that_is_switched_off_changes_nothing() -> None:
    gradients = []
    for known in (False, True):
        model = make()
        if known:
            use_gradient_scaler(model, scaler(enabled=False))
        (model(tokens(0, 0, 0)) * 0).sum().backward()
        gradients.append(model[1].router.weight.grad)
    assert torch.equal(*gradients) and bool(gradients[0].any())


def backward(model: nn.Module, scaler: torch.amp.GradScaler) -> None:
    scaler.scale(model(tokens(0, 0, 0)).square().mean()).backward()


def copies(model: nn.Module, flat: bool) -> list[Tensor]:
    """fp32 master copies of the weights, with their gradients."""
    pairs = [(p.detach().clone(), torch.zeros_like(p) if p.grad is None else p.grad) for p in model.parameters()]
    if flat:
        values, gradients = ([t.flatten() for t in tensors] for tensors in zip(*pairs, strict=True))
        pairs = [(torch.cat(values), torch.cat(gradients))]
    for value, gradient in pairs:
        value.grad = gradient
    return [value for value, _ in pairs]


@pytest.mark.parametrize("flat", [False, True], ids=["one by one", "flat"])
@pytest.mark.parametrize("driven", [False, True])
def test_an_optimizer_of_copies_is_refused(driven: bool, flat: bool) -> None:
    model, own = make(micro_batches=None if driven else 1), scaler()
    if driven:
        with Step.of(model).micro_batch():
            backward(model, own)
    else:
        backward(model, own)
    with pytest.raises(ValueError, match=REMEDY):
        own.step(torch.optim.SGD(copies(model, flat), lr=0.01))


TWICE = r"^Placement.gradient_scale is a function, and .* do not call use_gradient_scaler, or give a number"


def test_a_scale_that_would_be_multiplied_twice_is_refused() -> None:
    function = Placement(gradient_scale=lambda: 1024.0)
    model = make()
    model[1].place(function)  # type: ignore[operator]
    with pytest.raises(ValueError, match=TWICE):
        use_gradient_scaler(nn.Sequential(make(), model), scaler())
    model = make()
    use_gradient_scaler(model, scaler())
    model[1].place(Placement(gradient_scale=2.0))  # type: ignore[operator]
    with pytest.raises(ValueError, match=TWICE):
        model[1].place(function)  # type: ignore[operator]


def test_no_layer_knows_the_scaler_if_one_refuses_it() -> None:
    first, second, own = make(), make(), scaler()
    second[1].place(Placement(gradient_scale=lambda: 1024.0))  # type: ignore[operator]
    with pytest.raises(ValueError, match=TWICE):
        use_gradient_scaler(nn.Sequential(first, second), own)
    with pytest.raises(ValueError, match=REMEDY):
        update(first, own)


@pytest.mark.parametrize("prepare", [lambda model: None, frozen_experts])
def test_a_scaler_that_comes_after_a_backward_is_refused(prepare: Callable[[nn.Sequential], None]) -> None:
    model, own = make(), scaler()
    prepare(model)
    backward(model, own)
    with pytest.raises(ValueError, match=r"^use_gradient_scaler: a backward of this step .*; call it before the first"):
        use_gradient_scaler(model, own)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_the_remedy_of_a_refused_update_works(set_to_none: bool) -> None:
    model, own = make(), scaler()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    backward(model, own)
    with pytest.raises(ValueError, match=REMEDY):
        own.step(optimizer)
    own.update()
    optimizer.zero_grad(set_to_none)
    use_gradient_scaler(model, own)
    use_gradient_scaler(model, own)  # a second call changes nothing
    backward(model, own)
    use_gradient_scaler(model, own)
    own.unscale_(optimizer)
    right = make()
    right(tokens(0, 0, 0)).square().mean().backward()
    for value, wanted in zip(model.parameters(), right.parameters(), strict=True):
        assert wanted.grad is None or torch.equal(value.grad, wanted.grad)  # type: ignore[arg-type]
    own.step(optimizer)


@pytest.mark.parametrize(
    ("model", "scaler", "message"),
    [
        (make, lambda: None, "scaler is a NoneType; pass the torch.amp.GradScaler"),
        (make, lambda: 1024.0, "scaler is a float; pass the torch.amp.GradScaler"),
        (scaler, make, "model is a GradScaler; pass the nn.Module first"),
        (lambda: [make()], scaler, "model is a list; pass the nn.Module first"),
        (lambda: nn.Linear(2, 2), scaler, "Linear has no MoE layer; pass the model that has them"),
    ],
)
def test_wrong_arguments(model: Callable[[], Any], scaler: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^use_gradient_scaler: {re.escape(message)}"):
        use_gradient_scaler(model(), scaler())


class StepOfAnotherName(torch.amp.GradScaler):
    def update_of(this, optimizer: torch.optim.Optimizer) -> None:  # noqa: N805
        this.unscale_(optimizer)
        optimizer.step()


class StepOfItsParent(torch.amp.GradScaler):
    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **how: Any) -> float | None:
        return super().step(optimizer, *args, **how)

    update_of = step


@pytest.mark.parametrize("kind", [StepOfAnotherName, StepOfItsParent])
def test_scalers_of_the_users_own_class_are_refused(kind: Any) -> None:
    model, own = make(), kind("cpu", init_scale=1024.0)
    backward(model, own)
    with pytest.raises(ValueError, match=REMEDY.replace("GradScaler:", f"{kind.__name__}:", 1)):
        own.update_of(torch.optim.SGD(model.parameters(), lr=0.01))


def test_variables_that_a_training_step_deletes_are_freed() -> None:
    """Reading a frame's ``f_locals`` keeps variables alive before Python 3.13."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        logits = model(tokens(0, 0, 0))
        reference = weakref.ref(logits)
        logits.square().mean().backward()
        optimizer.step()
        del logits
        assert reference() is None

    step()


@pytest.mark.parametrize("known", [True, False])
def test_the_scaler_of_another_model_beside_a_frozen_layer(known: bool) -> None:
    """If no parameter precedes a frozen layer in the graph, nothing tells who trains, but the error says what to do."""
    model, other, own = make(), nn.Linear(8, 3), scaler()
    frozen_experts(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x = model[0](tokens(0, 0, 0))
    model[1:](x if known else x.detach().requires_grad_()).square().mean().backward()
    if known:
        update(other, own)
        own.update()
        with pytest.raises(ValueError, match=REMEDY + ", before training$"):
            own.step(optimizer)
        return
    with pytest.raises(ValueError, match=REMEDY + ".*update this one first, as its MoE layer is frozen$"):
        update(other, own)
    optimizer.step()
    own.update()
    update(other, own)
