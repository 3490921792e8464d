"""Compares dry runs with real runs, with sums done by hand, and with the closed formula of a rank's memory."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from equimoe.launch.dryrun import describe, main
from equimoe.launch.options import parse
from equimoe.launch.recipes import RECIPES
from equimoe.moe.collectives import record_traffic
from equimoe.moe.config import (
    AttentionConfig,
    BalanceConfig,
    DispatchConfig,
    MoEConfig,
    PlacementConfig,
    RotaryScaling,
    RouterConfig,
)
from equimoe.moe.dispatch import DISPATCHERS
from equimoe.moe.engines import Batch, build_engine
from equimoe.moe.parallel import build_mesh
from equimoe.moe.plan import DryRun, dry_run, memory
from equimoe.moe.plan.dry_run import _Chunks, _fsdp_param
from equimoe.moe.plan.record import reached_fraction
from equimoe.moe.routing.select import each_group
from equimoe.moe.train.build import build_model, mixed_precision
from equimoe.moe.train.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from equimoe.moe.train.optim import build_optimizer
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but
from tests.helpers.small import changed

RING = ("all_gather", "reduce_scatter")
MODEL = ModelConfig(num_layers=4, num_heads=4, intermediate_size=24, dense_layers=1, vocab_size=50)
LAYER = MoEConfig(16, 12, num_experts=8, top_k=2, shared_intermediate_size=8)
SMALL = TrainConfig(
    model=MODEL,
    moe=LAYER,
    attention=AttentionConfig(num_kv_heads=2, head_width=6, qk_norm=True),
    data=DataConfig(seq_len=16, global_batch=16, micro_batch=1),
)
LATENT = AttentionConfig("latent", q_lora_rank=6, kv_lora_rank=5, qk_nope_width=4, qk_rope_width=2, v_width=3)
MAPPINGS = {
    "ddp": replace(SMALL, parallel=ParallelConfig(ep=4)),
    "fsdp": replace(SMALL, parallel=ParallelConfig(ep=2, data_parallel="fsdp")),
    "fsdp_twice": replace(SMALL, parallel=ParallelConfig(ep=2, dp_replicate=2, data_parallel="fsdp")),
    "pp": replace(SMALL, parallel=ParallelConfig(pp=2, ep=2, data_parallel="fsdp"), attention=LATENT),
    "tp_ddp": replace(SMALL, parallel=ParallelConfig(tp=2, ep=2)),
    "tp_pp": replace(SMALL, parallel=ParallelConfig(tp=2, pp=2, ep=2)),
    "biases": replace(
        SMALL,
        model=replace(MODEL, tie_embeddings=True),
        parallel=ParallelConfig(tp=2, ep=2, data_parallel="fsdp"),
        attention=AttentionConfig(num_kv_heads=2, head_width=6, bias="all"),
    ),
    "joint": replace(
        SMALL,
        parallel=ParallelConfig(ep=4, data_parallel="fsdp"),
        attention=AttentionConfig(num_kv_heads=2, head_width=6, qk_norm=True, qk_norm_over="all_heads"),
    ),
    "latent_biases": replace(SMALL, parallel=ParallelConfig(tp=2, ep=2), attention=replace(LATENT, bias="all")),
    "tp": replace(SMALL, parallel=ParallelConfig(tp=2, ep=4, data_parallel="fsdp"), attention=LATENT),
}


def dry(config: TrainConfig, world: int, rank: int, timeout: float = 240.0) -> DryRun:
    """Run in a process of its own, because the fake process group would disturb later ones."""

    def script(*_: Any) -> DryRun:
        dist.destroy_process_group()
        return dry_run(config, world, rank)

    return run_ranks(script, 1, timeout=timeout)[0]


def storages(tensors: list[Any]) -> int:
    """Return the bytes of the tensors' storages, counting shared ones once."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def counted(rank: int, world: int, config: TrainConfig) -> dict[str, Any]:
    """Return the bytes that a real step holds, and those that it sends."""
    mesh, cpu = build_mesh(config.parallel), torch.device("cpu")
    passes, shape = config.micro_batches(mesh["dp"].size), (config.data.micro_batch, config.data.seq_len)
    engine = build_engine(
        build_model(config, MODEL.vocab_size or 0),
        mesh,
        lambda trainable: build_optimizer(trainable, config.optim),
        micro_batches=passes,
        shape=shape,
        precision=partial(mixed_precision, config, cpu),
    )
    parameters, optimizer, found = list(engine.parameters.values()), engine.optimizer, {}
    optimizer.register_step_pre_hook(lambda *_: found.update(gradients=storages([p.grad for p in parameters])))
    torch.manual_seed(mesh["dp"].rank)
    batches = [Batch(torch.randint(50, shape), torch.randint(50, shape))] * passes
    with record_traffic() as traffic:
        engine.step(batches, config.optim.lr)
    found["parameters"] = storages(parameters)
    found["optimizer state"] = storages([t for state in optimizer.state.values() for t in state.values()])
    found["collectives"] = sorted({(entry.axis, entry.size) for entry in traffic})
    return found


@pytest.mark.parametrize("name", slow_but(["ddp", "pp"], MAPPINGS))
def test_a_real_run_has_what_the_formula_and_the_dry_run_say(name: str) -> None:
    config = MAPPINGS[name]
    for rank, real in enumerate(run_ranks(counted, 4, config, timeout=120.0)):
        formula = memory(config, 4, rank)
        assert real["parameters"] == formula.parameters
        assert real["gradients"] == formula.gradients
        assert real["optimizer state"] == formula.optimizer_state
        if rank == 3:
            found = dry(config, 4, rank)
            assert {kind: found.most[kind] for kind in ("parameters", "gradients", "optimizer state")} == {
                kind: real[kind] for kind in ("parameters", "gradients", "optimizer state")
            }
            seen = {(kind.axis, kind.ranks) for kind, _, _ in found.traffic}
            assert set(real["collectives"]) <= seen


def test_a_dry_run_says_how_attention_within_documents_is_counted() -> None:
    for documents, notes in (("joined", 0), ("separate", 1)):
        found = dry(replace(SMALL, data=replace(SMALL.data, documents=documents)), 1, 0)
        assert sum("is counted as with data.documents=joined" in note for note in found.notes) == notes


@pytest.mark.parametrize("dispatcher", [name for name in DISPATCHERS if name != "local"])
def test_a_rank_with_one_expert(dispatcher: Any) -> None:
    """The rank's only valid choice is expert 0, and it computes as many rows as its own tokens choose."""
    model, parallel = replace(MODEL, num_layers=1, dense_layers=0), ParallelConfig(ep=8)
    config = changed(SMALL, model=model, parallel=parallel, dispatch=DispatchConfig(name=dispatcher))
    found = dry(config, 8, 5)
    assert found.most["parameters"] == memory(config, 8, 5).parameters
    products = 3 * 2 * found.micro_batches * 16 * 2 * 16 * 3 * 12
    if dispatcher in ("all_gather", "hierarchical"):  # rows that arrive for other experts are counted too
        assert found.flops["experts"] > products
    else:
        assert found.flops["experts"] == products


#: recipe -> ranks that hold one expert each
ONE_EACH = {"quickstart": 8, "mixtral": 8, "qwen3_global_batch": 64, "qwen3_235b": 128, "deepseek_v3": 256}


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.slow
def test_recipes_with_one_expert_on_each_rank(name: str) -> None:
    """Each recipe runs with one layer."""
    ep = ONE_EACH[name]
    argv = ["--recipe", name, "--model.num_layers", "1", "--model.dense_layers", "0", "--model.vocab_size", "512"]
    argv += ["--model.moe_every", "1", "--parallel.ep", str(ep), "--parallel.pp", "1", "--parallel.tp", "1"]
    config = parse([*argv, "--data.global_batch", str(ep), "--data.micro_batch", "1"]).config
    found, moe = dry(config, ep, ep - 1), config.moe
    products = (4 if config.model.recompute else 3) * 2 * config.data.seq_len * moe.top_k
    assert found.flops["experts"] == products * moe.hidden_size * 3 * moe.intermediate_size


def test_bytes_and_products_by_hand() -> None:
    """A middle pipeline stage: all-to-alls of two layers, hidden states to both neighbours, matrix products."""
    model = replace(MODEL, num_layers=8, dense_layers=0, num_heads=2)
    parallel = ParallelConfig(pp=4, ep=2)
    data = replace(SMALL.data, micro_batch=2, global_batch=32)
    config = changed(
        SMALL, model=model, shared_intermediate_size=0, attention=AttentionConfig(), parallel=parallel, data=data
    )
    found = dry(config, 8, 5)
    assert found.blocks == [4, 5] and found.micro_batches == 8 and found.simulated == 4
    tokens, rows, d, f = 8 * 2 * 16, 8 * 2 * 16 * 2, 16, 12
    hidden = 4 * d * tokens
    sent = {(kind.verb, kind.axis): size for kind, _, size in found.traffic}
    assert sent["send", "pp"] == 2 * hidden and sent["recv", "pp"] == 0
    # per layer half of the rows, dispatched and combined, with gradients; weights, padded to 16 bytes; rows per expert
    exchanged = 2 * (4 * rows // 2 * 4 * d + 2 * rows // 2 * 16 + 8 * 8 // 2 * 8)
    assert sent["all_to_all", "ep"] == exchanged
    assert found.flops["experts"] == 2 * 3 * 2 * rows * d * 3 * f
    projections, pairs = 3 * 2 * tokens * d * 4 * d, 16 * 17 // 2
    scores = 2 * (2 * 2 + 5 * 2) * (d // 2) * 2 * pairs * 16 // 2
    assert found.flops["attention"] == 2 * (projections + scores)
    assert found.flops["router"] == 2 * 3 * 2 * tokens * d * 8
    inside = {(kind.verb, kind.axis): kind.inside_node for kind, _, _ in found.traffic}
    assert inside["all_to_all", "ep"] and inside["send", "pp"]


@pytest.mark.parametrize("slots", slow_but([1], [1, 5]))
def test_products_of_slots_by_hand(slots: int) -> None:
    """Experts process the slots of each sequence, whatever its length."""
    router, balance = RouterConfig(gate="slots", slots=slots, sees_future=True), BalanceConfig(coefficient=0.0)
    parallel = ParallelConfig(ep=2)
    found = dry(changed(SMALL, router=router, balance=balance, top_k=1, parallel=parallel), 2, 1)
    assert found.flops["experts"] == 3 * 3 * 2 * found.micro_batches * 8 * slots * 16 * 3 * 12


def test_bytes_of_fully_sharded_weights_by_hand() -> None:
    """Blocks are gathered for each forward and backward, other weights once for both; the reductions come last."""
    config = replace(SMALL, parallel=ParallelConfig(data_parallel="fsdp"))
    found, own = dry(config, 2, 1), memory(config, 2, 1).parameters
    outside = 4 * (25 * 16 + 8 + 25 * 16)
    sent = {verb: sum(size for kind, _, size in found.traffic if kind.verb == verb) for verb in RING}
    assert sent["reduce_scatter"] == own
    assert sent["all_gather"] == found.micro_batches * (2 * own - outside)
    assert {kind.axis for kind, _, _ in found.traffic if kind.verb in RING} == {"fsdp"}


@pytest.mark.slow
def test_bytes_of_replicas_by_hand() -> None:
    """Rank 0 owns the experts that are replicated: it sends each to three ranks, and they return gradients."""
    model, data = replace(MODEL, num_layers=2), replace(SMALL.data, global_batch=8)
    sparse, calls, sent = replace(SMALL, model=model, data=data, parallel=ParallelConfig(experts="fssdp")), [], []
    for placement in (
        PlacementConfig(overlap=0),
        PlacementConfig(overlap=2, reshard_every=1),
        PlacementConfig(overlap=2, memory_mb=1, calibrate=0),
    ):
        found = [dry(replace(sparse, placement=placement), 4, rank) for rank in (0, 3)]
        calls.append([sum(calls for kind, calls, _ in of.traffic if kind.axis == "ep") for of in found])
        sent.append([sum(size for kind, _, size in of.traffic if kind.axis == "ep") for of in found])
    layers, expert = model.num_layers - model.dense_layers, 4 * 3 * 16 * 12
    forwards = layers * found[0].micro_batches
    slots = 2 * 3 * 8  # numbers of rows, int64, for two more slots of each of the others
    more = [forwards * (2 * 3 * expert + slots), forwards * (2 * expert + slots)]
    assert [b - a for a, b in zip(sent[0], sent[1], strict=True)] == more
    assert [b - a for a, b in zip(calls[0], calls[1], strict=True)] == [2 * forwards] * 2
    assert (sent[2], calls[2]) == (sent[1], calls[1])


def test_products_of_attention_with_a_window_by_hand() -> None:
    """A mask makes the kernel compute all pairs of positions; rotary scaling and biases cost no product."""
    plain = AttentionConfig(num_kv_heads=2, head_width=6)
    windowed = replace(plain, window=4, window_from=1, bias="all", scaling=RotaryScaling())
    before, after = (dry(replace(SMALL, attention=a), 1, 0).flops["attention"] for a in (plain, windowed))
    more = 3 * 4 * 16 * (16 * 16 - 16 * 17 // 2)  # layers, heads, sequences, pairs
    assert after - before == more * 2 * (2 + 5) * 6
    with pytest.raises(ValueError, match="attention.window=4: has no formula; use equimoe.launch.dryrun"):
        memory(replace(SMALL, attention=windowed), 1, 0)


@pytest.mark.slow
def test_memory_is_counted_at_its_peak() -> None:
    config = replace(SMALL, parallel=ParallelConfig(ep=2, data_parallel="fsdp"))
    found = dry(config, 4, 0)
    assert sum(found.memory.values()) <= sum(found.most.values())
    assert found.memory["parameters"] == found.most["parameters"]
    assert found.memory["optimizer state"] == found.most["optimizer state"]
    assert found.memory["activations"] > 0.9 * found.most["activations"]  # not during the optimizer step
    longer = dry(replace(config, data=replace(config.data, seq_len=32)), 4, 0)
    assert longer.most["parameters"] == found.most["parameters"]
    assert longer.most["activations"] > 1.9 * found.most["activations"]
    less = dry(replace(config, model=replace(MODEL, recompute=True)), 4, 0)
    assert less.most["activations"] < 0.7 * found.most["activations"]
    assert sum(less.flops.values()) > 1.2 * sum(found.flops.values())


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["bfloat16", "float32"]))
def test_memory_of_a_large_vocabulary(dtype: Any) -> None:
    """Without a pipeline, only the log-softmax of the logits is kept; the peak is in the backward of the loss."""
    model, parallel = replace(MODEL, vocab_size=5000), ParallelConfig(data_parallel="fsdp")
    config = replace(SMALL, dtype=dtype, model=model, parallel=parallel)
    found, formula = dry(config, 2, 0), memory(config, 2, 0)
    assert formula.loss == 2 * 4 * 5000 * 16
    assert found.memory["temporary"] == pytest.approx(formula.loss, rel=0.01)
    assert found.most["activations"] == pytest.approx(formula.activations, rel=0.02)
    assert found.most["gathered weights"] == pytest.approx(formula.gathered_weights, rel=0.02)
    # at the peak, gradients have not been reduced yet
    assert sum(found.memory.values()) == pytest.approx(formula.total - formula.gradients, rel=0.05)


def test_share_of_tokens_that_choose_a_place() -> None:
    """Compare with random draws: 8 of 64 experts, also limited to 2 of 4 groups, or 2 in each of 4 groups."""
    limited, each = RouterConfig(groups=4, kept_groups=2), RouterConfig(groups=4, select="each_group")
    for router, experts in ((RouterConfig(), 16), (limited, 8), (each, 8), (each, 16)):
        generator = torch.Generator().manual_seed(0)
        scores_TE = torch.rand(20000, 64, generator=generator)
        if router is limited:
            kept_TG = torch.rand(20000, 4, generator=generator).argsort(1)[:, :2]
            open_TG = torch.zeros(20000, 4).scatter_(1, kept_TG, 1.0)
            scores_TE = scores_TE * open_TG.repeat_interleave(16, dim=1)
        chosen_TK = scores_TE.topk(8, dim=1).indices
        if router is each:
            chosen_TK = each_group(scores_TE, scores_TE, None, 1, 8, 4)
        want = float((chosen_TK < experts).any(1).float().mean())
        assert reached_fraction(MoEConfig(4, 4, 64, 8, router=router), experts) == pytest.approx(want, abs=0.01)


def within(found: DryRun, config: TrainConfig) -> None:
    """Check that each kind of memory agrees with the formula to 5 %, and weights exactly."""
    formula = memory(config, found.world, found.rank)
    for kind in ("parameters", "gradients", "optimizer state"):
        assert found.most[kind] == getattr(formula, kind.replace(" ", "_"))
    for kind in ("whole gradients", "gathered weights", "activations"):
        assert found.most.get(kind, 0) == pytest.approx(getattr(formula, kind.replace(" ", "_")), rel=0.05), kind


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_deepseek_v3_at_1024_ranks(tmp_path: Path) -> None:
    """The command takes a minute and 8 GB on an idle machine; the test allows three times as long."""
    file, command = tmp_path / "found.json", [sys.executable, "-m", "equimoe.launch.dryrun"]
    argv = ["--recipe", "deepseek_v3", "--world", "1024", "--rank", "517", "--json", str(file)]
    start = time.monotonic()
    done = subprocess.run([*command, *argv], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 180
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 8e6
    assert "routing is assumed to be balanced" in done.stdout
    values = json.loads(file.read_text())
    kinds = [(entry["verb"], entry["axis"], entry["ranks"], entry["inside_node"]) for entry in values["traffic"]]
    assert ("all_to_all", "ep", 64, False) in kinds and ("send", "pp", 16, False) in kinds
    values["traffic"] = []
    within(DryRun(**values), RECIPES["deepseek_v3"]())


@pytest.mark.slow
def test_qwen3_235b_at_1024_ranks() -> None:
    config = parse(["--recipe", "qwen3_235b", "--model.recompute", "true"]).config
    found = dry(config, 1024, 1023)
    within(found, config)
    assert found.blocks == [89, 90, 91, 92, 93]


@pytest.mark.parametrize("rank", [0, 16383])
@pytest.mark.slow
def test_deepseek_v3_made_shallow_at_16384_ranks(rank: int) -> None:
    argv = ["--recipe", "deepseek_v3", "--data.global_batch", "16384", "--model.num_layers", "16"]
    config = parse([*argv, "--model.dense_layers", "1", "--model.recompute", "false"]).config
    found = dry(config, 16384, rank)
    within(found, config)
    assert found.blocks == [rank // 1024]
    assert {kind.ranks for kind, _, _ in found.traffic if kind.axis == "fsdp"} == {1024}


@pytest.mark.parametrize(("name", "rank"), [("deepseek_v3", 63), ("qwen3_235b", 0)])
@pytest.mark.slow
def test_models_made_shallow_under_tensor_parallelism(name: str, rank: int) -> None:
    argv = ["--recipe", name, "--model.num_layers", "4", "--model.dense_layers", "1", "--model.recompute", "false"]
    argv += ["--parallel.pp", "4", "--parallel.ep", "16", "--parallel.tp", "2", "--data.global_batch", "64"]
    config = parse(argv).config
    within(dry(config, 64, rank), config)


@pytest.mark.parametrize(
    "how",
    [
        ["--recompute.part", "attention"],
        ["--recompute.part", "feed_forward", "--recompute.keep_exchanges"],
        ["--recompute.layers", "2", "--recompute.keep_exchanges"],
        ["--model.recompute", "false", "--moe.recompute_experts", "--moe.dispatch.name", "hierarchical"],
    ],
)
@pytest.mark.slow
def test_ways_to_keep_less(how: list[str]) -> None:
    argv = ["--recipe", "qwen3_235b", "--model.num_layers", "12", "--parallel.pp", "4", "--parallel.ep", "16", *how]
    config = parse([*argv, "--parallel.tp", "1", "--data.global_batch", "64"]).config
    found = dry(config, 64, 1)
    nodes = {(kind.axis, kind.inside_node) for kind, _, _ in found.traffic if kind.axis.startswith("ep.")}
    if config.moe.dispatch.name == "hierarchical":
        assert nodes == {("ep.across", False), ("ep.within", True)}
    else:
        within(found, config)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rank", "1"], "--world: is missing; give the number of ranks, as in --world 1024"),
        (["--world", "0"], "--world=0: must be a whole number of at least 1"),
        (["--world", "two"], "--world=two: must be a whole number of at least 1"),
        (["--world=4", "--rank=4"], "--rank=4: must be a whole number from 0 to 3"),
        (["--world", "4", "--node"], "--node: give a value, as in --node VALUE"),
        (["--world", "4", "--node", "0"], "--node=0: must be a whole number of at least 1"),
        (["--world", "4", "--nodes", "8"], "--nodes: no such option"),
        (["--world", "4", "--recipe", "gpt"], "--recipe=gpt: no such recipe; use one of "),
        (["--world", "3", "--parallel.ep", "2"], "parallel.ep=2: must divide the number of processes, which is 3; "),
        (["--world", "4", "--json", ""], "--json=: is empty; give a value, or leave the option out"),
        (["--world", "4", "--data.global_batch", "9"], "data.global_batch=9: must be a multiple of "),
        (
            ["--world", "4", "--parallel.pp", "2"],
            "micro_batches=1: parallel.schedule='1f1b' needs at least 2 with parallel.pp=2: set data.micro_batch=4, ",
        ),
        (
            ["--world", "16384", "--recipe", "deepseek_v3"],
            "micro_batches=15: parallel.schedule='1f1b' needs at least 16 with parallel.pp=16: "
            "multiply data.global_batch by 16/15, which makes it 16",
        ),
        (
            ["--world", "16384", "--recipe", "qwen3_235b"],
            "micro_batches=8: parallel.schedule='1f1b' needs at least 16 with parallel.pp=16: "
            "multiply data.global_batch by 2, which makes it 16",
        ),
        (
            ["--world", "2048", "--recipe", "deepseek_v3", "--parallel.schedule", "interleaved_1f1b"],
            "micro_batches=120: parallel.schedule='interleaved_1f1b' runs 7 equal rounds; ",
        ),
        (
            ["--world", "4", "--parallel.tp", "4"],
            "parallel.tp=4: must divide model.num_heads=6; use one of 1, 2, 3, 6, ",
        ),
    ],
)
def test_mistakes_end_with_one_line_and_64(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 64
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--world", "4", "--json", str(tmp_path / "no" / "file")])
    assert stop.value.code == 73
    assert capsys.readouterr().err.count("\n") == 1


def test_help_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "--world INT" in capsys.readouterr().out
    text = describe(dry(MAPPINGS["pp"], 4, 1), MAPPINGS["pp"])
    assert "rank 1 of 4: blocks 0-1 of 4" in text and "activations" in text and "all_to_all" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(("shape", "dim", "number"), [((7, 3), 0, 3), ((2, 3), 0, 5), ((4, 9), 1, 4), ((8,), 0, 8)])
def test_parts_of_weights_are_those_of_torch(shape: tuple[int, ...], dim: int, number: int) -> None:
    tensor = torch.arange(math.prod(shape)).view(shape)
    few = _Chunks(tensor, number, dim)
    for index, want in enumerate(_fsdp_param._chunk_with_empty(tensor, number, dim)):
        assert few[index].shape == want.shape and torch.equal(few[index], want)


def test_fsdp_makes_no_part_of_a_weight_per_rank() -> None:
    """With 2,048 ranks and hundreds of weights, that would take minutes."""

    def script(*_: Any) -> int:
        dist.destroy_process_group()
        _fsdp_param._chunk_with_empty = lambda *_: pytest.fail("torch's function makes one per rank")
        return dry_run(MAPPINGS["fsdp"], 8, 0).parameters

    assert run_ranks(script, 1)[0] > 0
