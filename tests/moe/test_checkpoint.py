"""Checks that a checkpoint is complete or absent, and that damage is found before anything is used."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from equimoe.moe import BalanceConfig, checkpoint
from equimoe.moe.checkpoint import CheckpointError
from equimoe.moe.parallel import ParallelConfig, build_mesh
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((5, 3), value), "step": torch.tensor(7), "half": torch.ones(4, dtype=torch.bfloat16)}


def save(root: Path, step: int = 1, value: float = 1.0, keep: int = 2) -> Path:
    return checkpoint.save(root, step, state(value), {"world": 1}, keep)


def load(path: Path) -> dict[str, torch.Tensor]:
    into = {name: torch.zeros_like(value) for name, value in state().items()}
    checkpoint.load(path, into, checkpoint.read_manifest(path))
    return into


def test_round_trip_and_retention(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, float(step), keep=2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000004", "step-00000005"]
    got = load(checkpoint.newest(tmp_path))
    assert all(torch.equal(got[name], value) for name, value in state(5.0).items())


@pytest.mark.parametrize("failing", ["rank00000-000.safetensors", "tensors.json", "manifest.json"])
def test_a_failed_save_leaves_nothing_and_an_interrupted_one_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    first = save(tmp_path, 1)
    monkeypatch.setattr("equimoe.moe.checkpoint.files.open", refusing(failing), raising=False)
    with pytest.raises(checkpoint.SaveError, match="step-00000002: cannot be written: No space left .* bytes, .* free"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [first]
    (tmp_path / "step-00000002.tmp").mkdir()  # left by a run that was killed
    assert checkpoint.newest(tmp_path) == first
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def refusing(failing: str) -> Any:
    """Return a function that opens files, except those of the name ``failing``."""

    def opened(file: Path, *args: Any, **kwargs: Any) -> Any:
        if file.name == failing:
            raise OSError(28, "No space left on device")
        return open(file, *args, **kwargs)

    return opened


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000009.tmp").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint; start without --resume"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("seed", range(40))
def test_one_flipped_bit_is_found(tmp_path: Path, seed: int) -> None:
    path = save(tmp_path)
    rng = random.Random(seed)
    file = rng.choice([f for f in sorted(path.iterdir()) if f.name != checkpoint.MANIFEST])
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file.name}: sha256 differs.*restore it or delete this checkpoint"):
        load(path)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_truncated_or_missing_file(tmp_path: Path, cut: int) -> None:
    path = save(tmp_path)
    file = path / "rank00000-000.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="instead of .* bytes"):
        load(path)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing, or not a plain file"):
        load(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"schema": 1}', "[" * 100_000, '{"schema": 1, "files": 3}', "\x00\x01", "NaN"]
    + [
        f'{{"schema": 2, "step": {step}, "position": {{}}, "files": {{}}}}'
        for step in ("-1", "1.0", "true", "1e9", "9" * 9)
    ]
    + ['{"schema": 2, "step": 1, "step": 1, "position": {}, "files": {}}'],
)
def test_broken_manifest(tmp_path: Path, text: str) -> None:
    path = save(tmp_path)
    (path / checkpoint.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="not a readable manifest"):
        load(path)


@pytest.mark.parametrize(
    "other",
    [
        {"model.w": torch.zeros(5, 4)},
        {"model.w": torch.zeros(5, 3, dtype=torch.float64)},
        {"model.v": torch.zeros(5, 3)},
        {"extra": torch.zeros(1)},
    ],
    ids=["shape", "dtype", "name", "missing"],
)
def test_strict_in_both_directions(tmp_path: Path, other: dict[str, torch.Tensor]) -> None:
    path = save(tmp_path)
    into = {"extra": None} | state()
    into.pop("extra")
    if "model.v" in other:
        into.pop("model.w")
    with pytest.raises(CheckpointError, match=f"{next(iter(other))}|model.w: this run wants"):
        checkpoint.load(path, into | other, checkpoint.read_manifest(path))


@pytest.mark.parametrize(
    ("world", "parallel"),
    slow_but(
        [(1, {}), (2, {"tp": 2, "ep": 2}), (2, {"pp": 2})],
        [
            (1, {}),
            (4, {"data_parallel": "fsdp", "ep": 2}),
            (2, {"tp": 2, "ep": 2}),
            (4, {"data_parallel": "fsdp", "tp": 2, "ep": 2}),
            (2, {"pp": 2}),
            (4, {"pp": 2, "data_parallel": "fsdp"}),
        ],
    ),
    ids=str,
)
def test_resume_is_bit_identical_and_experts_are_all_there(
    tmp_path: Path, world: int, parallel: dict[str, Any]
) -> None:
    """4 steps, and 2 + evaluation + resume + 2, must end with the same bits; all experts must be in the file."""
    config = small.on(small.write_texts(tmp_path / "texts"), steps=4)
    corpus = load_corpus(config.data, load_tokenizer("bytes"))
    run = replace(config, parallel=replace(config.parallel, **parallel))

    def script(rank: int, world: int) -> tuple[bool, int]:
        mesh = build_mesh(run.parallel) if world > 1 else None
        straight, first, second = (Trainer(run, corpus, mesh, torch.device("cpu")) for _ in range(3))
        for _ in range(4):
            straight.train_step()
        for _ in range(2):
            first.train_step()
        first.evaluate()  # changes no state, and leaves no weights gathered
        path = first.save(tmp_path / "run")
        second.resume(path, checkpoint.read_manifest(path))
        for _ in range(2):
            second.train_step()
        one, two = straight.state(), second.state()
        equal = all(torch.equal(_whole(one[name]), _whole(two[name])) for name in one)
        own = int(mesh is not None and mesh["pp"].rank)
        weights = _whole(one[f"model.blocks.{own}.mlp.experts.gate_up_proj"])
        return equal, len({w.numpy().tobytes() for w in weights})

    assert run_ranks(script, world) == [(True, 4)] * world


@pytest.mark.slow
def test_a_checkpoint_does_not_depend_on_how_the_vocabulary_was_split(tmp_path: Path) -> None:
    """Saving without tensor parallelism and resuming with it, or vice versa, must keep all bits and losses.

    The vocabulary has 257 entries, of which one rank holds 129 and the other 128.
    """
    config = small.on(small.write_texts(tmp_path / "texts"), steps=4, balance=BalanceConfig(estimator="exact"))
    corpus = load_corpus(config.data, load_tokenizer("bytes"))

    def script(rank: int, world: int) -> list[list[float]]:
        meshes = [build_mesh(ParallelConfig(tp=tp, ep=2, timeout_s=60)) for tp in (1, 2)]
        curves = []
        for name, before, after in (("straight", 0, 0), ("joined", 1, 0), ("split", 0, 1)):
            first, second = (Trainer(config, corpus, meshes[i], torch.device("cpu")) for i in (before, after))
            for _ in range(2):
                first.train_step()
            path = first.save(tmp_path / name)
            manifest = checkpoint.read_manifest(path)
            assert tuple(checkpoint.contents(path, manifest)["model.embedding.weight"].shape) == (257, 16)
            second.resume(path, manifest)
            saved, resumed = first.state(), second.state()
            names = [n for n in saved if n.startswith(("model.", "optimizer."))]
            assert len(names) > 60 and all(torch.equal(_whole(saved[n]), _whole(resumed[n])) for n in names)
            curves.append([second.record(second.train_step())["loss"] for _ in range(2)])
        return curves

    straight, *others = run_ranks(script, 2)[0]
    for other in others:
        assert other == pytest.approx(straight, rel=1e-5)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


def test_resume_with_other_data_is_refused(tmp_path: Path) -> None:
    config = small.on(small.write_texts(tmp_path / "texts"))
    trainer = Trainer(config, load_corpus(config.data, load_tokenizer("bytes")), None, torch.device("cpu"))
    path = trainer.save(tmp_path / "run")
    (tmp_path / "texts" / "domain0" / "new.txt").write_text("something else " * 30)
    other = Trainer(config, load_corpus(config.data, load_tokenizer("bytes")), None, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="was trained on other data"):
        other.resume(path, checkpoint.read_manifest(path))
