"""Training with DeepSpeed equals training in one process: ZeRO 0 to 3, experts split or not.

The model has MoE layers with the global-batch loss (estimator "exact") and weight decay, and gradients are clipped.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("deepspeed", reason="needs DeepSpeed, which `make engines` installs")
pytestmark = pytest.mark.engines

from equimoe.moe import MoE, MoEConfig, checkpoint  # noqa: E402
from equimoe.moe.config import RecomputeConfig  # noqa: E402
from equimoe.moe.engines import Batch, Engine, build_engine  # noqa: E402
from equimoe.moe.engines.deepspeed import DeepSpeedEngine, build_deepspeed_engine  # noqa: E402
from equimoe.moe.parallel import Mesh, ParallelConfig, build_mesh  # noqa: E402
from tests.helpers import trained  # noqa: E402
from tests.helpers.casts import Casts, always_cast  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.recorded import full  # noqa: E402

STEPS, RATE = 3, 0.01
#: more than fp32 sums in another order differ by
TOLERANCE = 1e-5
STAGES = (0, 1, 2, 3)
GRID = [(stage, ep) for stage in STAGES for ep in (1, 2)]
#: ZeRO 3 partitions weights of more elements than this, and frees gathered ones at once; by default, this model is too
#: small for either
PARTS = {"stage3_param_persistence_threshold": 8, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
SETTINGS = {"zero_optimization": PARTS}


def adamw(trainable: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    matrices = [p for p in trainable.values() if p.dim() > 1]
    rest = [p for p in trainable.values() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.5)


def model(**how: Any) -> Any:
    return trained.make(bias_update_rate=0.01, **how).float()


def torch_engine(mesh: Mesh | None = None, **how: Any) -> Engine:
    return build_engine(model(**how), mesh, adamw, max_norm=1.0)


def deepspeed_engine(
    mesh: Mesh | None,
    stage: int,
    micro_batches: int = trained.MICRO_BATCHES,
    settings: Any = SETTINGS,
    precision: Any = nullcontext,
    **how: Any,
) -> Any:
    ranks = 1 if mesh is None else mesh["dp"].size
    size = trained.SEQUENCES // ranks // micro_batches
    return build_deepspeed_engine(
        model(**how),
        mesh,
        adamw,
        zero_stage=stage,
        settings=settings,
        max_norm=1.0,
        micro_batch=size,
        micro_batches=micro_batches,
        precision=precision,
    )


def trajectory(engine: Engine, mesh: Mesh | None, steps: int = STEPS, first: int = 0) -> list[tuple[float, float]]:
    """(sum of this rank's losses, gradient norm) of each step."""
    several = (trained.varied(trained.batches(mesh, step), step) for step in range(first, first + steps))
    results = [engine.step(batches, RATE) for batches in several]
    assert all(result.applied for result in results)
    return [(float(sum(losses.sum() for losses in result.losses)), float(result.norm)) for result in results]


def whole_state(engine: Engine) -> dict[str, Tensor]:
    return {name: full(value).clone() for name, value in engine.state().items()}


@cache
def one_process(steps: int = STEPS) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    engine = torch_engine()
    return trajectory(engine, None, steps), whole_state(engine)


def check(results: list[Any], steps: int = STEPS) -> None:
    """The losses of all ranks add up to those of one process; norms, weights, moments and biases equal them."""
    expected, right = one_process(steps)
    for step, (loss, norm) in enumerate(expected):
        assert sum(found[step][0] for found, _ in results) == pytest.approx(loss, rel=TOLERANCE), step
        assert all(found[step][1] == pytest.approx(norm, rel=TOLERANCE) for found, _ in results), step
    for _, state in results:
        assert state.keys() == right.keys()
        error, name = trained.worst(state, right)
        assert error < TOLERANCE, name


def test_equals_one_process() -> None:
    """Four ranks, so that experts that are split have replicas too; one launch for all stages."""

    def rank_main(rank: int, world: int) -> list[Any]:
        found = []
        for stage, ep in GRID:
            mesh = build_mesh(ParallelConfig(ep=ep))
            engine = deepspeed_engine(mesh, stage)
            found.append((trajectory(engine, mesh), whole_state(engine)))
        return found

    for results in zip(*run_ranks(rank_main, 4, timeout=110), strict=True):
        check(list(results))


@pytest.mark.parametrize("part", ["block", "feed_forward"])
def test_zero_3_gathers_weights_to_recompute(part: str) -> None:
    def rank_main(rank: int, world: int) -> Any:
        mesh = build_mesh(ParallelConfig(ep=2))
        engine = deepspeed_engine(mesh, 3, recompute_blocks=True, recompute_how=RecomputeConfig(part=part))
        return trajectory(engine, mesh), whole_state(engine)

    check(run_ranks(rank_main, 2))


@pytest.mark.parametrize("stage", [1, 3])
def test_one_rank_needs_no_launcher(stage: int) -> None:
    def rank_main(rank: int, world: int) -> Any:
        torch.distributed.destroy_process_group()
        engine = deepspeed_engine(None, stage)
        return trajectory(engine, None), whole_state(engine)

    check(run_ranks(rank_main, 1))


@pytest.mark.parametrize("stage", STAGES)
def test_unusual_steps(stage: int) -> None:
    """An evaluation, a step that raises and one that is not finite leave nothing behind.

    Buckets are small, so that some have been reduced when a backward raises; most or all weights are larger than one.
    """

    def rank_main(rank: int, world: int) -> Any:
        mesh, results = build_mesh(ParallelConfig(ep=2)), []
        for size in (100, 4):
            small = {"zero_optimization": {**PARTS, "reduce_bucket_size": size}}
            engine = deepspeed_engine(mesh, stage, settings=small)
            found = trajectory(engine, mesh, 1)
            trained.disturb(engine, partial(trained.batches, mesh), whole_state)
            found += trajectory(engine, mesh, 1, first=1)
            trained.disturb(engine, partial(trained.batches, mesh), whole_state, last="raises")
            results.append((found + trajectory(engine, mesh, STEPS - 2, first=2), whole_state(engine)))
        return results

    for results in zip(*run_ranks(rank_main, 2), strict=True):
        check(list(results))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_step_may_have_another_number_of_micro_batches(stage: int) -> None:
    def rank_main(rank: int, world: int) -> Any:
        mesh = build_mesh(ParallelConfig(ep=2))
        engine = deepspeed_engine(mesh, stage, micro_batches=1)
        return trajectory(engine, mesh), whole_state(engine)

    check(run_ranks(rank_main, 2))


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_goes_from_one_engine_to_the_other(stage: int, tmp_path: Path) -> None:
    """A step with DeepSpeed, one with torch, one with DeepSpeed on another number of ranks per expert."""

    def to_next(engine: Engine, step: int) -> None:
        state = engine.state()
        engine.expect(list(state))
        path = checkpoint.save(tmp_path, step, state, {}, keep_last=9)
        assert path.exists()

    def go_on(engine: Engine) -> Engine:
        path = checkpoint.newest(tmp_path)
        manifest = checkpoint.read_manifest(path)
        engine.expect(checkpoint.contents(path, manifest))
        state = engine.state()
        checkpoint.load(path, state, manifest)
        engine.restore(state)
        return engine

    def rank_main(rank: int, world: int) -> Any:
        mesh, flat = build_mesh(ParallelConfig(ep=2)), build_mesh(ParallelConfig(ep=1))
        first = deepspeed_engine(mesh, stage)
        found = trajectory(first, mesh, 1)
        to_next(first, 1)
        second = go_on(torch_engine(mesh))
        found += trajectory(second, mesh, 1, first=1)
        to_next(second, 2)
        third = go_on(deepspeed_engine(flat, stage))
        return found + trajectory(third, flat, 1, first=2), whole_state(third)

    check(run_ranks(rank_main, 2))


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeeds_own_checkpoint(stage: int, tmp_path: Path) -> None:
    """Each expert has its file, and every rank gets its own experts and moments back."""

    def rank_main(rank: int, world: int) -> Any:
        mesh = build_mesh(ParallelConfig(ep=2))
        engine = deepspeed_engine(mesh, stage)
        found = trajectory(engine, mesh, 1)
        engine.deepspeed.save_checkpoint(str(tmp_path), tag="one")
        trajectory(engine, mesh, 1, first=5)  # is forgotten
        again: DeepSpeedEngine = deepspeed_engine(mesh, stage)
        with torch.no_grad():
            for parameter in again.parameters.values():
                parameter.mul_(1.5)
        again.deepspeed.load_checkpoint(str(tmp_path), tag="one")
        return found + trajectory(again, mesh, STEPS - 1, first=1), whole_state(again)

    check(run_ranks(rank_main, 2))
    if stage == 3:  # each rank's file has its parts
        return
    files = {path.name for path in (tmp_path / "one").glob("layer_0_expert_*")}
    assert files == {f"layer_0_expert_{e}_mp_rank_00_model_states.pt" for e in range(4)}
    names = torch.load(tmp_path / "one" / sorted(files)[3], weights_only=True).keys()
    prefix = "blocks.1.mlp.deepspeed_moe.experts.deepspeed_experts.3."
    assert names == {f"{prefix}gate_up_proj", f"{prefix}down_proj"}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeeds_own_checkpoint_with_experts_split_otherwise(stage: int, tmp_path: Path) -> None:
    """The weights load; the optimizer's state, in which each rank would find other experts, is refused."""

    def rank_main(rank: int, world: int) -> None:
        mesh, flat = build_mesh(ParallelConfig(ep=2)), build_mesh(ParallelConfig(ep=1))
        engine, again = deepspeed_engine(mesh, stage), deepspeed_engine(flat, stage)
        trajectory(engine, mesh, 1)
        engine.deepspeed.save_checkpoint(str(tmp_path), tag="one")
        with pytest.raises(
            ValueError, match="saved with experts split as .'ep_size_2'., .*load_optimizer_states=False"
        ):
            again.deepspeed.load_checkpoint(str(tmp_path), tag="one")
        again.deepspeed.load_checkpoint(str(tmp_path), tag="one", load_optimizer_states=False)
        saved = whole_state(engine)
        for found in (again.parameters, whole_state(again)):
            for name, value in found.items():
                key = name if name.startswith(("model.", "optimizer.")) else f"model.{name}"
                assert key.startswith("optimizer.") or torch.equal(value, saved[key]), key

    run_ranks(rank_main, 2)


def test_deepspeeds_own_checkpoint_of_zero_3_with_experts_split_otherwise(tmp_path: Path) -> None:
    """DeepSpeed refuses it, because each rank's file has its own parts."""

    def rank_main(rank: int, world: int) -> None:
        mesh, flat = build_mesh(ParallelConfig(ep=2)), build_mesh(ParallelConfig(ep=1))
        deepspeed_engine(mesh, 3).deepspeed.save_checkpoint(str(tmp_path), tag="one")
        with pytest.raises(RuntimeError, match="can only be loaded with the same parameter placement"):
            deepspeed_engine(flat, 3).deepspeed.load_checkpoint(str(tmp_path), tag="one")

    run_ranks(rank_main, 2)


def test_parts_of_unequal_size_are_saved_and_loaded() -> None:
    """Two ranks share weights with an odd number of elements, of which some are frozen."""

    def small(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        experts = MoE(MoEConfig(5, 3, num_experts=4, top_k=2))
        found = nn.Sequential(nn.Linear(5, 5), experts, nn.Linear(5, 5))
        found[0].requires_grad_(False)
        return found

    def squares(y: Tensor, target: Tensor) -> Tensor:
        return (y - target).square().mean(-1)

    def step(engine: Engine, seed: int) -> None:
        x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed))
        assert engine.step([Batch(x, x.flip(-1))], 0.1).applied

    def rank_main(rank: int, world: int) -> None:
        mesh = build_mesh(ParallelConfig(ep=2))
        build = partial(
            build_deepspeed_engine, mesh=mesh, optimizer=adamw, zero_stage=3, loss=squares, settings=SETTINGS
        )
        first, second = build(small(0), zero_stage=3), build(small(1), zero_stage=3)
        step(first, 0)
        second.restore(first.state())
        for engine in (first, second):
            step(engine, 1)
        found, right = whole_state(second), whole_state(first)
        assert found.keys() == right.keys()
        assert [name for name, value in found.items() if not torch.equal(value, right[name])] == []
        assert found["model.0.bias"].shape == (5,)

    run_ranks(rank_main, 2)


def test_zero_refuses_to_save_without_an_optimizers_own_state() -> None:
    """What it gathers are the moments of AdamW. The momentum of SGD would be missing after a restart."""

    def rank_main(rank: int, world: int) -> None:
        for momentum, stage in ((0.0, 1), (0.9, 0), (0.9, 1)):
            sgd = partial(torch.optim.SGD, momentum=momentum)
            engine = build_deepspeed_engine(model(), None, lambda p, sgd=sgd: sgd(p.values()), zero_stage=stage)
            trajectory(engine, None, 1)
            if momentum and stage:
                with pytest.raises(ValueError, match="SGD: .* would lose momentum_buffer; use AdamW, or zero_stage=0"):
                    engine.state()
            else:
                assert any("momentum_buffer" in key for key in engine.state()) == bool(momentum)

    run_ranks(rank_main, 1)


def test_frozen_weights_stay_and_their_set_is_fixed() -> None:
    def rank_main(rank: int, world: int) -> Any:
        mesh, whole = build_mesh(ParallelConfig(ep=2)), model()
        trained.freeze(whole, lambda name: "router" in name or "norm" in name)
        engine = build_deepspeed_engine(whole, mesh, adamw, zero_stage=1, micro_batch=2, micro_batches=2)
        before = {name: p.clone() for name, p in engine.parameters.items()}
        trajectory(engine, mesh, 1)
        moved = {name for name, p in engine.parameters.items() if not torch.equal(p, before[name])}
        assert moved == {name for name, p in engine.parameters.items() if p.requires_grad}
        trained.freeze(whole, lambda name: name.endswith("router.weight"), frozen=False)
        with pytest.raises(ValueError, match="router.weight: was frozen or unfrozen"):
            engine.step(trained.batches(mesh), RATE)

    run_ranks(rank_main, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_only_experts_are_frozen(stage: int) -> None:
    """ZeRO 0 and 3 train the rest; the others need an expert that trains, and say so."""

    def rank_main(rank: int, world: int) -> None:
        whole, mesh = model(), build_mesh(ParallelConfig(ep=2))
        trained.freeze(whole, lambda name: "experts" in name)
        if stage in (1, 2):
            with pytest.raises(ValueError, match=f"zero_stage={stage}: all experts are frozen.*zero_stage=0"):
                build_deepspeed_engine(whole, mesh, adamw, zero_stage=stage)
            return
        engine = build_deepspeed_engine(whole, mesh, adamw, zero_stage=stage, micro_batch=2, micro_batches=2)
        before = whole_state(engine)
        trajectory(engine, mesh, 1)
        after = whole_state(engine)
        still = {name for name in after if name.startswith("model.") and torch.equal(after[name], before[name])}
        assert still == {name for name in before if "experts" in name}

    run_ranks(rank_main, 2)


def test_weights_that_are_cast_once_per_step_get_the_bits_of_casts_in_every_forward() -> None:
    """Two micro-batches, counted ahead, with recomputation. ZeRO 3 gathers weights for every forward."""

    def found(mesh: Mesh, stage: int) -> tuple[dict[str, Tensor], list[Tensor], int]:
        bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
        engine, losses = deepspeed_engine(mesh, stage, precision=bf16, recompute_blocks=True), []
        for step in range(STEPS):
            with Casts(engine.parts[0]) as casts:
                losses += engine.step(trained.batches(mesh, step), RATE).losses
            losses += engine.evaluate(trained.batches(mesh, 9))
        return whole_state(engine), losses, casts.count

    def rank_main(rank: int, world: int) -> list[tuple[bool, int, int]]:
        mesh, same = build_mesh(ParallelConfig(ep=2)), []
        for stage in STAGES:
            state, losses, once = found(mesh, stage)
            with always_cast():
                right, expected, always = found(mesh, stage)
            equal = all(torch.equal(state[n], value) for n, value in right.items())
            same.append((equal and all(map(torch.equal, losses, expected)), once, always))
        return same

    for rows in run_ranks(rank_main, 2, timeout=100):
        assert rows == [*[(True, 2, 12)] * 3, (True, 0, 0)]
