"""Checks training with replicas of experts and with owners that change: against plain expert parallelism."""

# L layers, E experts, P ranks.

from __future__ import annotations

import copy
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equimoe.moe import BalanceConfig, ExtraLossConfig, MoE, MoEConfig, checkpoint
from equimoe.moe.collectives import Axis, record_traffic
from equimoe.moe.config import PlacementConfig
from equimoe.moe.engines import Batch, build_engine
from equimoe.moe.engines.torch import TorchEngine
from equimoe.moe.model import Decoder
from equimoe.moe.parallel import Mesh, ParallelConfig, build_mesh
from equimoe.moe.placement import Owners, Replicas, materialize, write_owners
from equimoe.moe.train.config import OptimConfig
from equimoe.moe.train.optim import build_optimizer
from tests.helpers import oracle, parity
from tests.helpers.checkpoints import load_all
from tests.helpers.fork import run_ranks
from tests.helpers.parity import LENGTH, SEQUENCES, VOCABULARY, Composition, batch
from tests.helpers.slow import slow_but

EP, FSSDP = ParallelConfig(ep=-1, edp=1), ParallelConfig(experts="fssdp")


def engine_of(
    mesh: Mesh, config: PlacementConfig | None = None, experts: int = 8, dtype: torch.dtype = torch.float32
) -> TorchEngine:
    of = Composition(mesh["stage"].size, mesh.degrees, experts=experts)

    def adamw(named: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        return build_optimizer(named, OptimConfig())

    micro_batches = mesh.degrees.pp
    shape = (SEQUENCES // mesh["dp"].size // micro_batches, LENGTH)
    return build_engine(
        parity.make(of, micro_batches).to(dtype),
        mesh,
        adamw,
        max_norm=1.0,
        micro_batches=micro_batches,
        shape=shape,
        placement=config,
    )


def train(engine: TorchEngine, mesh: Mesh, steps: range) -> list[float]:
    norms, of = [], Composition(mesh["stage"].size, mesh.degrees)
    dp, rank = mesh["dp"].size, mesh["dp"].rank
    for step in steps:
        part = (t.chunk(dp)[rank] for t in batch(step, of).values())
        found = engine.step([Batch(*part)], lr=1e-3)
        assert found.applied
        norms.append(float(found.norm))
    return norms


def at_random(draw: random.Random, _loads: Any, owners: list[Owners]) -> list[Replicas]:
    return parity.at_random(draw, None, owners)


def random_owners(draw: random.Random, engine: TorchEngine) -> list[Owners]:
    """Give some ranks many experts of a layer, and others none."""
    return [Owners.of_ranks(o.ranks, [draw.randrange(o.ranks) for _ in o.rank_of_E]) for o in engine.experts.owners]


def saved(engine: TorchEngine, root: Path, step: int) -> dict[str, Tensor]:
    checkpoint.save(root, step, engine.state(), {}, keep_last=99)
    return trained(load_all(root / f"step-{step:08d}"))


def trained(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors without those that say how experts were placed."""
    return {name: value for name, value in state.items() if not name.startswith("placement.")}


def twenty_steps(
    rank: int, world: int, root: Path, how: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[float], int]:
    """Train 20 steps; return the state, the norms, and this rank's elements of experts' moments."""
    mesh = build_mesh(EP if how == "ep" else FSSDP)
    engine, draw, norms = engine_of(mesh, dtype=dtype), random.Random(1), []
    if how != "ep":
        engine.experts.plan = partial(at_random, draw)
    for begin in range(0, 20, 4):
        norms += train(engine, mesh, range(begin, begin + 4))
        if how == "moved":
            engine.experts.move(random_owners(draw, engine), engine.optimizer)
    moments = sum(t.to_local().numel() for name, t in engine.moments().items() if name.endswith("proj.exp_avg"))
    return saved(engine, root / how, 20), norms, moments


@pytest.mark.parametrize(
    ("world", "dtype"),
    slow_but([(2, torch.float64)], [(2, torch.float64), *((world, torch.float32) for world in (2, 4, 8))]),
)
def test_twenty_steps_equal_plain_expert_parallelism(world: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """In fp32, rounding errors of 20 steps remain: moments average gradients of both signs, and so have larger ones."""
    limit = 1e-6 if dtype == torch.float32 else 1e-12
    want, norms, held = run_ranks(twenty_steps, world, tmp_path, "ep", dtype)[0]
    assert held
    for how in ("replicated", "moved"):
        results = run_ranks(twenty_steps, world, tmp_path, how, dtype)
        found, seen, _ = results[0]
        assert found.keys() == want.keys()
        for name, value in want.items():
            allowed = limit * (5 if name.startswith("optimizer.") else 1)
            assert oracle.relative_error(found[name], value) < allowed, (how, name)
        assert seen == pytest.approx(norms, rel=limit)
        whole = sum(v.numel() for name, v in want.items() if name.endswith("proj.exp_avg"))
        assert sum(moments for *_, moments in results) == whole, "each expert has its moments on one rank"
        again, same, _ = run_ranks(twenty_steps, world, tmp_path / "again", how, dtype)[0]
        assert same == seen and all(torch.equal(again[name], found[name]) for name in found)


def moves(rank: int, world: int, root: Path) -> None:
    mesh = build_mesh(FSSDP)
    engine, draw = engine_of(mesh, experts=5), random.Random(2)
    for step in range(1, 7):
        train(engine, mesh, range(step, step + 1))
        before = saved(engine, root / "before", step)
        engine.experts.move(random_owners(draw, engine), engine.optimizer)
        after = saved(engine, root / "after", step)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_moving_experts_changes_no_bit(tmp_path: Path) -> None:
    run_ranks(moves, 3, tmp_path)


def resume(engine: TorchEngine, root: Path) -> Path:
    """Restore the newest checkpoint in ``root``, and return its path."""
    path = checkpoint.newest(root)
    manifest = checkpoint.read_manifest(path)
    engine.expect(checkpoint.contents(path, manifest))
    state = engine.state()
    checkpoint.load(path, state, manifest)
    engine.restore(state)
    return path


def resumed(rank: int, world: int, root: Path, first: ParallelConfig, then: ParallelConfig, move: bool) -> list[float]:
    mesh = build_mesh(first)
    engine = engine_of(mesh)
    train(engine, mesh, range(4))
    if move:
        engine.experts.move(random_owners(random.Random(3), engine), engine.optimizer)
    checkpoint.save(root, 4, engine.state(), {}, keep_last=1)
    mesh = build_mesh(then)
    other = engine_of(mesh)
    path = resume(other, root)
    loaded = saved(other, root.parent / "loaded", 4)
    assert all(torch.equal(loaded[name], value) for name, value in trained(load_all(path)).items())
    return train(other, mesh, range(4, 6))


@pytest.mark.parametrize(
    ("first", "then", "move"), [(FSSDP, EP, True), (EP, FSSDP, False), (FSSDP, FSSDP, True)], ids=["out", "in", "both"]
)
def test_a_checkpoint_is_resumed_under_any_ownership(
    first: ParallelConfig, then: ParallelConfig, move: bool, tmp_path: Path
) -> None:
    def straight(rank: int, world: int) -> list[float]:
        mesh = build_mesh(EP)
        return train(engine_of(mesh), mesh, range(6))[4:]

    found = run_ranks(resumed, 2, tmp_path / "run", first, then, move)[0]
    assert found == pytest.approx(run_ranks(straight, 2)[0], rel=3e-6)  # norms are summed in another order


def goes_on(rank: int, world: int, root: Path) -> tuple[list[float], list[float], bool]:
    """Return the norms of three steps of a run, and of a resumed one, and whether both have the same owners."""
    config = PlacementConfig(overlap=1, window=3, reshard_every=3)
    mesh = build_mesh(FSSDP)
    first, second = engine_of(mesh, config), engine_of(mesh, config)
    train(first, mesh, range(4))
    checkpoint.save(root, 4, first.state(), {}, keep_last=1)
    resume(second, root)
    moved = first.experts.owners == second.experts.owners != [Owners.spread(8, world)] * 2
    return train(first, mesh, range(4, 7)), train(second, mesh, range(4, 7)), moved


def test_a_resumed_run_places_experts_as_before(tmp_path: Path) -> None:
    """Loads and owners are in the checkpoint, so that gradients are added in the same order."""
    for straight, found, moved in run_ranks(goes_on, 4, tmp_path):
        assert found == straight and moved


def wire(rank: int, world: int, replicated: bool) -> tuple[dict[str, int], int, int]:
    """Return bytes that this rank sent for experts in a step, replicas in all layers, and bytes of an expert."""
    mesh = build_mesh(FSSDP)
    engine = engine_of(mesh)
    plans: list[list[Replicas]] = []

    def plan(_loads: Any, owners: list[Owners]) -> list[Replicas]:
        plans.append(at_random(random.Random(4), None, owners) if replicated else [Replicas(o) for o in owners])
        return plans[-1]

    engine.experts.plan = plan
    with record_traffic() as traffic:
        train(engine, mesh, range(1))
    sent = {"sparse_all_gather": 0, "sparse_reduce_scatter": 0}
    for entry in traffic:
        if entry.verb in sent:
            sent[entry.verb] += entry.sent
    layer = engine.experts.layers[0]
    expert = sum(p.numel() * p.element_size() for p in layer.experts.parameters()) // layer.config.num_experts
    return sent, sum(map(len, plans[0])), expert


def test_bytes_are_those_of_the_replicas() -> None:
    results = run_ranks(wire, 4, True)
    _, replicas, expert = results[0]
    assert replicas > 4
    for verb in ("sparse_all_gather", "sparse_reduce_scatter"):
        assert sum(sent[verb] for sent, *_ in results) == replicas * expert


def test_without_replicas_nothing_is_sent() -> None:
    for sent, replicas, _ in run_ranks(wire, 4, False):
        assert replicas == 0 and set(sent.values()) == {0}


def planned(rank: int, world: int, config: PlacementConfig, steps: int) -> list[Any]:
    mesh = build_mesh(FSSDP)
    engine = engine_of(mesh, config)
    for layer in engine.experts.layers:
        layer.router.weight.data[0] *= 5  # its sign decides, so half of the tokens choose expert 0
    train(engine, mesh, range(steps))
    engine.experts.begin(engine.optimizer)
    loads = engine.experts.forecast.loads_LE
    return [
        [layer.dispatcher.holders.experts_of(rank) for layer in engine.experts.layers],
        loads.tolist(),
        engine.experts.owners,
    ]


def test_replicas_are_those_for_the_load_of_the_last_steps() -> None:
    results = run_ranks(planned, 4, PlacementConfig(overlap=2, window=2), 3)
    for rank, (held, loads, owners) in enumerate(results):
        assert loads == results[0][1] and sum(map(sum, loads)) > 0
        wanted = [materialize(load, own, 2, 2, 4) for load, own in zip(loads, owners, strict=True)]
        assert min(map(len, wanted)) > 0
        assert held == [of_layer.experts_of(rank) for of_layer in wanted]


def test_owners_change_as_asked() -> None:
    *_, owners = run_ranks(planned, 4, PlacementConfig(overlap=1, reshard_every=2), 4)[0]
    assert any(o != Owners.spread(8, 4) for o in owners)


def refused_steps(rank: int, world: int) -> list[list[Owners]]:
    """Return the owners after a step, and after each of two attempts at the next one that are refused."""
    mesh = build_mesh(FSSDP)
    engine, found = engine_of(mesh, PlacementConfig(reshard_every=1)), []
    with pytest.MonkeyPatch.context() as patch:
        draw = random.Random(1)
        patch.setattr("equimoe.moe.engines.experts.reshard", lambda *_: random_owners(draw, engine))
        for accept in (True, False, False):
            part = (t.chunk(world)[rank] for t in batch(0, Composition(world)).values())
            assert engine.step([Batch(*part)], 1e-3, lambda _, accept=accept: accept).applied == accept
            found.append(engine.experts.owners)
    return found


def test_a_step_that_is_refused_moves_experts_once() -> None:
    """Computing a step twice must give the same bits (``health.replay_every``)."""
    before, first, second = run_ranks(refused_steps, 2)[0]
    assert before != first == second


def owned_by_file(rank: int, world: int, file: str, parallel: ParallelConfig = FSSDP) -> list[Owners]:
    return engine_of(build_mesh(parallel), PlacementConfig(owners=file)).experts.owners


def test_a_file_names_the_first_owners(tmp_path: Path) -> None:
    owners = [Owners.of_ranks(2, [1, 0, 0, 0, 1, 0, 0, 0]), Owners.of_ranks(2, [0] * 8)]
    (tmp_path / "owners.json").write_text(write_owners(owners))
    assert run_ranks(owned_by_file, 2, str(tmp_path / "owners.json"))[0] == owners
    stages = replace(FSSDP, pp=2)
    of_stages = run_ranks(owned_by_file, 4, str(tmp_path / "owners.json"), stages)
    assert of_stages == [owners[:1], owners[:1], owners[1:], owners[1:]], "each stage takes its layers' owners"


def refused(rank: int, world: int) -> str:
    with pytest.raises(ValueError) as found:
        engine_of(build_mesh(FSSDP), PlacementConfig(node_size=2))
    return str(found.value)


def test_nodes_that_do_not_fit_the_ranks_are_refused() -> None:
    for found in run_ranks(refused, 3):
        assert found == (
            "placement.node_size=2: must divide the 3 ranks that experts are distributed over; use a divisor"
        )


def calibrated(rank: int, world: int, rows: int | None) -> tuple[list[float], list[int]]:
    """Return the norms of three steps, and the replicas of each forward of the last."""
    mesh = build_mesh(EP if rows is None else FSSDP)
    engine = engine_of(mesh, PlacementConfig(overlap=2, memory_mb=1, calibrate=rows))
    norms = train(engine, mesh, range(3))
    return norms, [] if rows is None else [len(of) for of in engine.experts.layers[0].replication.used]


def test_after_routing_replicas_are_added_for_the_real_load() -> None:
    norms, _ = run_ranks(calibrated, 4, None)[0]
    numbers = []
    for rows in (10**9, 0):
        found, used = run_ranks(calibrated, 4, rows)[0]
        assert found == pytest.approx(norms, rel=1e-6) and len(used) == 1
        numbers += used
    planned, calibrated_for = numbers
    assert 0 < planned < calibrated_for


def copied(rank: int, world: int) -> None:
    mesh = build_mesh(FSSDP)
    engine = engine_of(mesh)
    engine.experts.plan = partial(at_random, random.Random(1))
    train(engine, mesh, range(2))
    model = engine.parts[0].eval()
    assert isinstance(model, Decoder) and all(len(layer.replication.replicas) for layer in model.moe_layers())
    inputs, _, mask = batch(0, Composition(world)).values()
    with torch.no_grad():
        assert torch.allclose(copy.deepcopy(model)(inputs, mask), model(inputs, mask), atol=1e-6)


def test_a_copy_of_a_model_that_holds_replicas_holds_none() -> None:
    run_ranks(copied, 3)


class Unlike(nn.Module):
    """Two MoE layers with different numbers of experts."""

    def __init__(self, trains_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        balance = BalanceConfig("global", 0.1, estimator="rolling")
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList(MoE(MoEConfig(16, 8, num_experts=e, top_k=2, balance=balance)) for e in (8, 4))
        self.head = nn.Linear(16, VOCABULARY)
        if not trains_first:
            self.embedding.requires_grad_(False)
            self.layers[0].requires_grad_(False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x, mask)
        return self.head(x)


def unlike(
    rank: int, world: int, root: Path, parallel: ParallelConfig, trains_first: bool, reshard_every: int
) -> tuple[list[float], Any]:
    """Return the norms of two steps and of two after a resume, and the numbers of replicas that layers then have."""
    mesh, config = build_mesh(parallel), PlacementConfig(overlap=2, reshard_every=reshard_every)
    first, second = (
        build_engine(Unlike(trains_first), mesh, lambda named: torch.optim.AdamW(named.values()), placement=config)
        for _ in range(2)
    )
    norms = train(first, mesh, range(2))
    checkpoint.save(root, 2, first.state(), {}, keep_last=1)
    path = checkpoint.newest(root)
    state = second.state()
    checkpoint.load(path, state, checkpoint.read_manifest(path))
    second.restore(state)
    norms += train(second, mesh, range(2, 4))
    second.experts.begin(second.optimizer)
    return norms, [0 if (held := layer.replication) is None else len(held.replicas) for layer in second.experts.layers]


@pytest.mark.parametrize(
    ("trains_first", "reshard_every", "replicas"), [(True, 0, [2, 0]), (False, 0, [0, 0]), (True, 3, [0, 0])]
)
def test_layers_may_have_different_experts_or_be_frozen(
    trains_first: bool, reshard_every: int, replicas: list[int], tmp_path: Path
) -> None:
    """A frozen layer has no counts, and so no replicas; with new owners, which fit the load, none are needed."""
    want, _ = run_ranks(unlike, 2, tmp_path / "ep", EP, trains_first, 0)[0]
    for norms, held in run_ranks(unlike, 2, tmp_path / "fssdp", FSSDP, trains_first, reshard_every):
        assert norms == pytest.approx(want, rel=1e-5) and held == replicas


def test_a_memory_budget_below_one_expert_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^placement.memory_mb=1: an expert takes 3.0 MiB; raise it, or set"):
        PlacementConfig(memory_mb=1).replicas_per_rank(3 << 20)
    assert PlacementConfig(memory_mb=7).replicas_per_rank(3 << 20) == 2
    assert PlacementConfig(overlap=0, memory_mb=1).replicas_per_rank(3 << 20) == 0


@pytest.mark.parametrize("without", [{"overlap": 0, "memory_mb": 1}, {"memory_mb": None}])
def test_calibration_without_room_is_refused(without: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"^placement.calibrate=8: has no effect without placement.overlap and placement"
    ):
        PlacementConfig(calibrate=8, **without)


def balanced(rank: int, world: int, ranks: int, alone: bool) -> tuple[list[float], list[Tensor], Tensor]:
    """Train two models in turns, with other owners in every step; return norms, expert biases, and an embedding.

    In one process, balancers know the owners that the experts have on ``ranks`` ranks.
    """
    mesh = None if alone else build_mesh(FSSDP)
    extra = ExtraLossConfig(device=0.2, communication=0.1)
    balance = BalanceConfig("global", 0.1, estimator="exact", micro_batches=1, bias_update_rate=0.01, extra=extra)
    config = MoEConfig(16, 8, num_experts=6, top_k=2, balance=balance, init_std=0.3)
    engines, draw, norms = [], random.Random(5), []
    for seed in range(2):
        torch.manual_seed(seed)
        model = Decoder(
            vocab_size=VOCABULARY, seq_len=LENGTH, num_layers=2, num_heads=4, intermediate_size=24, moe=config
        ).double()
        engines.append(build_engine(model, mesh, lambda named: torch.optim.AdamW(named.values(), lr=1e-3)))
        engines[-1].experts.plan = partial(at_random, random.Random(seed))
    for step in range(8):
        engine = engines[step % 2]
        layers = engine.parts[0].moe_layers()
        owners = [Owners.of_ranks(ranks, [draw.randrange(ranks) for _ in range(6)]) for _ in layers]
        if alone:
            for layer, of_layer in zip(layers, owners, strict=True):
                spread = replace(layer.balancer.placement, ep=Axis("ep", size=ranks), owners=of_layer)
                layer.balancer.place(spread)
        else:
            engine.experts.move(owners, engine.optimizer)
        part = (t.chunk(world)[rank] for t in batch(step, Composition(world)).values())
        norms.append(float(engine.step([Batch(*part)], lr=1e-3).norm))
    biases = [layer.router.bias_E.clone() for engine in engines for layer in engine.parts[0].moe_layers()]
    return norms, biases, engines[0].parts[0].embedding.weight.detach()


def test_losses_that_depend_on_owners_and_the_bias_equal_one_process() -> None:
    """Two models train in turns; experts have new owners in every step."""
    ranks = 3
    norms, biases, weight = run_ranks(balanced, 1, ranks, True)[0]
    assert max(float(bias.abs().max()) for bias in biases) > 0
    for found, bias, embedding in run_ranks(balanced, ranks, ranks, False):
        assert found == pytest.approx(norms, rel=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(bias, biases, strict=True))
        assert oracle.relative_error(embedding, weight) < 1e-12


def watched(rank: int, world: int, how: str) -> list[float]:
    """Train with gradients that somebody else holds too, which autograd then copies."""
    mesh = build_mesh(EP if how == "ep" else FSSDP)
    engine, draw, held, norms = engine_of(mesh), random.Random(3), [], []
    for layer in engine.parts[0].moe_layers():
        for weight in layer.experts.parameters():
            weight.register_hook(held.append)
    for step in range(4):
        if how == "moved":
            engine.experts.move(random_owners(draw, engine), engine.optimizer)
        norms += train(engine, mesh, range(step, step + 1))
    return norms


def test_gradients_of_unevenly_owned_experts_may_be_held_by_others() -> None:
    """Autograd copies such a gradient, and allocates the copy as if all ranks owned equally many experts."""
    assert run_ranks(watched, 2, "moved")[0] == pytest.approx(run_ranks(watched, 2, "ep")[0], rel=1e-6)
