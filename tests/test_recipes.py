"""The recipes of published models: their sizes, their architectures, and the meshes that they are meant for."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from equimoe.launch.options import parse
from equimoe.launch.recipes import RECIPES
from equimoe.launch.recipes.scale import tiny
from equimoe.launch.recipes.table import PUBLISHED, parameters, table
from equimoe.moe.observe.metrics import METRICS_FILE, read_records
from equimoe.moe.parallel.stages import check_pipeline
from equimoe.moe.plan import DryRun, dry_run, memory, sizes
from equimoe.moe.train.build import build_model
from equimoe.moe.train.config import TrainConfig
from tests.helpers.command import launch
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but

ROOT = Path(__file__).resolve().parents[1]
#: (recipe, which parameters) -> what we have, relative to the printed number, if it is not the same
APART = {("expert_choice", "active"): 0.986, ("hmoe_3b", "total"): 1.0126}
#: recipes that are simulated here; of the others, some take minutes (equimoe.launch.dryrun simulates any of them)
SIMULATED = ("xmoe", "softmoe", "hmoe_3b", "deepseekmoe_16b")
#: recipes of our own models
STUDIES = {"quickstart", "mixtral", "qwen3_global_batch"}


def agrees(count: int, printed: str) -> bool:
    """Return whether a number is the printed one to 1 %, or to its last digit."""
    number = printed.removeprefix(">").removesuffix("B")
    last = 1e9 * 10.0 ** -len(number.partition(".")[2])
    if printed.startswith(">"):
        return 1.0 < count / (float(number) * 1e9) < 1.05
    return abs(count - float(number) * 1e9) <= max(0.01 * float(number) * 1e9, last)


def test_all_published_models_have_a_row() -> None:
    assert set(PUBLISHED) | STUDIES == set(RECIPES) and not STUDIES & set(PUBLISHED)
    for name, published in PUBLISHED.items():
        assert f"arXiv {published.paper}" in (RECIPES[name].__doc__ or "")


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_as_published(name: str) -> None:
    for which, count in zip(("total", "active"), parameters(name), strict=True):
        printed = getattr(PUBLISHED[name], which)
        assert printed is None or agrees(round(count / APART.get((name, which), 1.0)), printed), (which, count)


def test_what_agrees() -> None:
    assert agrees(16_376_000_000, "16.4B") and agrees(3_353_000_000, "3.3B") and agrees(21_376_000_000, "21B")
    assert not agrees(16_600_000_000, "16.4B") and not agrees(3_410_000_000, "3.3B")
    assert agrees(619_200_000_000, ">600B") and not agrees(599_000_000_000, ">600B")


@pytest.mark.parametrize("name", slow_but(["quickstart", "xmoe", "deepseek_v3"], RECIPES))
def test_sizes_are_those_of_the_model_that_is_built(name: str) -> None:
    config, vocabulary = RECIPES[name](), RECIPES[name]().model.vocab_size or 257
    with torch.device("meta"):
        model = build_model(config, vocabulary)
    found = sizes(config, vocabulary)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.embedding == model.get_parameter("embedding.weight").numel()
    idle = 1 - config.moe.top_k / config.moe.num_experts
    experts = sum(w.numel() for layer in model.moe_layers() for w in layer.experts.parameters())
    assert found.active == found.total - round(experts * idle)


def test_sizes_need_a_vocabulary() -> None:
    with pytest.raises(ValueError, match="model.vocab_size=None: give the tokenizer's vocabulary size"):
        sizes(RECIPES["quickstart"]())


def test_the_page_has_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help", "recipes"])
    assert capsys.readouterr().out == table() + "\n"
    assert table() in (ROOT / "docs" / "recipes.md").read_text()
    assert "| `deepseek_v3` | " in table() and " | 671.0B | 671B | 36.63B * | 36.6B | 1,024 | 25.0 |" in table()


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_mesh_can_be_launched(name: str) -> None:
    """Its degrees fit the ranks, experts, heads and batch, and every rank fits a GPU of 80 GB."""
    config, ranks = RECIPES[name](), PUBLISHED[name].ranks
    degrees = config.degrees(ranks)
    if degrees.pp > 1:
        layers, passes = config.model.num_layers, config.micro_batches(degrees.dp)
        check_pipeline(degrees.schedule, degrees.pp, degrees.stages_of_rank, passes, layers, config.data.micro_batch)
    for rank in range(0, ranks, ranks // degrees.pp):
        assert memory(config, ranks, rank).total < 64 << 30


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_recipes_run_dry_on_their_meshes(name: str) -> None:
    """The weights, gradients and optimizer state of the last rank are those of the formula, which all recipes fit."""
    config, ranks = RECIPES[name](), PUBLISHED[name].ranks
    degrees = config.degrees(ranks)
    fewest = degrees.dp * degrees.pp * config.data.micro_batch  # sequences with which every stage works
    config = replace(config, data=replace(config.data, global_batch=fewest))
    found, formula = dry(config, ranks, ranks - 1), memory(config, ranks, ranks - 1)
    for kind in ("parameters", "gradients", "optimizer state"):
        assert found.most[kind] == getattr(formula, kind.replace(" ", "_")), kind
    assert found.most["activations"] > 0 and found.flops["experts"] > 0


def dry(config: TrainConfig, world: int, rank: int) -> DryRun:
    """Run in a process of its own, because the fake process group would disturb later ones."""

    def script(*_: Any) -> DryRun:
        dist.destroy_process_group()
        return dry_run(config, world, rank)

    return run_ranks(script, 1, timeout=500.0)[0]


def test_a_tiny_recipe_keeps_its_routing() -> None:
    full, small = (parse(["--recipe", "deepseek_v2", *scale]) for scale in ([], ["--scale", "tiny"]))
    assert small.config == tiny(full.config) and parse(["--recipe", "deepseek_v2", "--scale=full"]) == full
    assert (small.run_dir, full.run_dir) == (Path("runs/deepseek_v2-tiny"), Path("runs/deepseek_v2"))
    assert parse(["--scale", "tiny", "--moe.top_k", "3"]).config.moe.top_k == 3
    with pytest.raises(ValueError, match="--scale=small: must be one of full, tiny"):
        parse(["--scale", "small"])


@pytest.mark.parametrize("name", RECIPES)
def test_tiny_recipes(name: str) -> None:
    """Only sizes differ: of the layer, of groups that get equally many choices, of slots and of the first steps."""
    whole = RECIPES[name]()
    small = tiny(whole)
    sizes_of_moe = {"hidden_size", "intermediate_size", "widths", "num_experts", "top_k", "shared_intermediate_size"}
    sizes_of_moe.add("router")
    for field, value in vars(whole.moe).items():
        assert field in sizes_of_moe or getattr(small.moe, field) == value, field
    counts = {name: getattr(whole.moe.router, name) for name in ("groups", "slots", "random_steps")}
    assert replace(small.moe.router, **counts) == whole.moe.router
    ratios = [{Fraction(w, moe.intermediate_size) for w in moe.expert_widths} for moe in (small.moe, whole.moe)]
    assert ratios[0] == ratios[1]
    assert (small.moe.top_k > 1) == (whole.moe.top_k > 1) and small.moe.top_k < small.moe.num_experts
    assert (small.moe.shared_intermediate_size > 0) == (whole.moe.shared_intermediate_size > 0)
    assert (small.attention.kind, small.attention.qk_norm) == (whole.attention.kind, whole.attention.qk_norm)
    assert (small.attention.num_kv_heads is None) == (whole.attention.num_kv_heads is None)
    assert (small.model.dense_layers > 0) == (whole.model.dense_layers > 0)
    assert sizes(small, 257).total < 1_500_000 and small.degrees(2).ep == 2
    with torch.device("meta"):
        layers = build_model(small, 257).moe_layers()
    assert 1 <= len(layers) <= 2


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_every_recipe_trains_at_a_tiny_scale(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 steps on two processes that share the experts; the loss falls by half a nat."""
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())
    argv = ["--recipe", name, "--scale", "tiny", "--steps", "30", "--log.every", "1", "--log.eval_every", "0"]
    argv += ["--run-dir", "run", "--data.builtin_bytes_per_domain", "50000", "--log.trackers", "none"]
    ended = launch(argv, 2, cwd=tmp_path, timeout=180.0)
    assert ended.codes == [0, 0], ended.errors
    losses = [r["loss"] for r in read_records(tmp_path / "run" / METRICS_FILE) if r["kind"] == "train"]
    assert len(losses) == 30 and sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.5, losses
