"""A DeepSpeed script that changes one import: the layer with the signature of ``deepspeed.moe.layer.MoE``.

T tokens, D hidden, E experts.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

deepspeed = pytest.importorskip("deepspeed", reason="needs DeepSpeed, which `make engines` installs")
pytestmark = pytest.mark.engines

from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.moe.layer import MoE as DeepSpeedMoE  # noqa: E402
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402

from equimoe.moe.engines.deepspeed import MoE  # noqa: E402
from tests.helpers import trained  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402

T, D, E, STEPS, COEFFICIENT = 16, 8, 4, 3, 0.1


class Toy(nn.Module):
    """As DeepSpeed's tutorial: a layer, experts, a layer. Experts are two linear layers."""

    def __init__(self, kind: type[nn.Module], ep_size: int, k: int, **how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        expert = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.moe = kind(D, expert, num_experts=E, ep_size=ep_size, k=k, **{"drop_tokens": False} | how)
        gate = self.moe.router if isinstance(self.moe, MoE) else self.moe.deepspeed_moe.gate.wg
        torch.nn.init.normal_(gate.weight, std=2.0, generator=torch.Generator().manual_seed(1))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y_TD, l_aux, exp_counts = self.moe(self.first(x_TD))
        return self.last(y_TD), l_aux, exp_counts


def data(step: int) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(step))


def loss_of(model: Any, x_TD: Tensor, coefficient: float = COEFFICIENT) -> Tensor:
    y_TD, l_aux, _ = model(x_TD)
    return (y_TD - x_TD.flip(1)).square().mean() + coefficient * l_aux


@cache
def one_process(k: int, steps: tuple[int, ...] = (*range(STEPS),), coefficient: float = COEFFICIENT) -> Any:
    """The names are those of DeepSpeed's layer."""
    model = Toy(MoE, 1, k)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in steps:
        loss_of(model, data(step), coefficient).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


def config(stage: int, passes: int, world: int) -> dict[str, Any]:
    each = T // world
    return {
        "train_micro_batch_size_per_gpu": each,
        "gradient_accumulation_steps": passes,
        "train_batch_size": each * passes * world,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def start(model: nn.Module, stage: int, passes: int, world: int, **section: Any) -> Any:
    """DeepSpeed's engine for a model, with parameter groups as in DeepSpeed's tutorial."""
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage, passes, world) | section)[0]


def train(
    kind: type[nn.Module],
    rank: int,
    world: int,
    stage: int,
    ep: int,
    passes: int,
    k: int,
    stray: bool = False,
    **how: Any,
) -> tuple[dict[str, Tensor], list[float]]:
    """Run the script; a step's micro-batches are all the same, so that counts so far are those of the whole step."""
    model = Toy(kind, ep, k, **how)
    engine = start(model, stage, passes, world)
    losses = []
    for step in range(STEPS):
        for _ in range(passes):
            loss = loss_of(engine, data(step).chunk(world)[rank])
            engine.backward(loss)
            if stray:
                engine(data(99))
            engine.step()
        losses.append(float(loss))
    return {name: value.clone() for name, value in model.state_dict().items()}, losses


def globally(state: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """A rank's state with its experts numbered among all."""
    found = {}
    for name, value in state.items():
        before, sep, after = name.partition("deepspeed_experts.")
        local, _, rest = after.partition(".")
        found[f"{before}{sep}{int(local) + first}.{rest}" if sep else name] = value
    return found


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_script_equals_one_process(stage: int, k: int) -> None:
    def rank_main(rank: int, world: int) -> list[Any]:
        return [
            globally(train(MoE, rank, world, stage, ep, passes, k)[0], (rank % ep) * (E // ep))
            for ep in (1, 2)
            for passes in (1, 2)
        ]

    right = one_process(k)
    for states in zip(*run_ranks(rank_main, 2), strict=True):
        joined = states[0] | states[1]
        assert joined.keys() == right.keys()
        error, name = trained.worst(joined, right)
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "section", "skipped", "tolerance"),
    [
        (torch.bfloat16, {"bf16": {"enabled": True}}, 0, 0.03),
        (torch.float16, {"fp16": {"enabled": True, "initial_scale_power": 18, "hysteresis": 1}}, 2, 0.01),
    ],
)
def test_weights_of_16_bits(stage: int, dtype: torch.dtype, section: Any, skipped: int, tolerance: float) -> None:
    """DeepSpeed keeps fp32 copies, which train as in fp32. ``l_aux`` is scaled with the loss, and after updates that
    overflow skips, a new step begins."""

    def rank_main(rank: int, world: int) -> Any:
        get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed asks whether the CPU is fast at it
        model = Toy(MoE, 2, 2)
        engine = start(model, stage, 2, world, **section)
        applied = []
        for step in range(5):
            for _ in range(2):
                engine.backward(loss_of(engine, data(step).chunk(world)[rank].to(dtype)))
                engine.step()
            applied += [step] * engine.was_step_applied()
        assert {p.dtype for p in model.parameters()} == {dtype}
        for parameter in model.parameters():
            parameter.data = safe_get_full_fp32_param(parameter)
        return tuple(applied), globally(model.state_dict(), rank * E // 2)

    (applied, first), (_, second) = run_ranks(rank_main, 2)
    assert applied == (*range(skipped, 5),)
    joined = first | second
    error, name = trained.worst(joined, one_process(2, applied))
    assert error < tolerance, (name, error)
    gate = {name: value for name, value in joined.items() if "gate" in name}
    errors = [trained.worst(gate, one_process(2, applied, factor))[0] for factor in (COEFFICIENT, 0.0)]
    assert errors[1] > 2 * errors[0]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("ep", [1, 2])
def test_an_overflow_on_one_rank_skips_the_step_on_all_of_them(ep: int, stage: int) -> None:
    """One micro-batch of the second step has a gradient that is not finite."""

    def rank_main(rank: int, world: int) -> Any:
        get_accelerator().is_fp16_supported = lambda: True
        model = Toy(MoE, ep, 2)
        fp16 = {"enabled": True, "initial_scale_power": 10, "hysteresis": 1}
        engine, applied = start(model, stage, 2, world, fp16=fp16), []
        for step in range(5):
            for m in range(2):
                huge = 1e6 if (rank, step, m) == (1, 1, 0) else 1.0
                engine.backward(huge * loss_of(engine, data(step).chunk(world)[rank].half()).float())
                engine.step()
            applied += [step] * engine.was_step_applied()
        assert model.moe.balancer.previous_step.micro_batches == 2
        for parameter in model.parameters():
            parameter.data = safe_get_full_fp32_param(parameter)
        return tuple(applied), globally(model.state_dict(), rank * E // 2 if ep == 2 else 0)

    (applied, first), (also, second) = run_ranks(rank_main, 2)
    assert applied == also == (0, 2, 3, 4)
    error, name = trained.worst(first | second, one_process(2, applied))
    assert error < 0.01, (name, error)


@pytest.mark.parametrize("stage", [0, 2])
def test_several_forwards_in_one_backward(stage: int) -> None:
    """As for pairs of a preference loss: ``l_aux`` has its full gradient, and all forwards belong to one step, which
    ends with the update."""
    forwards = 4

    def rank_main(rank: int, world: int) -> Any:
        found = []
        for passes in (1, 2):
            model = Toy(MoE, 1, 2)
            engine = start(model, stage, passes, world)
            for step in range(STEPS):
                for _ in range(passes):
                    parts = data(step).chunk(world)[rank].chunk(forwards)
                    engine.backward(torch.stack([loss_of(engine, x_TD) for x_TD in parts]).mean())
                    engine.step()
                previous = model.moe.balancer.previous_step
                assert previous.micro_batches == passes * forwards and int(previous.tokens) == passes * T
            found.append({name: value.clone() for name, value in model.state_dict().items()})
        return found

    for states in run_ranks(rank_main, 2):
        for state in states:
            error, name = trained.worst(state, one_process(2))
            assert error < 1e-5, (name, error)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_forward_without_a_backward_changes_nothing(stage: int) -> None:
    def rank_main(rank: int, world: int) -> Any:
        return train(MoE, rank, world, stage, 1, 2, 2, stray=True)[0]

    for state in run_ranks(rank_main, 2):
        error, name = trained.worst(state, one_process(2))
        assert error < 1e-5, (name, error)


def test_a_forward_without_its_backward_is_refused_before_the_update() -> None:
    def rank_main(rank: int, world: int) -> None:
        engine = start(Toy(MoE, 1, 2), 1, 1, world)
        kept = loss_of(engine, data(1))
        engine.backward(loss_of(engine, data(0)))
        with pytest.raises(ValueError, match="the backward of a training forward has not run"):
            engine.step()
        del kept

    run_ranks(rank_main, 1)


def test_only_the_import_changes() -> None:
    """Both train, from the same weights; ours reaches no higher loss. DeepSpeed's state dict loads into ours."""

    def rank_main(rank: int, world: int) -> Any:
        theirs, their_losses = train(DeepSpeedMoE, rank, world, stage=1, ep=2, passes=1, k=1)
        ours, our_losses = train(MoE, rank, world, stage=1, ep=2, passes=1, k=1)
        assert ours.keys() == theirs.keys()
        Toy(MoE, 2, 1).load_state_dict(theirs)
        return their_losses, our_losses

    for theirs, ours in run_ranks(rank_main, 2):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and ours[-1] <= theirs[-1] * 1.01


def test_an_evaluation_and_a_capacity() -> None:
    def rank_main(rank: int, world: int) -> Any:
        model = Toy(MoE, 1, 1, drop_tokens=True, capacity_factor=0.5, eval_capacity_factor=8.0, min_capacity=1)
        x_TD = data(0)
        used = torch.arange(T) < T // 2
        y_TD, l_aux, exp_counts = model.moe(x_TD, used)
        assert exp_counts.sum() == T // 2 and not y_TD[T // 2 :].any() and l_aux.requires_grad
        model.eval()
        y_TD, l_aux, exp_counts = model.moe(x_TD)
        assert exp_counts.sum() == T and bool(y_TD.any(1).all()) and not l_aux.requires_grad
        model.train()
        dropped_TD = model.moe(x_TD)[0]
        kept = int(dropped_TD.any(1).sum())
        assert kept <= E * -(-T // (2 * E)) < T
        assert int(Toy(MoE, 1, 1, drop_tokens=True, min_capacity=T).moe(x_TD)[0].any(1).sum()) == T
        y_TD, *_ = Toy(MoE, 1, 1, use_residual=True)(x_TD)
        y_TD.sum().backward()

    run_ranks(rank_main, 1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"noisy_gate_policy": "Jitter"}, "noisy_gate_policy"),
        ({"use_tutel": True}, "use_tutel"),
        ({"enable_expert_tensor_parallelism": True}, "enable_expert_tensor_parallelism"),
        ({"ep_size": 3}, "ep_size=3: must divide num_experts=4"),
    ],
)
def test_what_the_layer_lacks_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoE(D, nn.Linear(D, D), **{"num_experts": E} | how)
    with pytest.raises(ValueError, match="call deepspeed.initialize first"):
        MoE(D, nn.Linear(D, D), num_experts=E, ep_size=2)(data(0))


def test_experts_that_the_ranks_cannot_split_are_refused() -> None:
    def rank_main(rank: int, world: int) -> None:
        with pytest.raises(ValueError, match="ep_size=2: must divide the number of ranks, 1"):
            train(MoE, rank, world, stage=1, ep=2, passes=1, k=1)

    run_ranks(rank_main, 1)


@pytest.mark.parametrize(("factor", "least", "rows"), [(0.01, 4, 4), (1.0, 1, 63)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_capacity_is_deepspeeds(factor: float, least: int, rows: int, masked: bool) -> None:
    """Masked tokens count, as in DeepSpeed, and ``min_capacity`` is not rounded up."""

    def rank_main(rank: int, world: int) -> int:
        experts, tokens = 3, 187
        layer = MoE(D, nn.Identity(), experts, k=1, capacity_factor=factor, min_capacity=least)
        nn.init.zeros_(layer.router.weight)
        with torch.no_grad():
            layer.router.weight[0] = 1.0
        used = torch.arange(tokens) < 100 if masked else None
        return int(layer(torch.ones(tokens, D), used)[0].any(1).sum())

    assert run_ranks(rank_main, 1) == [rows]
