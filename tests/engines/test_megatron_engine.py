"""Training with Megatron-Core equals training in one process, on every mesh that it holds here.

The model has MoE layers with the global-batch loss (estimator "exact") and weight decay, and gradients are clipped.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("megatron.core", reason="needs Megatron-Core, which `make engines` installs")
pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("ignore")]  # of what it would use on a GPU

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402

from equimoe.launch import env  # noqa: E402
from equimoe.launch.options import to_yaml  # noqa: E402
from equimoe.launch.recipes import RECIPES  # noqa: E402
from equimoe.moe import BalanceConfig, MoEConfig, RouterConfig, checkpoint  # noqa: E402
from equimoe.moe.config import AttentionConfig, CapacityConfig, RotaryScaling  # noqa: E402
from equimoe.moe.engines import Batch, Engine, build_engine  # noqa: E402
from equimoe.moe.engines.megatron import build_megatron_engine  # noqa: E402
from equimoe.moe.engines.megatron.engine import check_degrees  # noqa: E402
from equimoe.moe.model import Decoder  # noqa: E402
from equimoe.moe.observe.metrics import read_records  # noqa: E402
from equimoe.moe.parallel import Mesh, ParallelConfig, build_mesh  # noqa: E402
from tests.helpers import small, trained  # noqa: E402
from tests.helpers.casts import Casts, always_cast  # noqa: E402
from tests.helpers.command import launch  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.megatron_cpu import megatron_on_cpu  # noqa: E402
from tests.helpers.megatron_cpu import save as write  # noqa: E402
from tests.helpers.recorded import full  # noqa: E402

STEPS, RATE = 3, 0.01
#: more than fp32 sums in another order differ by
TOLERANCE = 1e-5
ATTENTION = AttentionConfig(num_kv_heads=2, head_width=8, qk_norm=True, rotary_base=500.0)
MESHES: dict[str, dict[str, Any]] = {
    "ep 2": {"ep": 2},
    "tp 2": {"tp": 2},
    "tp 2, ep 4": {"tp": 2, "ep": 4},
    "tp 2, etp 2, ep 2": {"tp": 2, "etp": 2, "ep": 2},
    "pp 2, ep 2": {"pp": 2, "ep": 2},
    "pp 2, tp 2": {"pp": 2, "tp": 2},
}


def adamw(trainable: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    matrices = [p for p in trainable.values() if p.dim() > 1]
    rest = [p for p in trainable.values() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, weight_decay=0.5, eps=1e-3, betas=(0.8, 0.95))


def model(layers: int = 4, wide: int = 24, **how: Any) -> Any:
    """Grouped-query attention with norms of queries and keys, dense and MoE blocks, shared experts, a bias."""
    torch.manual_seed(0)
    balance = BalanceConfig(coefficient=0.1, estimator="exact", bias_update_rate=0.01)
    moe = MoEConfig(
        16,
        8,
        num_experts=4,
        top_k=2,
        balance=balance,
        router=RouterConfig(z_loss=0.01),
        shared_intermediate_size=8,
        shared_gate=True,
        init_std=0.2,
    )
    how = {"attention": ATTENTION, "norm_eps": 1e-3} | how
    return Decoder(
        vocab_size=trained.VOCABULARY,
        seq_len=trained.LENGTH,
        num_layers=layers,
        num_heads=4,
        intermediate_size=wide,
        moe=moe,
        moe_every=2,
        **how,
    )


def batches(mesh: Mesh | None, step: int) -> list[Batch]:
    """This rank's micro-batches. Each has another number of masked positions."""
    return [replace(b, mask=b.inputs % 5 != 0) for b in trained.varied(trained.batches(mesh, step), step)]


def mesh_of(**degrees: Any) -> Mesh:
    return build_mesh(ParallelConfig(**degrees, sequence_parallel=False))


def megatron_engine(mesh: Mesh | None, **how: Any) -> Any:
    return build_megatron_engine(how.pop("model", None) or model(), mesh, adamw, max_norm=1.0, **how)


def torch_engine(mesh: Mesh | None) -> Engine:
    return build_engine(model(), mesh, adamw, max_norm=1.0)


def trajectory(engine: Engine, mesh: Mesh | None, steps: int = STEPS, first: int = 0) -> list[tuple[float, float]]:
    """(this rank's part of the sum of losses, gradient norm) of each step."""
    results = [engine.step(batches(mesh, first + step), RATE) for step in range(steps)]
    assert all(result.applied for result in results)
    once = 1.0 if mesh is None or mesh["tp"].rank == 0 else 0.0
    return [(once * float(sum(losses.sum() for losses in result.losses)), float(result.norm)) for result in results]


def whole_state(engine: Engine) -> dict[str, Tensor]:
    return {name: full(value).clone() for name, value in engine.state().items()}


@cache
def one_process(steps: int = STEPS) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    engine = torch_engine(None)
    return trajectory(engine, None, steps), whole_state(engine)


def compare(state: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    error, name = trained.worst({n: v.view_as(right[n]) for n, v in state.items()}, right)
    assert error < TOLERANCE, name


def check(results: list[Any], steps: int = STEPS) -> None:
    """The losses of all ranks add up to those of one process; norms, weights, moments and biases equal them."""
    expected, right = one_process(steps)
    for step, (loss, norm) in enumerate(expected):
        assert sum(found[step][0] for found, _ in results) == pytest.approx(loss, rel=TOLERANCE), step
        assert all(found[step][1] == pytest.approx(norm, rel=TOLERANCE) for found, _ in results), step
    names: set[str] = set()
    for _, state in results:
        names |= state.keys()
        compare(state, right)
    assert names == right.keys()


@pytest.mark.parametrize("name", MESHES)
def test_equals_one_process(name: str) -> None:
    def rank_main(rank: int, world: int) -> Any:
        with megatron_on_cpu():
            mesh = mesh_of(**MESHES[name])
            again = name in ("ep 2", "pp 2, ep 2")
            engine = megatron_engine(mesh, model=model(recompute_blocks=again), distributed_optimizer=not again)
            return trajectory(engine, mesh), whole_state(engine)

    check(run_ranks(rank_main, 4, timeout=110))


def test_one_rank_needs_no_launcher() -> None:
    def rank_main(rank: int, world: int) -> Any:
        torch.distributed.destroy_process_group()
        with megatron_on_cpu():
            engine = megatron_engine(None)
            return trajectory(engine, None), whole_state(engine)

    check(run_ranks(rank_main, 1))


@pytest.mark.parametrize("distributed", [False, True])
def test_unusual_steps(distributed: bool) -> None:
    """An evaluation, a step that raises and one that is not finite leave nothing behind."""

    def rank_main(rank: int, world: int) -> Any:
        with megatron_on_cpu():
            mesh = mesh_of(ep=2)
            engine = megatron_engine(mesh, distributed_optimizer=distributed)
            found = trajectory(engine, mesh, 1)
            trained.disturb(engine, partial(batches, mesh), whole_state)
            found += trajectory(engine, mesh, 1, first=1)
            trained.disturb(engine, partial(batches, mesh), whole_state, last="raises")
            return found + trajectory(engine, mesh, STEPS - 2, first=2), whole_state(engine)

    check(run_ranks(rank_main, 2))


@pytest.mark.parametrize("name", ["ep 2", "tp 2", "pp 2, ep 2"])
def test_evaluation_equals_one_process(name: str) -> None:
    expected = build_engine(model(), None, adamw).evaluate(batches(None, 3))
    right = float(sum(losses.sum() for losses in expected))

    def rank_main(rank: int, world: int) -> float:
        with megatron_on_cpu():
            mesh = mesh_of(**MESHES[name])
            found = megatron_engine(mesh).evaluate(batches(mesh, 3))
            assert all(losses.dim() == 2 for losses in found)
            return (mesh["tp"].rank == 0) * float(sum(losses.sum() for losses in found))

    assert sum(run_ranks(rank_main, 4)) == pytest.approx(right, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("first", "then", "builds"),
    [
        ("ep 2", "pp 2, tp 2", "megatron"),
        ("tp 2, etp 2, ep 2", "tp 2, etp 2, ep 2", "torch"),
        ("pp 2, ep 2", None, "torch"),
    ],
)
def test_our_checkpoint_goes_from_one_mesh_and_engine_to_another(
    tmp_path: Path, first: str, then: str | None, builds: str
) -> None:
    def save(rank: int, world: int) -> Any:
        with megatron_on_cpu():
            mesh = mesh_of(**MESHES[first])
            engine = megatron_engine(mesh)
            found = trajectory(engine, mesh, 2)
            checkpoint.save(tmp_path, 2, engine.state(), {}, 1)
            return found

    def resume(rank: int, world: int) -> Any:
        with megatron_on_cpu():
            mesh = mesh_of(**MESHES[then]) if then else None
            engine: Any = megatron_engine(mesh) if builds == "megatron" else torch_engine(mesh)
            path = checkpoint.newest(tmp_path)
            manifest = checkpoint.read_manifest(path)
            engine.expect(checkpoint.contents(path, manifest))
            state = engine.state()
            checkpoint.load(path, state, manifest)
            engine.restore(state)
            return trajectory(engine, mesh, 1, first=2), whole_state(engine)

    before = run_ranks(save, 4, timeout=100)
    after = run_ranks(resume, 4 if then else 1, timeout=100)
    expected, right = one_process()
    for step in (0, 1):
        assert sum(found[step][0] for found in before) == pytest.approx(expected[step][0], rel=TOLERANCE)
    assert sum(found[0][0] for found, _ in after) == pytest.approx(expected[2][0], rel=TOLERANCE)
    for _, state in after:
        compare(state, right)


def test_half_of_a_parameter_cannot_be_frozen() -> None:
    def half() -> Decoder:
        frozen = model()
        trained.freeze(frozen, lambda name: name == "blocks.0.mlp.gate_proj.weight")
        return frozen

    refused("blocks.0.mlp.up_proj.weight: Megatron-Core holds gate_proj and up_proj in one", {}, model=half)


@pytest.mark.parametrize(("first", "then"), [("ep 2", "pp 2, tp 2"), ("tp 2, etp 2, ep 2", "ep 2")])
def test_megatrons_checkpoint_goes_from_one_mesh_to_another(tmp_path: Path, first: str, then: str) -> None:
    """Each rank holds other experts, and none is lost."""

    def save(rank: int, world: int) -> dict[str, Tensor]:
        with megatron_on_cpu():
            mesh = mesh_of(**MESHES[first])
            engine = megatron_engine(mesh)
            trajectory(engine, mesh, 1)
            write(engine.parts[0].sharded_state_dict(), tmp_path)
            return whole_state(engine)

    def load(rank: int, world: int) -> dict[str, Tensor]:
        with megatron_on_cpu():
            engine = megatron_engine(mesh_of(**MESHES[then]))
            found = dist_checkpointing.load(engine.parts[0].sharded_state_dict(), str(tmp_path))
            engine.parts[0].load_state_dict(found)
            return whole_state(engine)

    (saved, *_), loaded = run_ranks(save, 4, timeout=100), run_ranks(load, 4, timeout=100)
    weights = {name: value for name, value in saved.items() if name.startswith("model.")}
    assert {name for state in loaded for name in state if name.startswith("model.")} == weights.keys()
    for state in loaded:
        for name in state.keys() & weights.keys():
            assert torch.equal(state[name].view_as(weights[name]), weights[name]), name


@pytest.mark.parametrize("degrees", [{"ep": 2}, {"tp": 2}])
def test_frozen_weights_stay(degrees: dict[str, int]) -> None:
    def rank_main(rank: int, world: int) -> Any:
        with megatron_on_cpu():
            mesh, frozen = mesh_of(**degrees), model()
            trained.freeze(frozen, lambda name: "attention" in name or "router" in name)
            before = {n: p.detach().clone() for n, p in frozen.named_parameters() if not p.requires_grad}
            engine = megatron_engine(mesh, model=frozen)
            trajectory(engine, mesh, 2)
            after = whole_state(engine)
            assert all(torch.equal(after[f"model.{n}"], value) for n, value in before.items())
            assert not any("router" in name for name in after if name.startswith("optimizer."))
            next(p for p in engine.parts[0].parameters() if p.requires_grad).requires_grad_(False)
            with pytest.raises(ValueError, match="was frozen or unfrozen after the Megatron engine was built"):
                engine.step(batches(mesh, 5), RATE)

    run_ranks(rank_main, 2)


def all_but_the_head(named: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for name, p in named.items() if name != "head.weight"])


def half_frozen() -> Decoder:
    frozen = model()
    trained.freeze(frozen, lambda name: name.startswith(("embedding", "blocks.0", "blocks.1")))
    return frozen


def by_token() -> Decoder:
    moe = MoEConfig(16, 8, 4, 2, RouterConfig(gate="hash"), BalanceConfig(coefficient=0.0))
    return Decoder(vocab_size=32, seq_len=8, num_layers=1, num_heads=2, intermediate_size=24, moe=moe)


def refused(message: str, mesh: dict[str, Any], **how: Any) -> None:
    def rank_main(rank: int, world: int) -> None:
        with megatron_on_cpu(), pytest.raises(ValueError, match=message) as caught:
            made, optimizer = how.get("model", model), how.get("optimizer", adamw)
            build_megatron_engine(made(), build_mesh(ParallelConfig(**{"sequence_parallel": False, **mesh})), optimizer)
        assert "\n" not in str(caught.value)

    run_ranks(rank_main, 2)


@pytest.mark.parametrize(
    ("message", "mesh", "how"),
    [
        ("parallel.cp=2: the Megatron engine cannot hold it", {"cp": 2}, {}),
        ("parallel.data_parallel='fsdp'", {"data_parallel": "fsdp"}, {}),
        ("parallel.sequence_parallel=True", {"tp": 2, "sequence_parallel": True}, {}),
        ("parallel.schedule='gpipe'", {"pp": 2, "schedule": "gpipe"}, {}),
        ("model.num_layers=3: must be divisible by parallel.pp=2", {"pp": 2}, {"model": partial(model, 3)}),
        ("optimizer: does not hold head.weight", {}, {"optimizer": all_but_the_head}),
        ("embedding.weight: is torch.bfloat16, but", {}, {"model": lambda: model().bfloat16()}),
        (
            "model.intermediate_size=25: must be divisible by parallel.tp=2",
            {"tp": 2},
            {"model": partial(model, wide=25)},
        ),
        *(
            (
                f"attention.{name}=.*: the Megatron engine does not have it",
                {},
                {"model": partial(model, attention=with_)},
            )
            for name, with_ in {
                "bias": replace(ATTENTION, bias="inputs"),
                "qk_norm_over": replace(ATTENTION, qk_norm_over="all_heads"),
                "scaling": replace(ATTENTION, scaling=RotaryScaling()),
                "window": replace(ATTENTION, window=3, window_from=1),
            }.items()
        ),
        ("router.gate: the Megatron engine does not give routers the tokens", {}, {"model": by_token}),
        ("model.head: shares its weight with the embedding", {}, {"model": partial(model, tie_embeddings=True)}),
        ("on some rank .a pipeline stage. all weights are frozen", {"pp": 2}, {"model": half_frozen}),
        ("model: a Linear; the Megatron engine trains only a Decoder", {}, {"model": lambda: nn.Linear(2, 2)}),
        (
            "optimizer=SGD: Megatron-Core's optimizer is AdamW",
            {},
            {"optimizer": lambda named: torch.optim.SGD(named.values(), lr=0.1)},
        ),
    ],
)
def test_what_cannot_be_is_one_line(message: str, mesh: dict[str, Any], how: dict[str, Any]) -> None:
    refused(message, mesh, **how)


def test_a_mesh_that_disagrees_with_parallel_state_is_refused() -> None:
    def rank_main(rank: int, world: int) -> None:
        with megatron_on_cpu():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
            with pytest.raises(ValueError, match=r"parallel.tp: the mesh has ranks \[\d\], but parallel_state has"):
                megatron_engine(mesh_of(ep=2))

    run_ranks(rank_main, 2)


def test_without_a_gpu_it_is_one_line() -> None:
    def rank_main(rank: int, world: int) -> None:
        with pytest.raises(ValueError, match="engine='megatron': Megatron-Core needs a GPU"):
            megatron_engine(mesh_of())

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run_ranks(rank_main, 1)


def test_stages_exchange_hidden_states_in_one_dtype_under_autocast() -> None:
    def rank_main(rank: int, world: int) -> list[tuple[float, float]]:
        with megatron_on_cpu():
            mesh = mesh_of(pp=2)
            return trajectory(megatron_engine(mesh, precision=partial(torch.autocast, "cpu", torch.bfloat16)), mesh)

    found = run_ranks(rank_main, 2)
    for step, (loss, norm) in enumerate(one_process()[0]):
        assert sum(of_rank[step][0] for of_rank in found) == pytest.approx(loss, rel=2e-2), step
        assert found[0][step][1] == pytest.approx(norm, rel=0.1), step


@pytest.mark.parametrize("degrees", [{"ep": 2}, {"pp": 2}])
@pytest.mark.parametrize("distributed", [False, True])
def test_weights_that_are_cast_once_per_step_get_the_bits_of_casts_in_every_forward(
    degrees: dict[str, int], distributed: bool
) -> None:
    """Micro-batches are counted ahead."""

    def found(mesh: Mesh) -> tuple[dict[str, Tensor], list[Tensor], int]:
        bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
        engine, losses = megatron_engine(mesh, precision=bf16, distributed_optimizer=distributed), []
        for step in range(STEPS):
            with Casts(engine.parts[0]) as casts:
                losses += engine.step(batches(mesh, step), RATE).losses
            losses += engine.evaluate(batches(mesh, 9))
        return whole_state(engine), losses, casts.count

    @megatron_on_cpu()
    def rank_main(rank: int, world: int) -> tuple[bool, int, int]:
        mesh = mesh_of(**degrees)
        state, losses, once = found(mesh)
        with always_cast():
            right, expected, always = found(mesh)
        equal = all(torch.equal(state[n], value) for n, value in right.items())
        return equal and all(map(torch.equal, losses, expected)), once, always

    for equal, once, always in run_ranks(rank_main, 2, timeout=100):
        assert equal and 0 < once == always / (2 * trained.MICRO_BATCHES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_and_back_to_our_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())
    config = small.on(small.write_texts(tmp_path / "texts"), steps=4, ep=2, capacity=CapacityConfig(factor=1.5))
    (tmp_path / "small.yaml").write_text(to_yaml(config))

    def command(folder: str, *options: str) -> list[tuple[float, float]]:
        base = ["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / folder), "--dtype", dtype]
        ended = launch([*base, *options], 2, cwd=tmp_path, timeout=100, within=megatron_on_cpu)
        assert ended.codes == [0, 0], ended.errors[-20:]
        records = read_records(tmp_path / folder / "metrics.jsonl")
        return [(r["loss"], r["grad_norm"]) for r in records if r["kind"] == "train"]

    expected = command("torch")
    found = command("megatron", "--engine", "megatron")
    assert len(expected) == 4
    for got, right in zip(found, expected, strict=True):
        assert got == pytest.approx(right, rel=1e-5 if dtype == "float32" else 2e-2)
    if dtype == "float32":
        command("both", "--engine", "megatron", "--steps", "2")
        for got, right in zip(command("both", "--resume"), expected, strict=True):
            assert got == pytest.approx(right, rel=1e-5)


def test_which_recipes_the_engine_holds() -> None:
    """The page of engines names them."""
    held = set()
    for name, recipe in RECIPES.items():
        with suppress(ValueError):
            config = recipe()
            check_degrees(config.degrees(1024 if name in ("deepseek_v3", "qwen3_235b") else 8))
            held |= {name} if config.attention.kind == "grouped" else set()
    page = (Path(__file__).resolve().parents[2] / "docs" / "engines.md").read_text()
    (named,) = re.findall(r"`--engine megatron` trains a recipe \(([^)]*)\)", page)
    assert held == set(re.findall(r"`(\w+)`", named))


def test_the_command_names_what_it_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(to_yaml(small.on(small.write_texts(tmp_path / "texts"), steps=1)))
    options = ["--config", "small.yaml", "--run-dir", "run", "--engine", "megatron", "--parallel.cp", "2"]
    ended = launch(options, 2, cwd=tmp_path, within=megatron_on_cpu)
    assert ended.codes == [env.CONFIG] * 2
    assert sum("parallel.cp=2: the Megatron engine cannot hold it" in line for line in ended.errors) >= 1
