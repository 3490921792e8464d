"""Checks that a run resumes on any other mesh, also a larger one, with the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from equimoe.moe import BalanceConfig, MoEConfig, checkpoint
from equimoe.moe.parallel import build_mesh
from equimoe.moe.train.config import TrainConfig
from equimoe.moe.train.data import Corpus, load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer, seed_step
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.checkpoints import load_all
from tests.helpers.fork import run_ranks

FSDP = {"data_parallel": "fsdp"}
#: name -> number of ranks, and how the model is split over them
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "dp 2": (2, {}),
    "ep 2": (2, {"ep": 2}),
    "etp 2": (2, {"etp": 2}),
    "tp 2, ep 2": (2, {"tp": 2, "ep": 2}),
    "cp 2, ep 2": (2, {"cp": 2, "ep": 2}),
    "pp 2": (2, {"pp": 2}),
    "fsdp 2": (2, FSDP),
    "dp 4, ep 4": (4, {"ep": 4}),
    "dp 4, ep 2, etp 2": (4, {"ep": 2, "etp": 2}),
    "fsdp 4, ep 2": (4, {**FSDP, "ep": 2}),
    "fsdp 4, etp 2": (4, {**FSDP, "etp": 2}),
    "hsdp 2 x 2, etp 2": (4, {**FSDP, "dp_replicate": 2, "dp_shard": 2, "etp": 2}),
    "tp 2, fsdp 2, ep 2, etp 2": (4, {**FSDP, "tp": 2, "ep": 2, "etp": 2}),
    "pp 2, tp 2, etp 2": (4, {"pp": 2, "tp": 2, "etp": 2}),
    "pp 2, fsdp 2, ep 2": (4, {**FSDP, "pp": 2, "ep": 2}),
    "fsdp 8, one expert for two ranks": (8, FSDP),
    "tp 2, fsdp 4, etp 2": (8, {**FSDP, "tp": 2, "etp": 2}),
    "pp 2, tp 2, ep 4": (8, {"pp": 2, "tp": 2, "ep": 4}),
}
#: the ones that the fast test resumes from, and on
FAST = ["one process", "etp 2", "hsdp 2 x 2, etp 2"]


def config_of(texts: Path, mesh: str) -> TrainConfig:
    config = small.on(small.write_texts(texts) if not texts.exists() else texts)
    layer = MoEConfig(16, 16, num_experts=4, top_k=2, balance=BalanceConfig(estimator="carry", bias_update_rate=0.01))
    data = replace(config.data, micro_batch=1)
    return replace(config, moe=layer, data=data, parallel=replace(config.parallel, **MESHES[mesh][1]))


def trainer_of(texts: Path, mesh: str, corpus: Corpus) -> Trainer:
    config = config_of(texts, mesh)
    return Trainer(config, corpus, build_mesh(config.parallel) if MESHES[mesh][0] > 1 else None, torch.device("cpu"))


def pairs(folder: Path, meshes: list[str], train: bool) -> list[tuple[str, str, str]]:
    """Resume on every mesh from the checkpoint of every mesh; return (from, onto, what is wrong)."""
    texts = folder / "texts"
    corpus = load_corpus(config_of(texts, meshes[0]).data, load_tokenizer("bytes"))

    def save(rank: int, world: int, mesh: str) -> None:
        trainer = trainer_of(texts, mesh, corpus)
        for _ in range(2):
            trainer.train_step()
        trainer.save(folder / mesh)

    def resave(rank: int, world: int, mesh: str) -> None:
        for other in meshes:
            trainer = trainer_of(texts, mesh, corpus)
            path = folder / other / "step-00000002"
            trainer.resume(path, checkpoint.read_manifest(path))
            trainer.save(folder / f"{other} to {mesh}")
            if train:
                trainer.train_step()

    for mesh in meshes:
        run_ranks(save, MESHES[mesh][0], mesh)
    for mesh in meshes:
        run_ranks(resave, MESHES[mesh][0], mesh, timeout=100)
    found = []
    for before in meshes:
        saved = load_all(folder / before / "step-00000002")
        assert len([name for name in saved if name.startswith("optimizer.")]) > 40
        assert saved["model.blocks.0.mlp.experts.gate_up_proj"].shape == (4, 32, 16)
        for after in meshes:
            resumed = load_all(folder / f"{before} to {after}" / "step-00000002")
            wrong = sorted(saved.keys() ^ resumed.keys()) or [n for n in saved if not torch.equal(saved[n], resumed[n])]
            found.append((before, after, ", ".join(wrong[:3])))
    return found


@pytest.mark.faults
def test_a_run_resumes_on_another_mesh_in_the_same_bits(tmp_path: Path) -> None:
    assert [pair for pair in pairs(tmp_path, FAST, train=True) if pair[2]] == []


def test_uneven_parts_of_two_kinds_of_parallelism(tmp_path: Path) -> None:
    """Tensor parallelism splits 11 rows into 6 and 5, and FSDP these into 3, 3, and 3, 2."""

    def script(rank: int, world: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = torch.nn.Linear(2, 11, bias=False)
        weight = torch.arange(22.0).view(11, 2)
        model.weight = torch.nn.Parameter(distribute_tensor(weight, mesh["tp"], [Shard(0)]))
        fully_shard(model, mesh=mesh["dp"])
        state = {"model.w": model.weight.detach()}
        path = checkpoint.save(tmp_path, 1, state, {}, keep_last=1)
        state["model.w"].zero_()
        checkpoint.load(path, state, checkpoint.read_manifest(path))
        sizes = {3: [(0, 0), (1, 0), (0, 1)], 2: [(1, 1)]}
        place = mesh.get_coordinate()
        assert tuple(place or ()) in sizes[len(state["model.w"].to_local())]
        assert torch.equal(load_all(path)["model.w"], weight)
        assert torch.equal(state["model.w"].full_tensor(), weight)

    run_ranks(script, 4)


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_all_meshes(tmp_path: Path) -> None:
    found = pairs(tmp_path, list(MESHES), train=False)
    equal = sum(not wrong for *_, wrong in found)
    growing = sum(not wrong and MESHES[before][0] < MESHES[after][0] for before, after, wrong in found)
    report("17", f"{equal} of {len(found)} pairs of meshes bit-identical", growing=growing)
    assert [pair for pair in found if pair[2]] == []


def test_random_states_depend_on_seed_step_and_rank_only() -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        seed_step(seed, step, rank)
        return torch.rand(()).item()

    assert draw(0, 3, 1) == draw(0, 3, 1)
    assert len({draw(seed, step, rank) for seed in range(2) for step in range(5) for rank in range(5)}) == 50


@pytest.mark.faults
def test_random_numbers_go_on_after_a_resume_on_another_mesh(tmp_path: Path) -> None:
    """What a rank draws within a step is the same, whether or not the run was interrupted, and wherever."""
    texts = tmp_path / "texts"
    corpus = load_corpus(config_of(texts, "dp 2").data, load_tokenizer("bytes"))

    def script(rank: int, world: int, mesh: str, start: Path | None) -> list[float]:
        trainer, drawn = trainer_of(texts, mesh, corpus), []
        trainer.model.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(()).item()))
        if start is not None:
            trainer.resume(start, checkpoint.read_manifest(start))
        while trainer.step < 4:
            trainer.train_step()
            if trainer.step == 2 and start is None:
                trainer.save(tmp_path / mesh)
        return drawn[-4:]  # of the last step

    straight = {mesh: run_ranks(script, 2, mesh, None) for mesh in ("dp 2", "ep 2")}
    resumed = run_ranks(script, 2, "ep 2", tmp_path / "dp 2" / "step-00000002")
    assert resumed == straight["ep 2"] == straight["dp 2"]
