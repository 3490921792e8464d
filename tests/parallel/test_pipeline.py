"""Checks that a pipeline of stages equals the same decoder in one process, under every schedule."""

from __future__ import annotations

import re
import time
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from equimoe.moe import BalanceConfig, MoE, MoEConfig, Placement, RouterConfig
from equimoe.moe.balance import Balancer, counting_pass
from equimoe.moe.collectives import Axis, world_axis
from equimoe.moe.model import Decoder
from equimoe.moe.parallel import build_mesh, parallelize, stages
from equimoe.moe.parallel.degrees import ParallelConfig
from equimoe.moe.parallel.pipeline import Pipeline
from equimoe.moe.parallel.stages import SCHEDULES, SPLITS_BACKWARD, check_pipeline, split, stage_ids
from tests.helpers import oracle
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but

VOCAB, SEQ, HIDDEN, SEQUENCES = 11, 5, 8, 2
GLOBAL = BalanceConfig(coefficient=0.5, estimator="exact")
#: schedule -> stages per rank
PER_RANK = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "interleaved_zero_bubble": 2, "zbv": 2}
SPLIT = ("interleaved_zero_bubble", "zbv")
#: schedules that run correctly with the installed torch
USABLE = [name for name in SCHEDULES if SPLITS_BACKWARD or name not in SPLIT]


def make(layers: int, balance: BalanceConfig = GLOBAL, moe_every: int = 1, again: bool = False) -> Decoder:
    torch.manual_seed(0)
    moe = MoEConfig(
        hidden_size=HIDDEN,
        intermediate_size=6,
        num_experts=4,
        top_k=2,
        router=RouterConfig(z_loss=0.05),
        balance=balance,
        shared_intermediate_size=4,
        init_std=0.4,
    )
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "seq_len": SEQ, "num_layers": layers, "num_heads": 2}
    model = Decoder(**sizes, intermediate_size=6, moe=moe, moe_every=moe_every, recompute_blocks=again).double()
    for layer in experts_of(model):
        layer.place(Placement())  # one stage has all tokens
    return model


def experts_of(model: torch.nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def data(micro_batches: int, step: int = 0) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return inputs, labels (-100: ignored) and masks; each sequence has a different number of valid tokens."""
    generator = torch.Generator().manual_seed(step)
    shape = (micro_batches * SEQUENCES, SEQ)
    inputs = torch.randint(VOCAB, shape, generator=generator)
    # each sequence is of another domain, so that the counts of micro-batches differ
    inputs = torch.where(
        torch.rand(shape, generator=generator) < 0.5, inputs, (torch.arange(len(inputs)) // 2)[:, None]
    )
    lengths = torch.randint(1, SEQ + 1, (len(inputs), 1), generator=generator)
    masks = torch.arange(SEQ) < lengths
    labels = torch.where(masks, torch.randint(VOCAB, shape, generator=generator), -100)
    return list(inputs.chunk(micro_batches)), list(labels.chunk(micro_batches)), list(masks.chunk(micro_batches))


def shares_of(labels: list[Tensor]) -> Any:
    """Return the step's loss function: each token's part of the mean over the step's valid tokens."""
    total = int(sum((part >= 0).sum() for part in labels))

    def shares(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        nats = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none")
        return nats.view(labels_BS.shape) / total

    return shares


@lru_cache
def alone(micro_batches: int, passes: int, layers: int, precision: Any = nullcontext, **options: Any) -> list[dict]:
    """Return loss and gradients of two steps in one process, with the step's data split into ``passes``."""
    model = make(layers, **options)
    if precision is not nullcontext:
        model = model.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(2):
        inputs, labels, masks = (torch.cat(parts).chunk(passes) for parts in data(micro_batches, step))
        loss_fn = shares_of(list(labels))
        with counting_pass(), precision():
            for x, mask in zip(inputs, masks, strict=True):
                model(x, mask)
        shares = []
        for x, y, mask in zip(inputs, labels, masks, strict=True):
            with precision():
                logits = model(x, mask)
            shares.append(loss_fn(logits, y))
            shares[-1].sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append({"shares": [part.detach() for part in shares], "gradients": gradients})
        optimizer.step()
        optimizer.zero_grad()
    return found


def layers_of(schedule: str, world: int) -> int:
    """Use one layer more than stages, so that stages differ in length."""
    return world * PER_RANK[schedule] + 1


def stages_of(axis: Axis, schedule: str, **options: Any) -> list[Decoder]:
    model = make(layers_of(schedule, axis.size), **options)
    ids = stage_ids(schedule, axis.size, axis.rank, PER_RANK[schedule])
    return [split(model, axis.size * PER_RANK[schedule], i) for i in ids]


def pipeline_of(axis: Axis, schedule: str, micro_batches: int, **options: Any) -> Pipeline:
    stages = stages_of(axis, schedule, **options)
    shape = (SEQUENCES, SEQ, HIDDEN)
    return Pipeline(stages, axis, schedule, micro_batches, torch.device("cpu"), shape, torch.float64)


def train(pipeline: Pipeline, between: Any = None) -> list[dict[str, Any]]:
    """Return this rank's losses and gradients of two steps."""
    named = [item for stage in pipeline.stages for item in stage.named_parameters()]
    optimizer = torch.optim.SGD([p for _, p in named], lr=0.1)
    found = []
    for step in range(2):
        if between is not None:
            between(pipeline)
        inputs, labels, masks = data(pipeline.micro_batches, step)
        begin(pipeline, masks)
        pipeline.count(inputs, {"mask": masks})
        shares = pipeline.step(inputs, labels, {"mask": masks}, shares_of(labels))
        found.append({"shares": shares, "gradients": {name: p.grad.clone() for name, p in named}})
        optimizer.step()
        optimizer.zero_grad()
        for step in pipeline.steps:
            step.end()
    return found


def begin(pipeline: Pipeline, masks: list[Tensor]) -> None:
    """Start a step as an engine does."""
    for step in pipeline.steps:
        step.begin(pipeline.micro_batches, torch.stack(masks).sum())


def compare(results: list[list[dict[str, Any]]], want: list[dict[str, Any]], tolerance: float = 1e-9) -> None:
    """Only the last stage has losses, and each gradient must be on exactly one stage."""
    for step, wanted in enumerate(want):
        shares = [result[step]["shares"] for result in results if result[step]["shares"]]
        assert len(shares) == 1
        assert oracle.relative_error(torch.cat(shares[0]), torch.cat(wanted["shares"])) < tolerance
        gradients = [item for result in results for item in result[step]["gradients"].items()]
        assert sorted(name for name, _ in gradients) == sorted(wanted["gradients"])
        for name, gradient in gradients:
            assert oracle.relative_error(gradient, wanted["gradients"][name]) < tolerance, (step, name)


@pytest.mark.parametrize("world", slow_but([2], [2, 4]))
@pytest.mark.parametrize("schedule", USABLE)
def test_equals_the_whole_batch_in_one_go(schedule: str, world: int) -> None:
    """Experts are in every second block, so some stages have none."""
    cases = [(micro_batches, every) for micro_batches in (4, 8) for every in (1, 2)]

    def script(rank: int, world: int) -> list[Any]:
        axis = world_axis()
        return [train(pipeline_of(axis, schedule, number, moe_every=every)) for number, every in cases]

    results = run_ranks(script, world)
    for i, (number, every) in enumerate(cases):
        compare([r[i] for r in results], alone(number, 1, layers_of(schedule, world), moe_every=every))


@pytest.mark.parametrize("scope", slow_but(["micro"], ["micro", "sequence"]))
@pytest.mark.parametrize("schedule", USABLE)
def test_local_scopes_equal_the_same_micro_batches_in_one_process(schedule: str, scope: Any) -> None:
    balance = replace(GLOBAL, scope=scope)

    def script(rank: int, world: int) -> Any:
        return train(pipeline_of(world_axis(), schedule, 4, balance=balance))

    # the reference must know the number of micro-batches in its first step; a pipeline always does
    want = alone(4, 4, layers_of(schedule, 2), balance=replace(balance, micro_batches=4))
    compare(run_ranks(script, 2), want)


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name not in SPLIT])
def test_recomputation(schedule: str) -> None:
    def script(rank: int, world: int) -> Any:
        return train(pipeline_of(world_axis(), schedule, 4, again=True))

    compare(run_ranks(script, 2), alone(4, 1, layers_of(schedule, 2)))


@pytest.mark.parametrize("schedule", [name for name in USABLE if name in SPLIT])
def test_recomputation_under_a_split_backward_is_refused(schedule: str) -> None:
    def script(rank: int, world: int) -> str:
        with pytest.raises(ValueError) as error:
            pipeline_of(world_axis(), schedule, 4, again=True)
        return str(error.value)

    for text in run_ranks(script, 2):
        assert f"parallel.schedule={schedule!r}" in text and "model.recompute=False" in text


@pytest.mark.parametrize("schedule", USABLE)
def test_between_steps(schedule: str) -> None:
    """Evaluations, counts without a step, interrupted steps and steps without an update must not affect later steps."""

    def between(pipeline: Pipeline) -> None:
        inputs, labels, masks = data(4, step=9)
        found = pipeline.evaluate(inputs[:3], labels[:3], {"mask": masks[:3]}, shares_of(labels))
        scored.append([part.clone() for part in found])
        assert all(not layer.balancer.visits for stage in pipeline.stages for layer in experts_of(stage))
        begin(pipeline, masks)
        pipeline.count(inputs, {"mask": masks})
        pipeline.step(inputs, labels, {"mask": masks}, shares_of(labels))
        for stage, step in zip(pipeline.stages, pipeline.steps, strict=True):
            stage.zero_grad()
            step.discard()
        begin(pipeline, masks)
        pipeline.count(inputs, {"mask": masks})
        for stage, step in zip(pipeline.stages, pipeline.steps, strict=True):
            with step.micro_batch():
                stage(inputs[0] if stage.embedding is not None else torch.randn(SEQUENCES, SEQ, HIDDEN).double())

    scored: list[list[Tensor]] = []

    def script(rank: int, world: int) -> Any:
        return train(pipeline_of(world_axis(), schedule, 4), between), scored[0]

    results = run_ranks(script, 2)
    compare([result for result, _ in results], alone(4, 1, layers_of(schedule, 2)))
    inputs, labels, masks = data(4, step=9)
    want = alone_losses(make(layers_of(schedule, 2)), inputs[:3], labels, masks)
    got = [parts for _, parts in results if parts]
    assert len(got) == 1 and len(got[0]) == 3
    assert oracle.relative_error(torch.cat(got[0]), torch.cat(want)) < 1e-12


@torch.no_grad()
def alone_losses(model: Decoder, inputs: list[Tensor], labels: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    loss_fn = shares_of(labels)
    return [loss_fn(model(x, mask), y) for x, y, mask in zip(inputs, labels, masks, strict=False)]


def test_rolling_sees_what_the_schedule_has_run() -> None:
    """When 1F1B runs backward k on stage s of P, min(m, k + P - s) forwards have run; under GPipe all of them."""
    rolling = replace(GLOBAL, estimator="rolling")

    def script(rank: int, world: int, schedule: str) -> list[int]:
        seen = []
        view = Balancer.view

        def spy(self: Balancer, visit: Any) -> Any:
            found = view(self, visit)
            seen.append((found.seen, found.micro_batches))
            return found

        Balancer.view = spy  # type: ignore[method-assign]
        pipeline = pipeline_of(world_axis(), schedule, 8, balance=rolling)
        inputs, labels, masks = data(8)
        begin(pipeline, masks)
        pipeline.step(inputs, labels, {"mask": masks}, shares_of(labels))
        assert {number for _, number in seen} == {8}
        blocks = len(pipeline.stages[0].blocks)
        assert all(len(set(seen[i : i + blocks])) == 1 for i in range(0, len(seen), blocks))
        return [number for number, _ in seen[::blocks]]

    for rank, seen in enumerate(run_ranks(script, 4, "1f1b")):
        assert seen == [min(8, k + 4 - rank) for k in range(8)]
    assert run_ranks(script, 4, "gpipe") == [[8] * 8] * 4


def test_gpipe_runs_no_counting_pass() -> None:
    def script(rank: int, world: int, schedule: str) -> int:
        pipeline = pipeline_of(world_axis(), schedule, 4)
        calls: list[int] = []
        for stage in pipeline.stages:
            stage.register_forward_pre_hook(lambda *_: calls.append(1))
        pipeline.count(data(4)[0])
        return len(calls)

    assert run_ranks(script, 2, "gpipe") == [0, 0]
    assert run_ranks(script, 2, "interleaved_1f1b") == [8, 8]


@pytest.mark.parametrize("schedule", [name for name in USABLE if name in ("1f1b", "zbv")])
def test_autocast_covers_the_forward_alone(schedule: str) -> None:
    """Products are bf16 from fp32 weights, bitwise equal to one process that runs the same micro-batches."""
    precision = partial(torch.autocast, "cpu", torch.bfloat16)

    def script(rank: int, world: int) -> Any:
        stages = [stage.float() for stage in stages_of(world_axis(), schedule)]
        shape = (SEQUENCES, SEQ, HIDDEN)
        device = torch.device("cpu")
        return train(Pipeline(stages, world_axis(), schedule, 4, device, shape, precision=precision))

    compare(run_ranks(script, 2), alone(4, 4, layers_of(schedule, 2), precision), 1e-5)


def half(parts: tuple[list[Tensor], ...], rank: int) -> tuple[list[Tensor], ...]:
    """Return one of two data-parallel ranks' share of every micro-batch."""
    return tuple([part.chunk(2)[rank].contiguous() for part in which] for which in parts)


@pytest.mark.parametrize("data_parallel", slow_but(["fsdp"], ["ddp", "fsdp"]))
@pytest.mark.parametrize("schedule", slow_but([USABLE[1], USABLE[-1]], USABLE))
def test_with_stages_over_two_ranks(schedule: str, data_parallel: Any) -> None:
    """Run 2 x 2 ranks; the two of a stage hold different sequences, and half of the experts or of all weights each.

    Counts and gradients are sums over them.
    """
    split_experts = {"ep": 2} if data_parallel == "ddp" else {}

    def script(rank: int, world: int) -> list[dict[str, Any]]:
        mesh = build_mesh(ParallelConfig(pp=2, data_parallel=data_parallel, **split_experts))
        stages = [parallelize(stage, mesh, reduced=True) for stage in stages_of(mesh["pp"], schedule)]
        shape = (SEQUENCES // 2, SEQ, HIDDEN)
        pipeline = Pipeline(stages, mesh["pp"], schedule, 4, torch.device("cpu"), shape, torch.float64)
        named = [item for stage in stages for item in stage.named_parameters()]
        optimizer = torch.optim.SGD([p for _, p in named], lr=0.1, foreach=False)
        found = []
        for step in range(2):
            inputs, labels, masks = half(data(4, step), mesh["dp"].rank)
            begin(pipeline, data(4, step)[2])
            pipeline.count(inputs, {"mask": masks})
            shares = pipeline.step(inputs, labels, {"mask": masks}, shares_of(data(4, step)[1]))
            pipeline.evaluate(inputs, labels, {"mask": masks}, shares_of(labels))  # leaves gradients alone
            split = [isinstance(p, DTensor) for stage in stages for p in stage.parameters()]
            assert all(split) or data_parallel == "ddp"  # and leaves no weights gathered
            gradients = {}
            for name, p in named:
                if not isinstance(p, DTensor):
                    dist.all_reduce(p.grad, group=mesh["dense"].group)
                gradients[name] = p.grad.full_tensor() if isinstance(p, DTensor) else p.grad.clone()
            found.append({"shares": shares, "gradients": gradients})
            optimizer.step()
            optimizer.zero_grad()
            for step in pipeline.steps:
                step.end()
        return found

    results = run_ranks(script, 4)
    whole = alone(4, 1, layers_of(schedule, 2))
    for dp_rank in range(2):
        mine = [result for rank, result in enumerate(results) if rank % 2 == dp_rank]
        shares = [[torch.cat(step["shares"])[dp_rank::2]] for step in whole]
        compare(mine, [step | {"shares": part} for step, part in zip(whole, shares, strict=True)])


@pytest.mark.parametrize(("stages", "layers"), [(2, 5), (3, 8), (4, 4)])
def test_stages_one_after_the_other_are_the_model(stages: int, layers: int) -> None:
    model = make(layers)
    parts = [split(model, stages, i) for i in range(stages)]
    assert [name for part in parts for name, _ in part.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [len(part.blocks) for part in parts] == sorted((len(part.blocks) for part in parts), reverse=True)
    assert max(len(part.blocks) for part in parts) - min(len(part.blocks) for part in parts) <= 1
    assert model.embedding is not None and len(model.blocks) == layers
    calls: list[int] = []
    for i, part in enumerate(parts):
        part.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    x, mask = data(2)[0][0], data(2)[2][0]
    hidden = x
    for part in parts:
        hidden = part(hidden, mask)
    assert torch.equal(hidden, model(x, mask))
    assert calls == list(range(stages))


def test_stage_ids() -> None:
    assert [stage_ids("1f1b", 3, rank, 1) for rank in range(3)] == [[0], [1], [2]]
    assert [stage_ids("interleaved_1f1b", 2, rank, 3) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert [stage_ids("zbv", 3, rank, 2) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize(
    ("degrees", "text"),
    [
        (("dualpipe", 2, 1, 4, 8), "parallel.schedule='dualpipe': use one of gpipe, 1f1b, "),
        (("gpipe", 1, 1, 4, 8), "parallel.pp=1: a pipeline needs at least 2 ranks"),
        (("1f1b", 2, 2, 4, 8), "parallel.stages_per_rank=2: parallel.schedule='1f1b' takes 1"),
        (
            ("interleaved_1f1b", 2, 1, 4, 8),
            "parallel.stages_per_rank=1: parallel.schedule='interleaved_1f1b' takes 2 or",
        ),
        (("zbv", 2, 3, 4, 8), "parallel.stages_per_rank=3: parallel.schedule='zbv' takes 2"),
        (
            ("zbv", 4, 2, 4, 7),
            "model.num_layers=7: fewer than the 8 stages of parallel.pp=4 x parallel.stages_per_rank=2",
        ),
        (("1f1b", 4, 1, 3, 8), "micro_batches=3: parallel.schedule='1f1b' needs at least 4 with parallel.pp=4"),
        (("interleaved_1f1b", 4, 2, 3, 8), "micro_batches=3: parallel.schedule='interleaved_1f1b' needs at least 4"),
        (
            ("interleaved_zero_bubble", 2, 2, 5, 8),
            "micro_batches=5: .* runs 2 equal rounds; use a multiple of parallel.pp",
        ),
    ],
)
def test_degrees_that_do_not_fit(degrees: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "SPLITS_BACKWARD", True)
    with pytest.raises(ValueError, match=text):
        check_pipeline(*degrees)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("schedule", USABLE)
def test_remedies_are_possible(schedule: str, size: int) -> None:
    """The value that the error suggests must be accepted, and sizes must stay whole numbers."""
    refused = 0
    for pp in (2, 3, 4):
        for number in range(1, 20):
            degrees = (schedule, pp, PER_RANK[schedule])
            try:
                check_pipeline(*degrees, number, 16, size)
            except ValueError as error:
                *_, what, made = re.split(" (?:by |data.micro_batch=)|, which makes it |: ", str(error))
                smaller = "set data.micro_batch=" in str(error)
                then, rest = divmod(number * size, int(made) * int(what.split("=")[-1])) if smaller else (1, 0)
                assert (then, rest) == (1, 0), str(error)
                assert smaller or number * Fraction(what.split("by ")[-1]) == int(made) > number, str(error)
                assert not smaller or int(what.split("=")[-1]) < size
                check_pipeline(*degrees, int(made), 16)
                refused += 1
    assert refused or schedule in ("gpipe", "zbv")


@pytest.mark.parametrize("schedule", SPLIT)
def test_torch_that_cannot_split_backwards_is_refused(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "SPLITS_BACKWARD", False)
    with pytest.raises(ValueError, match=f"parallel.schedule='{schedule}': torch .* use torch 2.13 or later"):
        check_pipeline(schedule, 2, 2, 4, 8)


def test_too_few_blocks_for_the_stages() -> None:
    with pytest.raises(ValueError, match="model.num_layers=3: fewer than the 4 pipeline stages"):
        split(make(3), 4, 0)


@pytest.mark.parametrize("schedule", USABLE)
@pytest.mark.parametrize("pp", slow_but([2], [2, 3]))
def test_what_is_not_refused_runs(schedule: str, pp: int) -> None:
    """Every number of micro-batches that the check accepts must run in torch, with a loss for every micro-batch."""

    def fits(number: int) -> bool:
        try:
            check_pipeline(schedule, pp, PER_RANK[schedule], number, 16)
        except ValueError:
            return False
        return True

    numbers = [number for number in range(1, 8) if fits(number)]

    def script(rank: int, world: int) -> list[int]:
        found = []
        for number in numbers:
            inputs, labels, masks = data(number)
            pipeline = pipeline_of(world_axis(), schedule, number, moe_every=0)
            found.append(len(pipeline.step(inputs, labels, {"mask": masks}, shares_of(labels))))
        return found

    assert len(numbers) > 1
    assert numbers in run_ranks(script, pp)


def test_mistakes_in_use() -> None:
    def script(rank: int, world: int) -> list[str]:
        axis, texts = world_axis(), []
        shape, cpu = (SEQUENCES, SEQ, HIDDEN), torch.device("cpu")

        def refused(call: Any, *args: Any) -> None:
            with pytest.raises(ValueError) as error:
                call(*args)
            texts.append(str(error.value))

        stages = stages_of(axis, "1f1b")
        refused(Pipeline, [split(make(3), 2, 1 - rank)], axis, "1f1b", 4, cpu, shape)
        experts_of(stages[0])[0].balancer.placed = None
        refused(Pipeline, stages, axis, "1f1b", 4, cpu, shape)
        refused(partial(pipeline_of, balance=replace(GLOBAL, micro_batches=2)), axis, "1f1b", 4)
        inputs, labels, masks = data(4)
        pipeline = pipeline_of(axis, "1f1b", 4)
        refused(pipeline.step, inputs[:3], labels[:3], {"mask": masks[:3]}, shares_of(labels))
        refused(pipeline.step, inputs, labels, {"mask": [mask[:, 1:] for mask in masks]}, shares_of(labels))
        return texts

    for texts in run_ranks(script, 2):
        wanted = (
            "belongs to stage",
            "parallelize every stage before you build the pipeline",
            "balance.micro_batches=2",
            "inputs.shape",
            "mask.shape",
        )
        assert all(want in text and "\n" not in text for want, text in zip(wanted, texts, strict=True)), texts


def test_hidden_states_of_another_kind_than_told() -> None:
    def script(rank: int, world: int) -> None:
        stages, cpu = stages_of(world_axis(), "1f1b"), torch.device("cpu")
        pipeline = Pipeline(stages, world_axis(), "1f1b", 4, cpu, (SEQUENCES, SEQ, HIDDEN), torch.float32)
        inputs, labels, masks = data(4)
        pipeline.step(inputs, labels, {"mask": masks}, shares_of(labels))

    with pytest.raises(AssertionError, match="hidden_dtype=torch.float32: stage 0 gives torch.float64"):
        run_ranks(script, 2, timeout=30.0)


@pytest.mark.parametrize("schedule", [name for name in USABLE if name in ("1f1b", "zbv")])
def test_stage_that_raises_ends_the_run(schedule: str) -> None:
    def script(rank: int, world: int) -> None:
        pipeline = pipeline_of(world_axis(), schedule, 4)

        def fail(*_: Any) -> None:
            raise RuntimeError("no memory on this rank")

        if rank == 1:
            pipeline.stages[-1].register_forward_pre_hook(fail)
        train(pipeline)

    start = time.monotonic()
    with pytest.raises(AssertionError, match="no memory on this rank"):
        run_ranks(script, 2, timeout=30.0)
    assert time.monotonic() - start < 20.0
