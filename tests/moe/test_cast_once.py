"""Expert weights that autocast casts once per step: the same bits, never an old value, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from equimoe.moe import BalanceConfig, MoE, MoEConfig, Step, cast_once, recompute
from equimoe.moe.engines import Batch, build_engine
from equimoe.moe.engines.main_grads import MainGrads
from tests.helpers.casts import Casts, always_cast
from tests.helpers.slow import slow_but

CONFIG = MoEConfig(hidden_size=16, intermediate_size=24, num_experts=4, top_k=2, balance=BalanceConfig(coefficient=0.0))
BF16 = partial(torch.autocast, "cpu", torch.bfloat16)


def inputs(m: int) -> Tensor:
    return torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(m))


class Model(nn.Module):
    """Two layers, of which the first is recomputed in the backward if ``how`` is "layer"."""

    def __init__(self, how: str = "", **changes: Any) -> None:
        super().__init__()
        config = replace(CONFIG, recompute_experts=how == "experts", **changes)
        self.first, self.second, self.recomputes = MoE(config), MoE(config), how == "layer"

    def forward(self, x: Tensor) -> Tensor:
        x = x + (recompute(self.first, x) if self.recomputes else self.first(x))
        return x + self.second(x)


def squares(y: Tensor, labels: Tensor) -> Tensor:
    return (y.float() - labels).square().sum(-1)


def engine_of(model: nn.Module, optimizer: Any = torch.optim.SGD, precision: Any = BF16) -> Any:
    return build_engine(
        model, None, lambda p: optimizer(p.values(), lr=0.1), loss=squares, max_norm=1.0, precision=precision
    )


def batches(number: int, seed: int = 0) -> list[Batch]:
    return [Batch(inputs(seed + m), inputs(99)) for m in range(number)]


def trained(
    model: nn.Module, micro_batches: int, main: bool, optimizer: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return gradients and weights of three steps, and losses of evaluations between them."""
    engine, grads, losses = engine_of(model, optimizer), [], []
    if main:
        engine._runner.main_grads = MainGrads([p for n, p in engine.parameters.items() if ".experts." in n])

    def accept(computed: Any) -> bool:
        grads.extend(g.clone() for g in computed.gradient())
        return True

    for step in range(3):
        engine.step(batches(micro_batches, 10 * step), 0.1, accept)
        losses += engine.evaluate(batches(2, 77))
    return grads, [p.detach() for p in model.parameters()], losses


@pytest.mark.parametrize(
    ("how", "micro_batches", "main", "changes"),
    [
        ("", 4, False, {}),
        ("layer", 4, True, {}),
        *(
            pytest.param(how, n, main, {}, marks=pytest.mark.slow)
            for how in ("", "experts", "layer")
            for n in (1, 4)
            for main in (False, True)
        ),
        pytest.param("layer", 4, False, {"widths": "12,24,24,36"}, marks=pytest.mark.slow),
        pytest.param("layer", 4, False, {"gated": False, "activation": "relu2"}, marks=pytest.mark.slow),
    ],
)
def test_bits_are_those_of_casts_in_every_forward(how: str, micro_batches: int, main: bool, changes: Any) -> None:
    """AdamW is fused, whose updates torch does not count."""

    def run() -> Any:
        torch.manual_seed(0)
        return trained(Model(how, **changes), micro_batches, main, partial(torch.optim.AdamW, fused=True))

    with always_cast():
        wanted = run()
    for found, want in zip(run(), wanted, strict=True):
        assert len(found) == len(want) > 0 and all(map(torch.equal, found, want))


@pytest.mark.parametrize(("how", "before"), [("", 16), ("experts", 16), ("layer", 24)])
def test_how_often_a_step_casts(how: str, before: int) -> None:
    """Two layers of two weights, four micro-batches: once per weight, with and without recomputation."""
    model = Model(how)
    engine = engine_of(model)

    def counts() -> list[int]:
        found = []
        for run in (lambda: engine.step(batches(4), 0.1), lambda: engine.evaluate(batches(4))):
            with Casts(model) as casts:
                run()
            found.append(casts.count)
        return found

    assert counts() == [4, 4]
    with always_cast():
        assert counts() == [before, 16]


def test_a_counting_pass_and_its_step_share_the_casts() -> None:
    model = Model(balance=BalanceConfig(coefficient=0.01, estimator="exact"))
    engine = engine_of(model)
    with Casts(model) as casts:
        engine.step(batches(4), 0.1)
    assert casts.count == 4


def plain(layer: MoE, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Return an output of the layer under autocast, and the gradients of its experts."""
    weights = list(layer.eval().experts.parameters())
    with torch.autocast("cpu", dtype):
        y = layer(inputs(0))
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), weights)]


def optimized(layer: MoE, make: Callable[..., torch.optim.Optimizer]) -> None:
    optimizer = make(layer.experts.parameters(), lr=0.1)
    for weight in layer.experts.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()


def replaced(layer: MoE) -> None:
    layer.experts.down_proj = nn.Parameter(layer.experts.down_proj.detach() * 2)


def assigned(layer: MoE) -> None:
    for weight in layer.experts.parameters():
        weight.data = weight.detach() * 2


@torch.no_grad()
def doubled(layer: MoE) -> None:
    for weight in layer.experts.parameters():
        weight.mul_(2)


def filled(layer: MoE, **how: Any) -> None:
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()}, **how)


def converted(layer: MoE) -> None:
    layer.bfloat16().float()
    doubled(layer)


def swapped(layer: MoE) -> None:
    """As a module converts its weights under ``torch.__future__.set_swap_module_params_on_conversion``."""
    torch.utils.swap_tensors(layer.experts.down_proj, nn.Parameter(layer.experts.down_proj.detach() * 2))


def in_inference_mode(layer: MoE) -> None:
    with torch.inference_mode():
        for weight in layer.experts.parameters():
            weight.mul_(2)


CHANGES: dict[str, Callable[[MoE], object]] = {
    "SGD": partial(optimized, make=torch.optim.SGD),
    "AdamW, foreach": partial(optimized, make=partial(torch.optim.AdamW, foreach=True)),
    "AdamW, fused": partial(optimized, make=partial(torch.optim.AdamW, fused=True)),
    "in place": doubled,
    "in place, in inference mode": in_inference_mode,
    "load_state_dict": filled,
    "load_state_dict(assign=True)": partial(filled, assign=True),
    "reset_parameters": lambda layer: layer.experts.reset_parameters(),
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(
        torch.ones(sum(p.numel() for p in layer.experts.parameters())), layer.experts.parameters()
    ),
    "another Parameter": replaced,
    "weight.data": assigned,
    "conversion": converted,
    "swap_tensors": swapped,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_cast_again(change: str) -> None:
    layer = MoE(CONFIG)
    with cast_once(layer):
        before = plain(layer)
        CHANGES[change](layer)
        found = plain(layer)
        again = plain(layer)
    want = plain(layer)
    assert not torch.equal(before[0], want[0])
    assert all(map(torch.equal, found, want)) and all(map(torch.equal, again, want))


def test_a_weight_that_moves_within_a_buffer_is_cast_again() -> None:
    """As in engines that keep all weights in one tensor."""
    layer = MoE(CONFIG)
    weight = layer.experts.down_proj
    parts = torch.randn(2, *weight.shape)
    weight.data = parts[0]
    with cast_once(layer):
        plain(layer)
        weight.data = parts[1]
        found = plain(layer)
    assert all(map(torch.equal, found, plain(layer)))


def test_a_backward_after_a_change_uses_the_weights_of_its_forward() -> None:
    """As without kept casts, where autograd keeps the cast of the forward."""
    layer = MoE(CONFIG)
    weights = list(layer.experts.parameters())
    want = plain(layer)[1:]
    with cast_once(layer), BF16():
        y = layer(inputs(0))
        optimized(layer, torch.optim.SGD)
        layer(inputs(0))
    assert all(map(torch.equal, torch.autograd.grad(y.float().square().sum(), weights), want))


def test_dtypes_and_modes_alternate() -> None:
    layer = MoE(CONFIG)
    modes: list[Callable[[], Any]] = [torch.inference_mode, torch.no_grad, torch.enable_grad]
    dtypes = [torch.bfloat16, torch.float16, torch.bfloat16, torch.float32]

    def run() -> list[Tensor]:
        found = []
        for dtype in dtypes:
            for mode in modes:
                with mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    found.append(layer(inputs(0)).detach().clone())
            found += plain(layer, torch.bfloat16)
        layer.experts.down_proj.requires_grad_(False)
        with BF16():
            found += torch.autograd.grad(layer(inputs(0)).float().sum(), layer.experts.gate_up_proj)
        layer.experts.down_proj.requires_grad_(True)
        return found

    want = run()
    with cast_once(layer):
        assert all(map(torch.equal, run(), want))


def test_weights_that_were_made_in_inference_mode() -> None:
    """torch does not count their changes."""
    with torch.inference_mode():
        layer = MoE(CONFIG)
        with cast_once(layer), BF16():
            before = layer(inputs(0))
            doubled(layer)
            assert not torch.equal(layer(inputs(0)), before)


def test_wide_weights_are_not_cast() -> None:
    layer = MoE(CONFIG).double()
    with cast_once(layer), Casts(layer) as casts, torch.no_grad(), BF16():
        assert layer(inputs(0).double()).dtype == torch.float64
    assert casts.count == 0


def held(layer: MoE) -> list[Tensor]:
    return [] if layer.experts.casts is None else [k.cast for k in layer.experts.casts._kept.values()]  # type: ignore[misc]


def test_they_are_freed_also_if_a_step_fails() -> None:
    model, other = Model(), Model()
    other.second.experts = other.first.experts
    engine = engine_of(model)
    seen: list[Any] = []

    def broken(*_: Any) -> None:
        seen.extend(weakref.ref(cast) for cast in held(model.first))
        raise RuntimeError("broken")

    handle = model.second.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        engine.step(batches(2), 0.1)
    handle.remove()
    gc.collect()
    assert len(seen) == 2 and all(reference() is None for reference in seen)
    assert model.first.experts.casts is None is other.first.experts.casts
    with cast_once(model), cast_once(model, other):
        plain(other.first)
        assert len(held(other.second)) == 2, "layers may share experts"
        with cast_once(model):
            plain(model.first)
        assert len(held(model.first)) == 2, "the outer block keeps them"
    assert not any(held(layer) for layer in (model.first, model.second, other.first))


def test_a_model_is_no_other() -> None:
    layer, other = MoE(CONFIG), MoE(CONFIG)
    want = [plain(layer), plain(other)]
    with cast_once(layer):
        assert all(map(torch.equal, plain(layer), want[0]))
        assert all(map(torch.equal, plain(other), want[1])) and not held(other)
        other.experts.gate_up_proj = layer.experts.gate_up_proj
        assert not torch.equal(plain(other)[0], want[1][0])


def test_they_do_not_travel() -> None:
    layer = MoE(CONFIG)
    names, size = set(layer.state_dict()), len(pickle.dumps(layer))
    with cast_once(layer):
        want = plain(layer)
        saved = io.BytesIO()
        torch.save(layer, saved)
        saved.seek(0)
        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]
        assert set(layer.state_dict()) == names and len(pickle.dumps(layer)) == size
        for of in copies:
            assert of.experts.casts is None
            doubled(of)
            assert not torch.equal(plain(of)[0], want[0])
        assert all(map(torch.equal, plain(layer), want))


@pytest.mark.parametrize("trains", slow_but([False], [False, True]))
def test_a_compiled_graph_casts_by_itself(trains: bool) -> None:
    layer = MoE(CONFIG).train(trains)
    step = Step.of(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager" if trains else "eager")

    def run(module: Any) -> list[Tensor]:
        with torch.set_grad_enabled(trains), step.micro_batch() if trains else nullcontext(), BF16():
            y = module(inputs(0))
        if not trains:
            return [y]
        grads = torch.autograd.grad(y.float().square().sum(), list(layer.experts.parameters()))
        step.end()
        return [y.detach(), *grads]

    def alike() -> bool:
        return all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip(run(compiled), run(layer), strict=True))

    with cast_once(layer):
        run(compiled)
        assert held(layer) == [None, None]
        for _ in range(2):
            assert alike()
            doubled(layer)
    assert alike()


def test_selective_checkpointing_may_save_casts() -> None:
    """It numbers the ops of a forward, and its recomputation must run the same ones."""

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = op is torch.ops.aten._to_copy.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    layer, x = MoE(CONFIG).eval(), inputs(0).requires_grad_()
    contexts = partial(create_selective_checkpoint_contexts, policy)

    def run(how: Callable[..., Any]) -> tuple[Tensor, ...]:
        with BF16():
            y = how(layer, x)
        return torch.autograd.grad(y.float().square().sum(), [x, *layer.experts.parameters()])

    want = run(lambda f, x: f(x))
    with cast_once(layer):
        for _ in range(2):
            found = run(partial(checkpoint, use_reentrant=False, context_fn=contexts))
            assert all(map(torch.equal, found, want))
            run(lambda f, x: f(x))


def test_parametrized_and_functional_weights() -> None:
    """What is not a Parameter of the experts is cast in every forward."""
    layer = MoE(CONFIG)
    want = plain(layer)[0]
    with cast_once(layer), BF16(), torch.no_grad():
        layer(inputs(0))
        given = {name: 2 * p for name, p in layer.named_parameters() if "experts" in name}
        y = torch.func.functional_call(layer, given, (inputs(0),))
        assert not torch.equal(y, want) and torch.equal(layer(inputs(0)), want)
    doubled(layer)
    with BF16(), torch.no_grad():
        assert torch.equal(layer(inputs(0)), y)


def test_a_list_of_models_is_refused() -> None:
    models: Any = [MoE(CONFIG)]
    wanted = r"models=list: must be modules; .* cast_once\(\*models\)"
    with pytest.raises(TypeError, match=wanted), cast_once(models):
        pass
