"""Unusual optimizer steps: each returns its largest relative error, or is refused with a ValueError.

The error compares the router's balance gradient with one process that holds everything the step holds. Scenarios do not
change the weights, because their learning rate is zero. E experts, K top-k, D hidden.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from equimoe.moe import (
    BalanceConfig,
    MoE,
    MoEConfig,
    Placement,
    RouterConfig,
    Step,
    counting_pass,
    recompute,
    use_gradient_scaler,
)
from equimoe.moe.balance.bias import sign
from equimoe.moe.collectives import world_axis
from tests.helpers import oracle
from tests.helpers.fork import run_ranks

E, K, D = 8, 2, 6
CONFIG = MoEConfig(D, 8, E, K, balance=BalanceConfig(coefficient=1.0), init_std=0.7)


def make(router: RouterConfig | None = None, **balance: Any) -> MoE:
    """Build a layer in fp64, always with the same weights."""
    torch.manual_seed(0)
    config = replace(CONFIG, balance=replace(CONFIG.balance, **balance), router=router or RouterConfig())
    return MoE(config).double()


def tokens(number: int, count: int = 7) -> Tensor:
    """Return a micro-batch; each number is a different domain."""
    generator = torch.Generator().manual_seed(100 + number)
    shape: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return torch.randn(count, D, **shape) + 2 * torch.randn(1, D, **shape)


def frozen(layer: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(layer.parameters(), lr=0.0)


def balance_only(layer: nn.Module, *args: Tensor) -> Tensor:
    """Return a loss whose only gradient is that of the balance loss."""
    return (layer(*args) * 0).sum()


def rolling(layer: MoE, inputs: Sequence[Tensor], micro_batches: int | None = None) -> Tensor:
    """Return the router's gradient of a step in which each micro-batch uses the counts so far ("rolling")."""
    total, counts_E, seen = torch.zeros(()), torch.zeros(E, dtype=torch.float64), 0
    for n, x in enumerate(inputs, start=1):
        _, probs_TE, ids_TK, _ = oracle.route(layer, x)
        counts_E, seen = counts_E + torch.bincount(ids_TK.flatten(), minlength=E), seen + len(x)
        step_tokens = seen * (micro_batches or len(inputs)) / n
        total = total + E * (counts_E / (K * seen) * probs_TE.sum(0)).sum() / step_tokens
    return torch.autograd.grad(total, layer.router.weight)[0]


def whole(layer: MoE, inputs: Iterable[Tensor]) -> Tensor:
    """Return the router's gradient of one process that holds all micro-batches at once."""
    return torch.autograd.grad(oracle.balance_loss(layer, torch.cat(list(inputs))), layer.router.weight)[0]


def error(layer: MoE, want: Tensor) -> float:
    grad = layer.router.weight.grad
    return 1.0 if grad is None else oracle.relative_error(grad, want)


def steps(
    layer: MoE, number: int, unusual: Callable[[int, MoE], None] | None = None, micro_batches: int = 2, start: int = 0
) -> float:
    """Run ordinary steps, each after something ``unusual``; return the largest error of their gradients."""
    optimizer, worst = frozen(layer), 0.0
    for step in range(start, start + number):
        if unusual is not None:
            unusual(step, layer)
        inputs = [tokens(10 * step + m) for m in range(micro_batches)]
        for x in inputs:
            balance_only(layer, x).backward()
        worst = max(worst, error(layer, rolling(layer, inputs)))
        optimizer.step()
        optimizer.zero_grad()
    return worst


# ---- forwards that are never trained


def a_forward_that_raises_later(step: int, layer: MoE) -> None:
    if step == 1:
        with suppress(KeyError):
            layer(tokens(99))
            raise KeyError


def forwards_without_backward(step: int, layer: MoE) -> None:
    for number in range(3):
        layer(tokens(90 + number))


def a_graph_that_is_freed(step: int, layer: MoE) -> None:
    y = layer(tokens(99))
    del y


def an_evaluation(step: int, layer: MoE) -> None:
    layer.eval()
    layer(tokens(99)).sum().backward()
    layer.zero_grad()
    layer.train()
    with torch.no_grad():
        layer(tokens(98))


def skipped(step: int, layer: MoE) -> None:
    """A step is skipped, as a gradient scaler does on overflow; also before the first update."""
    for number in range(2):
        balance_only(layer, tokens(90 + number)).backward()
    layer.zero_grad()


def skipped_in_place(step: int, layer: MoE) -> None:
    if step != 1:
        return
    for number in range(2):
        balance_only(layer, tokens(90 + number)).backward()
    layer.zero_grad(set_to_none=False)


def told(unusual: Callable[[int, MoE], None] | None, **balance: Any) -> Callable[[], float]:
    return lambda: steps(make(micro_batches=2, **balance), 3, unusual)


# ---- several backwards, gradients elsewhere


def two_backwards_through_one_forward() -> float:
    layer, x = make(micro_batches=1), tokens(0)
    loss = balance_only(layer, x)
    loss.backward(retain_graph=True)
    loss.backward()
    return error(layer, whole(layer, [x]))


def a_gradient_is_asked_for_before_the_backward() -> float:
    layer, x = make(micro_batches=1), tokens(0).requires_grad_()
    loss = balance_only(layer, x)
    torch.autograd.grad(loss, [x, layer.router.weight], retain_graph=True)
    loss.backward()
    return error(layer, whole(layer, [x.detach()]))


def gradients_elsewhere(micro_batches: int | None, put_back: Callable[[MoE, Tensor], None]) -> float:
    """Each micro-batch's gradient is moved away, and the sum is put back for the update."""
    layer, worst = make(micro_batches=micro_batches), 0.0
    optimizer = frozen(layer)
    for step in range(3):
        inputs, total = [tokens(10 * step + m) for m in range(4)], torch.zeros(E, D, dtype=torch.float64)
        for x in inputs:
            balance_only(layer, x).backward()
            total += layer.router.weight.grad
            layer.zero_grad()
        put_back(layer, total)
        worst = max(worst, oracle.relative_error(total, rolling(layer, inputs)))
        optimizer.step()
        optimizer.zero_grad()
    return worst


def as_a_new_tensor(layer: MoE, total: Tensor) -> None:
    layer.router.weight.grad = total.clone()


def clipped_by_micro_batch() -> float:
    """Each micro-batch's gradient is clipped before it is moved away; it is compared before the clipping."""
    layer, worst = make(micro_batches=4), 0.0
    optimizer = frozen(layer)
    for step in range(2):
        inputs, found, total = [tokens(10 * step + m) for m in range(4)], 0.0, 0.0
        for x in inputs:
            balance_only(layer, x).backward()
            found = found + layer.router.weight.grad
            nn.utils.clip_grad_norm_(layer.parameters(), 1e-3)
            total = total + layer.router.weight.grad
            layer.zero_grad()
        layer.router.weight.grad = torch.as_tensor(total)
        worst = max(worst, oracle.relative_error(torch.as_tensor(found), rolling(layer, inputs)))
        optimizer.step()
        optimizer.zero_grad()
    return worst


def gradients_taken_in_the_backward(micro_batches: int | None) -> float:
    """Main gradients: param.grad is gone before the backward ends, and master weights are copied back."""
    layer, total = make(micro_batches=micro_batches, bias_update_rate=0.01), []

    def take(p: Tensor) -> None:
        total.append(p.grad)
        p.grad = None

    layer.router.weight.register_post_accumulate_grad_hook(take)
    masters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    optimizer, worst = torch.optim.SGD(masters, lr=0.0), 0.0
    for step in range(3):
        inputs = [tokens(10 * step + m) for m in range(2)]
        for x in inputs:
            balance_only(layer, x).backward()
        want = biased_gradient(layer, inputs)
        worst, before = max(worst, oracle.relative_error(torch.stack(total).sum(0), want)), layer.router.bias_E.clone()
        total.clear()
        for master in masters:
            master.grad = torch.zeros_like(master)
        optimizer.step()
        with torch.no_grad():
            for p, master in zip(layer.parameters(), masters, strict=True):
                p.copy_(master)
        layer(tokens(99))  # the next forward finds that the step has ended
        assert not torch.equal(layer.router.bias_E, before), "the bias moves when the weights do"
    return worst


def gradients_kept_in_parts(micro_batches: int | None) -> float:
    """ZeRO 2 on two ranks: gradients are taken away after each backward, and an optimizer holds half of flat copies."""
    layer = make(micro_batches=micro_batches)
    flat = torch.cat([p.detach().flatten() for p in layer.parameters()]).chunk(2)[0].clone()
    flat.grad = torch.zeros_like(flat)
    optimizer, worst = torch.optim.SGD([flat], lr=0.0), 0.0
    for step in range(2):
        inputs, total = [tokens(10 * step + m) for m in range(4)], torch.zeros(E, D, dtype=torch.float64)
        for x in inputs:
            balance_only(layer, x).backward()
            total += layer.router.weight.grad
            layer.zero_grad()
        worst = max(worst, oracle.relative_error(total, rolling(layer, inputs)))
        optimizer.step()
    return worst


def optimizers_in_the_backward() -> float:
    """Each weight has its own optimizer, which steps as soon as the gradient is there; every backward is a step."""
    layer, found, worst = make(), [], 0.0
    optimizers = {p: torch.optim.SGD([p], lr=0.0) for p in layer.parameters()}

    def update(p: nn.Parameter) -> None:
        if p is layer.router.weight:
            found.append(p.grad.clone())
        optimizers[p].step()
        optimizers[p].zero_grad()

    hooks = [p.register_post_accumulate_grad_hook(update) for p in layer.parameters()]
    for step in range(3):
        balance_only(layer, tokens(step)).backward()
        worst = max(worst, oracle.relative_error(found.pop(), whole(layer, [tokens(step)])))
    for hook in hooks:
        hook.remove()  # they would keep the layer alive, and later tests would sum its counts, too
    return worst


def updates_without_an_optimizer(update: Callable[[MoE], None], micro_batches: int | None = None) -> float:
    layer, worst = make(micro_batches=micro_batches), 0.0
    for step in range(5):
        x = tokens(step)
        balance_only(layer, x).backward()
        worst = max(worst, error(layer, whole(layer, [x])))
        update(layer)
    assert len(layer.balancer.visits) <= 1, "memory grows"
    return worst


def in_place(layer: MoE) -> None:
    with torch.no_grad():
        for p in layer.parameters():
            if p.grad is not None:
                p.sub_(0.0 * p.grad)
                p.grad.zero_()


def by_data(layer: MoE) -> None:
    for p in layer.parameters():
        if p.grad is not None:
            p.data = p.data - 0.0 * p.grad
            p.grad.zero_()


def a_gradient_scaler(overflows: Sequence[bool]) -> float:
    """The layer knows the gradient scaler's scale, and every overflow skips a step. In fp32."""
    layer, worst = make(bias_update_rate=0.01).float(), 0.0
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
    use_gradient_scaler(layer, scaler)
    for step, overflow in enumerate(overflows):
        x, before = tokens(step), layer.router.bias_E.clone()
        own = copy.deepcopy(layer).double()
        scaler.scale((layer(x.float()) * 0).sum()).backward()
        grad = layer.router.weight.grad.double() / scaler.get_scale()
        want = copy.deepcopy(own).eval().router(x).counts_BE.sum(0)
        loss = E * (want / (K * len(x)) * oracle.route(own, x)[1].sum(0)).sum() / len(x)
        wanted = torch.autograd.grad(loss, own.router.weight)[0]
        worst = max(worst, oracle.relative_error(grad, wanted))
        if overflow:
            layer.router.weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(layer.router.bias_E, before) == overflow, "the bias moves when the weights do"
    return worst


def gradients_by_autograd_grad(micro_batches: int | None) -> float:
    """Gradients come from torch.autograd.grad, and weights are updated by hand, which leaves no trace."""
    layer, worst = make(micro_batches=micro_batches), 0.0
    for step in range(4):
        x = tokens(step)
        grad = torch.autograd.grad(balance_only(layer, x), layer.router.weight)[0]
        worst = max(worst, oracle.relative_error(grad, whole(layer, [x])))
        layer.router.weight.data.sub_(0 * grad)
    return worst


def gradients_of_the_input_in_between(step: int, layer: MoE) -> None:
    """Only the gradient of the input is computed (saliency, adversarial examples); no weight is trained."""
    x = tokens(90).requires_grad_()
    torch.autograd.grad(layer(x).square().sum(), x)


class Fails(torch.autograd.Function):
    """A backward that runs out of memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("out of memory")


def a_backward_that_raises(step: int, layer: MoE) -> None:
    """The backward raises after it has read the losses; then gradients are cleared and the step starts again."""
    with suppress(RuntimeError):
        balance_only(layer, Fails.apply(tokens(91).requires_grad_())).backward()
    layer.zero_grad()


def weights_swapped_in_between(micro_batches: int | None) -> float:
    """A moving average of the weights is evaluated in the middle of a step."""
    layer, worst = make(micro_batches=micro_batches), 0.0
    optimizer = frozen(layer)
    for step in range(3):
        inputs = [tokens(10 * step + m) for m in range(4)]
        for m, x in enumerate(inputs):
            balance_only(layer, x).backward()
            if m == 1:
                with torch.no_grad():
                    kept = layer.router.weight.clone()
                    layer.router.weight.copy_(0.9 * kept)
                    layer(tokens(99))
                    layer.router.weight.copy_(kept)
        if step or micro_batches:
            worst = max(worst, error(layer, rolling(layer, inputs)))
        optimizer.step()
        optimizer.zero_grad()
    return worst


def begun_again_in_the_middle() -> float:
    """A step stops after two of four micro-batches, gradients are cleared, and it starts again, unannounced."""
    layer = make(micro_batches=4)
    optimizer = frozen(layer)
    for m in (90, 91):
        balance_only(layer, tokens(m)).backward()
    layer.zero_grad()
    for m in range(4):
        balance_only(layer, tokens(m)).backward()
    optimizer.step()
    return error(layer, rolling(layer, [tokens(m) for m in range(4)]))


def a_forward_kept_for_the_log() -> float:
    layer = make()
    optimizer = frozen(layer)
    kept = layer(tokens(99))
    balance_only(layer, tokens(0)).backward()
    optimizer.step()
    return float(kept.detach().isnan().any())


def a_frozen_layer_in_a_trained_model() -> float:
    """The balance gradient must reach trained modules in front of the frozen layer."""
    layer, before = make().requires_grad_(False), nn.Linear(D, D).double()
    optimizer, worst = frozen(before), 0.0
    for step in range(4):
        x = tokens(step)
        balance_only(layer, before(x)).backward()
        want = torch.autograd.grad(oracle.balance_loss(layer, before(x)), before.weight)[0]
        worst = max(worst, oracle.relative_error(before.weight.grad, want))
        optimizer.step()
        optimizer.zero_grad()
    assert len(layer.balancer.visits) <= 1, "memory grows"
    return worst


def exact_without_counting() -> float:
    layer = make(estimator="exact", micro_batches=2)
    balance_only(layer, tokens(0)).backward()
    return 1.0


def reentrant_beside_a_live_forward() -> float:
    """The recomputation must route its own tokens, and count them."""
    layer, held = make(micro_batches=1), []
    held.append(layer(tokens(5)))
    own, x = [], tokens(0)
    layer.router.register_forward_hook(lambda router, args, routing: own.append((args[0].detach(), routing.ids_TK)))
    checkpoint(lambda x: layer(x).square(), x.clone().requires_grad_(), use_reentrant=True).sum().backward()
    for hidden, ids_TK in own:
        assert torch.equal(oracle.route(layer, hidden)[2].sort(1).values, ids_TK.sort(1).values), "another's decision"
    return 0.0


# ---- other models


def another_models_optimizer() -> float:
    """A discriminator with its own MoE layer and bias steps twice as often as the generator under test."""
    layer, other = make(bias_update_rate=0.01), make(bias_update_rate=0.01)
    optimizers, worst = (frozen(layer), frozen(other)), 0.0
    for step in range(3):
        inputs = [tokens(10 * step + m) for m in range(2)]
        for x in inputs:
            balance_only(layer, x).backward()
            before = layer.router.bias_E.clone(), layer.router.weight.grad.clone()
            balance_only(other, layer(x).detach()).backward()
            optimizers[1].step()
            optimizers[1].zero_grad()
            assert torch.equal(layer.router.bias_E, before[0]) and torch.equal(layer.router.weight.grad, before[1])
        if step:  # in the first step the number of micro-batches is still unknown
            worst = max(worst, biased_error(layer, inputs))
        optimizers[0].step()
        optimizers[0].zero_grad()
    return worst


def biased_error(layer: MoE, inputs: list[Tensor]) -> float:
    return error(layer, biased_gradient(layer, inputs))


def biased_gradient(layer: MoE, inputs: list[Tensor]) -> Tensor:
    """As :func:`rolling`, of a layer whose bias takes part in the choice."""
    total, counts_E, seen = torch.zeros(()), torch.zeros(E, dtype=torch.float64), 0
    for n, x in enumerate(inputs, start=1):
        routing = copy.deepcopy(layer).eval().router(x)
        probs_TE = oracle.route(layer, x)[1]
        counts_E, seen = counts_E + routing.counts_BE.sum(0), seen + len(x)
        total = total + E * (counts_E / (K * seen) * probs_TE.sum(0)).sum() / (seen * len(inputs) / n)
    return torch.autograd.grad(total, layer.router.weight)[0]


def a_frozen_teacher() -> float:
    """A frozen teacher in training mode has a bias, which nothing may move."""
    teacher = make(bias_update_rate=0.01).requires_grad_(False)
    found = steps(make(), 3, lambda step, layer: (teacher(tokens(50 + step)), None)[1], micro_batches=1)
    return max(found, float(teacher.router.bias_E.abs().max()))


def two_strange_optimizers() -> float:
    layer = make()
    copies = [[p.detach().clone().requires_grad_() for p in layer.parameters()] for _ in range(2)]
    optimizers = [torch.optim.SGD(masters, lr=0.0) for masters in copies]
    for masters, optimizer in zip(copies, optimizers, strict=True):
        balance_only(layer, tokens(0)).backward()
        for master in masters:
            master.grad = torch.zeros_like(master)
        optimizer.step()
    return 1.0


def a_discriminator_without_experts() -> float:
    """Optimizers of models without experts step in the middle of the layer's steps.

    One steps in the layer's very first step. A second one, whose weights have the router's shape and so might be main
    copies of it, steps only once the layer's optimizer is known.
    """
    others = [nn.Linear(D, width).double() for width in (1, E)]
    optimizers = [frozen(other) for other in others]

    def unusual(x: Tensor, step: int) -> None:
        for other, optimizer in list(zip(others, optimizers, strict=True))[: 1 + step]:
            other(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    layer, worst = make(micro_batches=2), 0.0
    own = frozen(layer)
    for step in range(2):
        inputs = [tokens(10 * step + m) for m in range(2)]
        for x in inputs:
            balance_only(layer, x).backward()
            unusual(x, step)
        worst = max(worst, error(layer, rolling(layer, inputs)))
        own.step()
        own.zero_grad()
    return worst


def two_optimizers_of_one_layer() -> float:
    """As Muon for matrices and AdamW for the rest; the router's decides, which may come first or last."""
    worst = 0.0
    for router_first in (True, False):
        layer = make(bias_update_rate=0.01)
        optimizers = [frozen(layer.router), frozen(layer.experts)]
        for step in range(3):
            inputs, before = [tokens(10 * step + m) for m in range(2)], layer.router.bias_E.clone()
            for x in inputs:
                balance_only(layer, x).backward()
            if step:
                worst = max(worst, biased_error(layer, inputs))
            for optimizer in optimizers if router_first else reversed(optimizers):
                optimizer.step()
                optimizer.zero_grad()
            assert float((layer.router.bias_E - before).abs().max()) < 0.011, "the bias moves once"
    return worst


def closures() -> float:
    """LBFGS runs forward and backward several times within its step; each evaluation is a step of its own."""
    layer, x, worst = make(), tokens(0), []
    optimizer = torch.optim.LBFGS(layer.router.parameters(), lr=1e-3, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = balance_only(layer, x)
        loss.backward()
        worst.append(error(layer, whole(layer, [x])))
        return oracle.balance_loss(layer, x).detach()

    for _ in range(3):
        optimizer.step(closure)
    assert len(worst) > 6, "several evaluations for each step"
    return max(worst)


# ---- counting ahead


class Dropped(nn.Module):
    """Dropout in front of the layer."""

    def __init__(self, **balance: Any) -> None:
        super().__init__()
        self.layer, self.seen = make(estimator="exact", **balance), []
        self.layer.router.register_forward_hook(self._see)

    def _see(self, router: Any, args: Any, routing: Any) -> None:
        if torch.is_grad_enabled():
            own = oracle.route(self.layer, args[0].detach())[2]
            self.seen.append((args[0].detach(), torch.equal(own.sort(1).values, routing.ids_TK.sort(1).values)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(nn.functional.dropout(x, 0.4))


def counted_ahead(between: Callable[[Dropped], None] | None = None, order: Sequence[int] = (0, 1, 2)) -> float:
    """Dropout differs between counting and training; every token must use the experts that its router then chose."""
    model, inputs = Dropped(), [tokens(m) for m in range(3)]
    with counting_pass():
        for x in inputs:
            model(x)
    if between is not None:
        between(model)
    for m in order:
        balance_only(model, inputs[m]).backward()
    assert all(own for _, own in model.seen), "routed by another forward's decision"
    if between is not None:  # the counts are those of the old weights, so the gradient is not compared
        return 0.0
    return error(model.layer, whole(model.layer, [x for x, _ in model.seen]))


def other_weights(model: Dropped) -> None:
    with torch.no_grad():
        model.layer.router.weight.copy_(torch.randn(E, D, dtype=torch.float64))


def another_order() -> float:
    """Micro-batches are trained in reverse order; without dropout, the step's gradient does not depend on the order."""
    layer, inputs = make(estimator="exact"), [tokens(m) for m in range(3)]
    with counting_pass():
        for x in inputs:
            layer(x)
    for x in reversed(inputs):
        balance_only(layer, x).backward()
    return error(layer, whole(layer, inputs))


def counted_in_inference_mode() -> float:
    layer, inputs = make(estimator="exact", bias_update_rate=0.01), [tokens(m) for m in range(3)]
    optimizer = frozen(layer)
    with torch.inference_mode(), counting_pass():
        for x in inputs:
            layer(x)
    for x in inputs:
        balance_only(layer, x).backward()
    found = error(layer, whole(layer, inputs))
    optimizer.step()
    return found


def as_many_as_there_are() -> float:
    """Steps have 4, 2, 3 and 1 micro-batches."""
    layer, worst = make(estimator="exact"), 0.0
    optimizer = frozen(layer)
    for step, number in enumerate((4, 2, 3, 1)):
        inputs = [tokens(10 * step + m) for m in range(number)]
        with counting_pass():
            for x in inputs:
                layer(x)
        for x in inputs:
            balance_only(layer, x).backward()
        worst = max(worst, error(layer, whole(layer, inputs)))
        optimizer.step()
        optimizer.zero_grad()
    return worst


# ---- recomputation


def recomputed(run: Callable[..., Tensor], step: bool = False) -> Callable[[], float]:
    def scenario() -> float:
        layer, worst = make(micro_batches=2), 0.0
        driven = Step.of(layer) if step else None
        optimizer = frozen(layer)
        for number in range(2):
            inputs = [tokens(10 * number + m) for m in range(2)]
            for x in inputs:
                with driven.micro_batch() if driven is not None else nullcontext():
                    (run(layer, x.clone().requires_grad_()).tanh() * 0).sum().backward()
            worst = max(worst, error(layer, rolling(layer, inputs)))
            optimizer.step()
            optimizer.zero_grad()
            if driven is not None:
                driven.end()
        return worst

    return scenario


# ---- a step that the loop drives


def driven(unusual: Callable[[Step, MoE], None] | None = None, declare: bool = False) -> float:
    layer, worst = make(bias_update_rate=0.01), 0.0
    step, bias_E = Step.of(layer), torch.zeros(E)
    for number in range(2):
        step.begin(micro_batches=3)
        inputs = [tokens(10 * number + m) for m in range(3)]
        for m, x in enumerate(inputs):
            with step.micro_batch(m):
                balance_only(layer, x).backward()
            if unusual is not None and m == 1:
                unusual(step, layer)
        worst = max(worst, biased_error(layer, inputs))
        counts_E = sum(copy.deepcopy(layer).eval().router(x).counts_BE.sum(0) for x in inputs)
        bias_E += (0.01 * sign(counts_E).double()).float()
        step.end()
        layer.zero_grad()
        worst = max(worst, float((layer.router.bias_E - bias_E).abs().max()))
    return worst


def an_exception_within(step: Step, layer: MoE) -> None:
    with suppress(KeyError), step.micro_batch(2):
        layer(tokens(99))
        raise KeyError


def a_forward_outside(step: Step, layer: MoE) -> None:
    layer(tokens(99))


def broken_off_and_begun_again(discard: bool) -> float:
    layer = make()
    step = Step.of(layer)
    for attempt in range(2):
        if discard:
            step.discard()
        step.begin(micro_batches=2)
        layer.zero_grad()
        inputs = [tokens(10 * attempt + m) for m in range(2)]
        for m, x in enumerate(inputs[: 1 + attempt]):
            with step.micro_batch(m):
                balance_only(layer, x).backward()
    return error(layer, rolling(layer, inputs))


def driven_by(numbers: list[int], told: int) -> float:
    """The numbers of the micro-batches run do not fit the number told at the start of the step."""
    layer = make()
    step = Step.of(layer)
    step.begin(micro_batches=told)
    for m in numbers:
        with step.micro_batch(m):
            balance_only(layer, tokens(m)).backward()
    step.end()
    return 1.0


def a_backward_after_the_end() -> float:
    layer = make()
    step = Step.of(layer)
    with step.micro_batch():
        loss = balance_only(layer, tokens(0))
    step.end(applied=False)
    loss.backward()
    return 1.0


def driven_steps_of_any_length() -> float:
    layer, worst = make(), 0.0
    step = Step.of(layer)
    for number, length in enumerate((4, 2, 3, 1)):
        step.begin(micro_batches=length)
        inputs = [tokens(10 * number + m) for m in range(length)]
        for x in inputs:
            with step.micro_batch():
                balance_only(layer, x).backward()
        worst = max(worst, error(layer, rolling(layer, inputs)))
        step.end()
        layer.zero_grad()
    return worst


def a_micro_batch_run_again() -> float:
    """A micro-batch runs again, as after running out of memory; its earlier counts must be replaced."""
    layer, inputs = make(), [tokens(m) for m in range(2)]
    step, kept = Step.of(layer), []
    step.begin(micro_batches=2)
    for m, x in enumerate(inputs):
        with step.micro_batch(m):
            kept.append(layer(tokens(99)))
        with step.micro_batch(m):
            balance_only(layer, x).backward()
    return error(layer, rolling(layer, inputs))


def a_layer_that_runs_twice() -> float:
    """Each of the layer's two runs must count as a micro-batch of its own."""
    layer, inputs = make(scope="micro"), [tokens(m) for m in range(4)]
    step = Step.of(layer)
    step.begin(micro_batches=2)
    for m in range(2):
        with step.micro_batch(m):
            (balance_only(layer, inputs[2 * m]) + balance_only(layer, inputs[2 * m + 1])).backward()
    return error(layer, torch.as_tensor(sum(whole(layer, [x]) for x in inputs) / 4))


# ---- the z-loss


def z_loss(estimator: str, tell: bool, masked: bool = True) -> float:
    """The z-loss must be the mean over the step's valid tokens, whose number differs between micro-batches."""
    layer = make(RouterConfig(z_loss=0.1), coefficient=0.0, estimator=estimator, micro_batches=2)
    lengths = (7, 2)
    inputs = [(tokens(m), torch.arange(7) < length) for m, length in enumerate(lengths)]
    step = Step.of(layer) if tell else None
    if step is not None:
        step.begin(micro_batches=2, tokens=torch.tensor(sum(lengths)))
    for x, mask in inputs:
        args = (x, mask) if masked else (x[mask],)
        with step.micro_batch() if step is not None else nullcontext():
            balance_only(layer, *args).backward()
    valid = torch.cat([x[mask] for x, mask in inputs])
    want = 0.1 * oracle.route(layer, valid)[0].logsumexp(-1).square().mean()
    return error(layer, torch.autograd.grad(want, layer.router.weight)[0])


# ---- several ranks


def on_two_ranks(script: Callable[[int], float]) -> Callable[[], float]:
    def body(rank: int, world: int) -> float:
        warnings.simplefilter("ignore")
        return script(rank)

    return lambda: max(run_ranks(body, 2, timeout=60))


class TwoLayers(nn.Module):
    """Two layers, of which a caller runs any subset."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(2))

    def forward(self, x: Tensor, run: Sequence[int]) -> Tensor:
        return sum((self.layers[i](x) for i in run), torch.zeros_like(x))


def different_layers(rank: int) -> float:
    model, worst = TwoLayers(), 0.0
    wrapped, optimizer = DistributedDataParallel(model, find_unused_parameters=True), frozen(model)
    for step in range(3):
        runs = ((0, 1), (step % 2,))
        balance_only(wrapped, tokens(10 * step + rank), torch.tensor(runs[rank])).backward()
        for i, layer in enumerate(model.layers):
            there = [r for r in range(2) if i in runs[r]]
            want = whole(layer, [tokens(10 * step + r) for r in there])
            worst = max(worst, error(layer, want))
        optimizer.step()
        optimizer.zero_grad()
    return worst


def no_layer_on_one_rank(rank: int) -> float:
    """Rank 1 leaves out the only layer in every second micro-batch; the loop drives the step."""
    layer, worst = make(), 0.0
    step = Step.of(layer)
    for number in range(2):
        step.begin(micro_batches=2)
        for m in range(2):
            with step.micro_batch(m):
                x = tokens(10 * number + 2 * m + rank)
                if rank == 0 or m == 0:
                    balance_only(layer, x).backward()
        dist.all_reduce(layer.router.weight.grad)
        layer.router.weight.grad /= 2
        inputs = [torch.cat([tokens(10 * number), tokens(10 * number + 1)]), tokens(10 * number + 2)]
        worst = max(worst, error(layer, uneven(layer, inputs)))
        layer.zero_grad()
        step.end()
    return worst


def uneven(layer: MoE, inputs: Sequence[Tensor]) -> Tensor:
    """Return :func:`rolling` for two micro-batches whose second has fewer tokens than expected."""
    counts_E, seen, total = torch.zeros(E, dtype=torch.float64), 0, torch.zeros(())
    for n, x in enumerate(inputs, start=1):
        _, probs_TE, ids_TK, _ = oracle.route(layer, x)
        counts_E, seen = counts_E + torch.bincount(ids_TK.flatten(), minlength=E), seen + len(x)
        total = total + E * (counts_E / (K * seen) * probs_TE.sum(0)).sum() / (seen * 2 / n)
    return torch.autograd.grad(total, layer.router.weight)[0]


def fully_sharded(rank: int) -> float:
    """FSDP2 accumulates without reduction, with an evaluation in between."""
    layer, worst = make(micro_batches=2), 0.0
    model = fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, foreach=False)
    own = make()
    for step in range(2):
        batches = [[tokens(10 * step + 2 * m + r) for r in range(2)] for m in range(2)]
        for m, both in enumerate(batches):
            model.set_requires_gradient_sync(m == 1)
            balance_only(model, both[rank]).backward()
            model.eval()(tokens(99))
            model.train()
        want = rolling(own, [torch.cat(both) for both in batches])
        model.reshard()  # an evaluation leaves FSDP's root gathered
        worst = max(worst, oracle.relative_error(layer.router.weight.grad.full_tensor(), want))
        optimizer.step()
        optimizer.zero_grad()
    return worst


def a_copy_on_one_rank(rank: int) -> float:
    """Only rank 0 keeps a moving average of the weights."""
    layer = make()
    average = copy.deepcopy(layer).eval() if rank == 0 else None
    model, optimizer, worst = DistributedDataParallel(layer), frozen(layer), 0.0
    for step in range(2):
        balance_only(model, tokens(10 * step + rank)).backward()
        worst = max(worst, error(layer, whole(layer, [tokens(10 * step + r) for r in range(2)])))
        optimizer.step()
        optimizer.zero_grad()
    return worst if average is None else max(worst, 0.0)


def a_copy_on_one_rank_before_another_model(rank: int) -> float:
    """The copy, of the same widths, must not take the place of a layer that all ranks build after it."""
    models, average = [make()], []
    if rank == 0:
        average.append(copy.deepcopy(models[0]).eval())
    models.append(make())
    worst = 0.0
    for step in range(2):
        for number, layer in enumerate(models):
            inputs = [tokens(10 * step + 2 * number + r) for r in range(2)]
            balance_only(layer, inputs[rank]).backward()
            dist.all_reduce(layer.router.weight.grad)
            layer.router.weight.grad /= 2
            worst = max(worst, error(layer, whole(layer, inputs)))
            frozen(layer).step()
            layer.zero_grad()
    return worst + 0.0 * len(average)


def copies_of_a_layer_as_a_model(rank: int) -> float:
    """As torch's own encoder makes its layers; the first copy is rank 0's alone, so their numbers differ."""
    one = make()
    average = [copy.deepcopy(one)] if rank == 0 else []
    layers = [copy.deepcopy(one) for _ in range(2)]
    for layer in layers:
        balance_only(layer, tokens(rank)).backward()
    return 1.0 + len(average)


def another_layer_on_one_rank(rank: int) -> float:
    spare = [make() for _ in range(rank)]
    layer = make()
    balance_only(layer, tokens(rank)).backward()
    return 1.0 + len(spare)


@contextmanager
def group_again() -> Any:
    """Destroy the process group and create it again, as a restart within the process does."""
    store = dist.distributed_c10d._get_default_store()
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=world)
    yield


def a_restart_in_the_process(rank: int) -> float:
    """One rank interrupts a pass; then the same model continues in a new process group."""
    layer = make()
    kept = []
    balance_only(layer, tokens(rank)).backward()
    layer.zero_grad()
    if rank == 0:
        kept.append(layer(tokens(99)))  # no other rank joins this forward's sum
    with group_again():
        inputs = [tokens(10 + r) for r in range(2)]
        balance_only(layer, inputs[rank]).backward()
        dist.all_reduce(layer.router.weight.grad)
        layer.router.weight.grad /= 2
        return error(layer, whole(layer, inputs)) + 0.0 * len(kept)


def gradient_scale(reduce: Callable[[Tensor], Tensor], scale: Any) -> Callable[[int], float]:
    """An engine reduces gradients in its own way, and one number describes it."""

    def script(rank: int) -> float:
        layer = make()
        layer.place(Placement(tokens=world_axis(), gradient_scale=scale))
        balance_only(layer, tokens(rank)).backward()
        grad = layer.router.weight.grad
        dist.all_reduce(grad)
        layer.router.weight.grad = reduce(grad)
        return error(layer, whole(layer, [tokens(r) for r in range(2)]))

    return script


def the_group_as_an_argument(rank: int) -> float:
    """All ranks hold the same tokens; each has a group of its own."""
    groups = [dist.new_group([r]) for r in range(2)]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = MoE(CONFIG, group=groups[rank]).double()
        balance_only(layer, tokens(0)).backward()
    return error(layer, whole(layer, [tokens(0)]))


def accumulation_under_ddp(rank: int) -> float:
    layer, worst = make(micro_batches=2), 0.0
    model, optimizer = DistributedDataParallel(layer), frozen(layer)
    for step in range(2):
        batches = [[tokens(10 * step + 2 * m + r) for r in range(2)] for m in range(2)]
        with model.no_sync():
            balance_only(model, batches[0][rank]).backward()
        balance_only(model, batches[1][rank]).backward()
        worst = max(worst, error(layer, rolling(layer, [torch.cat(both) for both in batches])))
        optimizer.step()
        optimizer.zero_grad()
    return worst


@dataclass(frozen=True)
class Scenario:
    """A scenario: expected part of the error message if it is refused, else the largest allowed error."""

    run: Callable[[], float]
    refused: str = ""
    limit: float = 1e-10


SCENARIOS: dict[str, Scenario] = {
    "a gradient scaler, overflow in every other step": Scenario(
        lambda: a_gradient_scaler([True, False] * 3), limit=1e-6
    ),
    "a gradient scaler, overflows at the start": Scenario(
        lambda: a_gradient_scaler([True] * 3 + [False] * 3), limit=1e-6
    ),
    "torch.autograd.grad, update by hand": Scenario(lambda: gradients_by_autograd_grad(None), "torch.autograd.grad"),
    "torch.autograd.grad, micro_batches=1": Scenario(lambda: gradients_by_autograd_grad(1)),
    "gradients of the input in between": Scenario(told(gradients_of_the_input_in_between)),
    "a backward that raises": Scenario(told(a_backward_that_raises)),
    "weights swapped in the middle of a step": Scenario(lambda: weights_swapped_in_between(None)),
    "weights swapped, micro_batches=4": Scenario(lambda: weights_swapped_in_between(4)),
    "begun again in the middle of a step": Scenario(
        begun_again_in_the_middle, "after that many training forwards of the layer, but one after 2 more; if a step was"
    ),
    "a forward kept for the log": Scenario(a_forward_kept_for_the_log, "under torch.no_grad()"),
    "a frozen layer in a trained model": Scenario(a_frozen_layer_in_a_trained_model),
    "exact, nothing counted ahead": Scenario(exact_without_counting, "counting_pass()"),
    "reentrant, beside a live forward": Scenario(reentrant_beside_a_live_forward),
    "several micro-batches": Scenario(told(None)),
    "an exception after a forward": Scenario(told(a_forward_that_raises_later)),
    "three training forwards without a backward": Scenario(told(forwards_without_backward)),
    "a forward whose graph is freed": Scenario(told(a_graph_that_is_freed)),
    "an evaluation in between": Scenario(told(an_evaluation)),
    "a skipped step": Scenario(told(skipped)),
    "a skipped step, gradients set to zero": Scenario(told(skipped_in_place)),
    "two backwards through one forward": Scenario(two_backwards_through_one_forward),
    "autograd.grad before the backward": Scenario(a_gradient_is_asked_for_before_the_backward),
    "gradients kept elsewhere": Scenario(
        lambda: gradients_elsewhere(None, as_a_new_tensor),
        "set balance.micro_batches to the layer's number of training forwards per optimizer step",
    ),
    "gradients kept elsewhere, micro_batches=4": Scenario(lambda: gradients_elsewhere(4, as_a_new_tensor)),
    "gradients copied back, micro_batches=4": Scenario(
        lambda: gradients_elsewhere(4, lambda layer, total: as_a_new_tensor(layer, total.float().double()))
    ),
    "clipping by micro-batch, micro_batches=4": Scenario(clipped_by_micro_batch),
    "main gradients and master weights": Scenario(
        lambda: gradients_taken_in_the_backward(None), "perhaps copies of them, so the end of a step is unknown"
    ),
    "main gradients, micro_batches=2": Scenario(lambda: gradients_taken_in_the_backward(2)),
    "main gradients in parts": Scenario(
        lambda: gradients_kept_in_parts(None), "perhaps copies of them, so the end of a step is unknown"
    ),
    "main gradients in parts, micro_batches=4": Scenario(lambda: gradients_kept_in_parts(4)),
    "optimizers in the backward": Scenario(optimizers_in_the_backward),
    "updates in place without an optimizer": Scenario(lambda: updates_without_an_optimizer(in_place)),
    "updates of .data without an optimizer": Scenario(lambda: updates_without_an_optimizer(by_data)),
    "updates of .data, micro_batches=1": Scenario(lambda: updates_without_an_optimizer(by_data, 1)),
    "another model's optimizer": Scenario(another_models_optimizer),
    "a discriminator's optimizer": Scenario(a_discriminator_without_experts),
    "a frozen teacher in training mode": Scenario(a_frozen_teacher),
    "two optimizers of copies": Scenario(two_strange_optimizers, "drive the step yourself: step = Step.of(model)"),
    "two optimizers of one layer": Scenario(two_optimizers_of_one_layer),
    "closures of LBFGS": Scenario(closures),
    "exact, with dropout": Scenario(counted_ahead),
    "exact, weights changed in between": Scenario(lambda: counted_ahead(other_weights)),
    "exact, micro-batches in another order": Scenario(another_order),
    "exact, counted in inference mode": Scenario(counted_in_inference_mode),
    "exact, steps of 4, 2, 3 and 1 micro-batches": Scenario(as_many_as_there_are),
    "recomputed, non-reentrant": Scenario(recomputed(lambda f, x: checkpoint(f, x, use_reentrant=False))),
    "recomputed, reentrant": Scenario(recomputed(lambda f, x: checkpoint(f, x, use_reentrant=True))),
    "recomputed, our own": Scenario(recomputed(recompute)),
    "driven, recomputed, non-reentrant": Scenario(recomputed(lambda f, x: checkpoint(f, x, use_reentrant=False), True)),
    "driven, recomputed, reentrant": Scenario(recomputed(lambda f, x: checkpoint(f, x, use_reentrant=True), True)),
    "driven by the loop": Scenario(driven),
    "driven, an exception within a micro-batch": Scenario(lambda: driven(an_exception_within)),
    "driven, a forward outside": Scenario(lambda: driven(a_forward_outside), "enter step.micro_batch() around it"),
    "driven, broken off and begun again": Scenario(
        lambda: broken_off_and_begun_again(discard=False), "or Step.discard() to forget it"
    ),
    "driven, broken off, discarded, begun again": Scenario(lambda: broken_off_and_begun_again(discard=True)),
    "driven, another number than told": Scenario(lambda: driven_by([0, 1, 2], told=2), "3 have been trained"),
    "driven, a backward after the end": Scenario(a_backward_after_the_end, "before Step.end() or Step.discard()"),
    "driven, the same number each time": Scenario(lambda: driven_by([0, 0], told=2), "give the next number"),
    "driven, steps of 4, 2, 3 and 1 micro-batches": Scenario(driven_steps_of_any_length),
    "driven, a micro-batch that is run again": Scenario(a_micro_batch_run_again),
    "driven, a layer that runs twice": Scenario(a_layer_that_runs_twice),
    "z-loss, rolling, unequal valid tokens": Scenario(lambda: z_loss("rolling", False), "step.begin(tokens=...)"),
    "z-loss, rolling, unequal lengths": Scenario(lambda: z_loss("rolling", False, False), "step.begin(tokens=...)"),
    "z-loss, carry, unequal valid tokens": Scenario(lambda: z_loss("carry", False), "step.begin(tokens=...)"),
    "z-loss, rolling, tokens told": Scenario(lambda: z_loss("rolling", True)),
    "z-loss, carry, tokens told": Scenario(lambda: z_loss("carry", True)),
    "2 ranks: DDP, accumulation": Scenario(on_two_ranks(accumulation_under_ddp)),
    "2 ranks: different layers in one step": Scenario(on_two_ranks(different_layers)),
    "2 ranks: driven, no layer on one rank": Scenario(on_two_ranks(no_layer_on_one_rank)),
    "2 ranks: FSDP2, accumulation": Scenario(on_two_ranks(fully_sharded)),
    "2 ranks: a copy of the model on rank 0": Scenario(on_two_ranks(a_copy_on_one_rank)),
    "2 ranks: a copy on rank 0, then another model": Scenario(on_two_ranks(a_copy_on_one_rank_before_another_model)),
    "2 ranks: a layer more on rank 1": Scenario(
        on_two_ranks(another_layer_on_one_rank), "build the same layers in the same order on all ranks"
    ),
    "2 ranks: copies that are a model": Scenario(
        on_two_ranks(copies_of_a_layer_as_a_model), "have made another number of copies"
    ),
    "2 ranks: process group made again": Scenario(on_two_ranks(a_restart_in_the_process)),
    "2 ranks: gradients summed": Scenario(on_two_ranks(gradient_scale(lambda grad: grad, 1.0))),
    "2 ranks: gradients divided by tokens": Scenario(on_two_ranks(gradient_scale(lambda grad: grad / 14, 14.0))),
    "2 ranks: the group as an argument": Scenario(on_two_ranks(the_group_as_an_argument)),
}


def outcome(name: str) -> tuple[str, float, str]:
    """Return ("right" or "wrong" or "refused", error, message) of a scenario."""
    scenario = SCENARIOS[name]
    try:
        found = scenario.run()
    except (ValueError, AssertionError) as problem:
        text = next((line for line in reversed(str(problem).splitlines()) if "ValueError: " in line), str(problem))
        return "refused" if "ValueError" in repr(problem) or "ValueError: " in str(problem) else "wrong", 1.0, text
    return ("right" if found < scenario.limit else "wrong"), found, ""
