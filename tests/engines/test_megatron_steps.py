"""Steps of Megatron-Core: broken ones, evaluation in between, several models, bf16, and gradient scaling."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core", reason="needs Megatron-Core, which `make engines` installs")
pytestmark = pytest.mark.engines

from equimoe.moe.engines.megatron import moe_layer_spec  # noqa: E402
from equimoe.moe.engines.megatron import step as steps  # noqa: E402
from tests.helpers import oracle  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.megatron_models import (  # noqa: E402
    E,
    S,
    Trainer,
    assert_same_training,
    chunks_of,
    config_of,
    embeddings,
    forward_layers,
    lengths,
    logged,
    megatron,
    run,
    sequences,
)
from tests.helpers.megatron_tensors import Whole, assert_equal, joined, parts  # noqa: E402

EP = "expert_model_parallel_size"
#: choices of a token
K = 2
BIAS = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.1,
}


def trainer_of(estimator: Any = "rolling", bf16: bool = False, **how: Any) -> Trainer:
    config = config_of(**how, bf16=bf16, params_dtype=torch.bfloat16 if bf16 else torch.float32)
    chunks = chunks_of(config, moe_layer_spec(config, estimator=estimator), alone=True)
    return Trainer(chunks, partial(forward_layers, False), exact=estimator == "exact", bf16=bf16)


def layers(trainer: Trainer) -> list[Any]:
    return list(trainer.chunks[0].layers)  # type: ignore[arg-type]


def gradients(trainer: Trainer) -> Whole:
    return joined([trainer.gradients()])


def biases(trainer: Trainer) -> list[Tensor]:
    return [layer.router.expert_bias.clone() for layer in layers(trainer)]


class Broken(Exception):
    pass


def break_at(trainer: Trainer, at: int, where: str) -> Any:
    """Make training forward ``at`` raise before, within (between two layers) or after the model. Returns the undo."""
    real, count = trainer.forward, 0

    def raises(place: str) -> None:
        if place == where and count == at and torch.is_grad_enabled():
            raise Broken

    def forward(iterator: Any, model: Any) -> Any:
        nonlocal count
        raises("before")
        found = real(iterator, model)
        raises("after")
        count += torch.is_grad_enabled()
        return found

    def undo() -> None:
        trainer.forward = real
        hook.remove()

    hook = layers(trainer)[1].register_forward_pre_hook(lambda *_: raises("within"))
    trainer.forward = forward
    return undo


@pytest.mark.parametrize("estimator", ["rolling", "carry", "exact"])
@pytest.mark.parametrize(("at", "where"), [(0, "after"), (1, "before"), (1, "within"), (1, "after")])
def test_a_step_after_a_broken_one_is_as_if_there_had_been_none(estimator: str, at: int, where: str) -> None:
    def body(rank: int, world: int) -> None:
        with megatron():
            trainer = trainer_of(estimator, **BIAS)
            before = biases(trainer)
            trainer.backward(0)
            wanted, moved, losses = gradients(trainer), biases(trainer), logged()
            for layer, bias in zip(layers(trainer), before, strict=True):
                layer.router.expert_bias.copy_(bias)
                layer.balancer.previous_X = layer.balancer.layer.previous_step = None
            undo = break_at(trainer, at, where)
            try:
                trainer.backward(1)
            except Broken as broken:
                held = broken  # its traceback keeps graphs alive
            logged()
            undo()
            trainer.backward(0)
            assert_equal(gradients(trainer), wanted)
            assert all(torch.equal(*pair) for pair in zip(biases(trainer), moved, strict=True))
            torch.testing.assert_close(logged(), losses)
            assert isinstance(held, Broken)

    run_ranks(body, 2 if estimator == "rolling" else 1)


SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
SHARED = {
    "moe_shared_expert_intermediate_size": 16,
    "recompute_granularity": "selective",
    "recompute_modules": ["moe", "shared_experts"],
}
#: the transformer layer recomputes each MLP that is not Megatron-Core's own MoE layer
MLPS = SELECTIVE | {"recompute_modules": ["mlp"]}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize("estimator", ["rolling", "exact"])
@pytest.mark.parametrize(
    "how",
    [{}, SELECTIVE, SHARED, MLPS, FULL],
    ids=["plain", "recompute the layer", "recompute shared experts", "recompute MLPs", "recompute all"],
)
def test_choices_that_move_the_bias_count_once(estimator: str, how: dict[str, Any]) -> None:
    def body(rank: int, world: int) -> None:
        with megatron():
            config = config_of(**BIAS, **how, finalize_model_grads_func=None)
            chunks = chunks_of(config, moe_layer_spec(config, estimator=estimator))
            trainer = Trainer(chunks, exact=estimator == "exact")
            trainer.backward(0)
            for layer in chunks[0].decoder.layers:  # type: ignore[union-attr]
                counts = layer.mlp.router.local_tokens_per_expert
                assert counts.dtype == torch.int64
                assert counts.sum() == 2 * trainer.data(0)[..., 1:].numel()

    run_ranks(body, 1)


def test_evaluation_between_micro_batches_changes_nothing() -> None:
    def body(rank: int, world: int) -> None:
        with megatron():
            found = []
            for evaluates in (False, True):
                torch.manual_seed(0)
                trainer = trainer_of(**BIAS)
                real = trainer.forward

                def forward(iterator: Any, model: Any, real: Any = real, evaluates: bool = evaluates) -> Any:
                    ids = next(iterator)
                    if evaluates:
                        with torch.no_grad():
                            real(iter([ids.flip(1)]), model)
                            real(iter([ids.flip(0)]), model.eval())
                        model.train()
                    return real(iter([ids]), model)

                trainer.forward = forward
                trainer.backward(0)
                if evaluates:
                    trainer.forward = real
                    trainer.schedule(trainer.data(3), forward_only=True)
                found.append((gradients(trainer), biases(trainer), logged()))
            (wanted, moved, losses), (got, moved_too, losses_too) = found
            assert_equal(got, wanted, rtol=0, atol=0)
            assert all(torch.equal(*pair) for pair in zip(moved, moved_too, strict=True))
            torch.testing.assert_close(losses_too, losses, rtol=0, atol=0)

    run_ranks(body, 1)


def test_two_models_train_as_each_alone() -> None:
    def body(rank: int, world: int) -> list[list[Any]]:
        with megatron(**{EP: 2}):
            torch.manual_seed(0)
            models = [trainer_of(**{EP: 2}), trainer_of(estimator="exact", num_layers=1, **{EP: 2})]
            copies = [[p.detach().clone() for p in m.chunks[0].parameters()] for m in models]
            found = []
            for step in range(2):
                for model in models:
                    model.backward(step)
                    model.update()
            found = [[p.detach().clone() for p in m.chunks[0].parameters()] for m in models]
            for number, weights in enumerate(copies):
                alone = trainer_of("exact" if number else "rolling", num_layers=2 - number, **{EP: 2})
                with torch.no_grad():
                    for p, value in zip(alone.chunks[0].parameters(), weights, strict=True):
                        p.copy_(value)
                for step in range(2):
                    alone.backward(step)
                    alone.update()
                for p, value in zip(alone.chunks[0].parameters(), found[number], strict=True):
                    assert torch.equal(p, value)

    run_ranks(body, 2)


def test_bf16_trains_and_keeps_the_bias_in_fp32() -> None:
    def body(rank: int, world: int) -> None:
        with megatron():
            trainer = trainer_of(bf16=True, **BIAS)
            assert {p.dtype for p in trainer.chunks[0].parameters()} == {torch.bfloat16}
            losses = []
            for _ in range(12):
                losses.append(float(torch.stack(trainer.backward(0)).sum(0)[0]))
                trainer.update()
            assert losses[-1] < 0.7 * losses[0]
            for bias in biases(trainer):
                assert bias.dtype == torch.float32
                steps_taken = bias / 0.1
                torch.testing.assert_close(steps_taken, steps_taken.round(), rtol=0, atol=1e-4)
                assert bias.any()

    run_ranks(body, 1)


def test_a_gradient_scaler_scales_the_losses_gradients_too() -> None:
    def body(rank: int, world: int) -> tuple[Any, Any]:
        with megatron():
            found = []
            for how in ({}, {"grad_scale_func": lambda loss: loss * 8}):
                for per_token in (False, True):
                    torch.manual_seed(0)
                    trainer = trainer_of(moe_z_loss_coeff=0.1, calculate_per_token_loss=per_token, **how)
                    trainer.backward(0)
                    found.append(gradients(trainer))
            for plain, scaled in zip(found[:2], found[2:], strict=True):
                assert_equal({key: value / 8 for key, value in scaled.items()}, plain, rtol=1e-6)

    run_ranks(body, 1)


def overflowing(fp16: bool, steps: tuple[int, ...], ep: int, distributed: bool, rank: int, world: int) -> Any:
    """Train steps. In fp16, the second one has a gradient that is not finite in one micro-batch of the last rank.

    Returns which steps were applied, the bias before and after each, and the weights.
    """
    with megatron(**{EP: ep}):
        dtype = torch.float16 if fp16 else torch.float32
        config = config_of(**BIAS, fp16=fp16, params_dtype=dtype, **{EP: ep})
        chunks = chunks_of(config, moe_layer_spec(config), alone=True)
        number, seen, applied = 0, [], []

        def forward(iterator: Any, model: Any) -> Any:
            nonlocal number
            out, loss = forward_layers(False, iterator, model)
            number, huge = number + 1, 1e6 if fp16 and (rank, number) == (world - 1, 2) else 1.0
            seen.append(biases(trainer))

            def scaled(output: Tensor) -> tuple[Tensor, ...]:
                mean, reported = loss(output)
                return mean * huge, reported

            return out, scaled

        trainer = Trainer(chunks, forward, exact=False, distributed_optimizer=distributed, fp16=fp16)
        for step in steps:
            trainer.backward(step)
            applied.append(bool(trainer.optimizer.step()[0]))
            assert layers(trainer)[0].balancer.previous_step.micro_batches == 2
        weights = parts(chunks)
        return applied, [torch.stack(found) for found in seen[::2]], torch.stack(biases(trainer)), weights


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("ep", [1, 2])
def test_an_overflow_on_one_rank_skips_the_step_on_all_of_them(ep: int, distributed: bool) -> None:
    """Neither weights nor biases move, and the next steps are those of a process that never saw the skipped one."""
    [(_, before, bias, weights)] = run_ranks(partial(overflowing, False, (0, 2, 3), 1, False), 1)
    found = run_ranks(partial(overflowing, True, (0, 1, 2, 3), ep, distributed), 2)
    for applied, *_ in found:
        assert applied == [True, False, True, True]
    for _, seen, last, _ in found:
        wanted = [before[0], before[1], *before[1:], bias]
        assert all(torch.equal(*pair) for pair in zip([*seen, last], wanted, strict=True))
    right = joined([weights])
    for name, value in joined([weights for *_, weights in found]).items():
        assert oracle.relative_error(value.float(), right[name]) < 0.01, name


def test_a_bias_that_is_loaded_after_a_skipped_step_stays() -> None:
    def body(rank: int, world: int) -> None:
        with megatron():
            trainer = trainer_of(**BIAS)
            before = biases(trainer)
            trainer.backward(0)
            assert not any(torch.equal(*pair) for pair in zip(biases(trainer), before, strict=True))
            for layer in layers(trainer):
                layer.router.expert_bias.copy_(torch.arange(E))
            found = []
            hook = layers(trainer)[0].register_forward_hook(lambda *_: found.extend(biases(trainer)))
            trainer.backward(1)
            hook.remove()
            assert all(torch.equal(bias, torch.arange(E).float()) for bias in found)

    run_ranks(body, 1)


def auxiliary_gradient(estimator: str, micro_batches: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Return the auxiliary loss's gradient of a router's weight in the second step, and the weight."""
    found = []
    with megatron(**{EP: world}):
        for coefficient in (1.0, 0.0):
            torch.manual_seed(0)
            config = config_of(
                num_layers=1, calculate_per_token_loss=True, moe_aux_loss_coeff=coefficient, **{EP: world}
            )
            chunks = chunks_of(config, moe_layer_spec(config, estimator=estimator), alone=True)
            trainer = Trainer(chunks, partial(forward_layers, True), micro_batches, exact=False)
            trainer.backward(0)
            trainer.backward(1)
            found.append(layers(trainer)[0].router.weight)
        return found[0].main_grad - found[1].main_grad, found[0].detach()


def estimated_gradient(weight_ED: Tensor, estimator: str, micro_batches: int) -> Tensor:
    """Return what :func:`auxiliary_gradient` must be: per valid token of the step, by the counts that are estimated."""
    table, weight_ED = embeddings().double(), weight_ED.double().requires_grad_()
    previous = loss = torch.zeros(E + 1, dtype=torch.float64)  # counts and tokens
    for step in range(2):
        ids = sequences(step)[:, :S]
        valid = torch.arange(S) < lengths(ids)[:, None]
        terms, known = [], torch.zeros_like(previous)
        parts = [part.chunk(micro_batches) for part in (ids, valid)]
        for n, (ids_BS, valid_BS) in enumerate(zip(*parts, strict=True), start=1):
            probs_TE = (table[ids_BS[valid_BS]] @ weight_ED.T).softmax(-1)
            counts_E = probs_TE.topk(K).indices.flatten().bincount(minlength=E).double()
            known = known + torch.cat((counts_E, torch.tensor([len(probs_TE)])))
            load = known + previous * ((micro_batches - n) / micro_batches if estimator == "carry" else 0.0)
            terms.append(E / K * (load[:-1] / load[-1] * probs_TE.sum(0)).sum())
        previous, loss = known, torch.stack(terms).sum() / known[-1]
    return torch.autograd.grad(loss, weight_ED)[0]


@pytest.mark.parametrize(("world", "micro_batches"), [(1, 4), (2, 2)])
@pytest.mark.parametrize("estimator", ["rolling", "carry"])
def test_a_loss_per_token_of_micro_batches_of_unequal_length(estimator: str, world: int, micro_batches: int) -> None:
    for found, weight_ED in run_ranks(partial(auxiliary_gradient, estimator, micro_batches), world):
        wanted = estimated_gradient(weight_ED, estimator, micro_batches)
        assert oracle.relative_error(found, wanted) < 1e-5


def test_experts_without_tokens() -> None:
    how = BIAS | {"alone": True, "moe_router_load_balancing_type": "seq_aux_loss"}
    initial = joined([run_ranks(partial(run, steps=0, **how), 1)[0].parts["initial"]])
    for key, value in initial.items():
        if key.endswith("expert_bias"):
            value[2:] = -100  # those of the second rank
    one, ep = (
        run_ranks(partial(run, initial=initial, **(how | more)), world)
        for world, more in ((1, {"micro_batches": 4}), (2, {EP: 2}))
    )
    assert_same_training(ep, one)
    whole = joined([r.parts["gradients"] for r in ep])
    experts = {key: value for key, value in whole.items() if "experts" in key}
    assert experts
    assert all(value[:2].any() and not value[2:].any() for value in experts.values())


def test_the_end_of_a_step_is_seen_without_finalize_model_grads() -> None:
    def body(rank: int, world: int) -> None:
        with megatron():
            trainer = trainer_of(finalize_model_grads_func=None)
            trainer.backward(0)
            wanted = gradients(trainer)
            trainer.backward(1)
            trainer.backward(0)
            assert_equal(gradients(trainer), wanted)

    run_ranks(body, 1)


def test_a_loop_that_never_ends_a_step_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_MOST", 5)

    def body(rank: int, world: int) -> None:
        with megatron():
            config = config_of()
            [model] = chunks_of(config, moe_layer_spec(config), alone=True)
            with pytest.raises(
                ValueError, match="config.finalize_model_grads_func: 5 micro-batches without a call of it"
            ):
                for _ in range(6):
                    model(torch.randn(4, 1, 16))[0].sum().backward()

    run_ranks(body, 1)


def test_a_plain_loop_that_updates_without_ending_the_step_is_told_so() -> None:
    def body(rank: int, world: int) -> None:
        with megatron():
            config = config_of()
            [model] = chunks_of(config, moe_layer_spec(config), alone=True)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                model(torch.randn(4, 1, 16))[0].sum().backward()
            optimizer.step()
            with pytest.raises(
                ValueError, match="config.finalize_model_grads_func: 2 micro-batches without a call of it"
            ):
                model(torch.randn(4, 1, 16))

    run_ranks(body, 1)


def test_experts_are_drawn_as_in_megatrons_own_layer() -> None:
    """``down_proj`` adds to the residual stream, so its standard deviation is smaller."""

    def body(rank: int, world: int) -> list[float]:
        with megatron():
            config = config_of(hidden_size=64, moe_ffn_hidden_size=64, init_method_std=0.02, num_layers=8)
            [model] = chunks_of(config, moe_layer_spec(config), alone=True)
            experts = next(m for m in model.modules() if hasattr(m, "down_proj"))
            return [float(experts.gate_up_proj.std()), float(experts.down_proj.std())]

    [(up, down)] = run_ranks(body, 1)
    assert up == pytest.approx(0.02, rel=0.05) and down == pytest.approx(0.02 / 4, rel=0.05)
