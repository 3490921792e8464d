"""Checks that damage to checkpoints, and strange entries beside them, are named and lose nothing valid."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from equimoe.launch import env
from equimoe.launch.options import to_yaml
from equimoe.moe import checkpoint
from equimoe.moe.checkpoint import CheckpointError, ViewError
from equimoe.moe.train.config import CheckpointConfig
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.checkpoints import forge, load_all
from tests.helpers.command import Ended, launch
from tests.helpers.fork import run_ranks

SHARD = "rank00000-000.safetensors"


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((5, 3), value), "model.b": torch.ones(4, dtype=torch.bfloat16)}


def save(root: Path, step: int, keep: int = 9) -> Path:
    return checkpoint.save(root, step, state(float(step)), {"data": "\u00e9", "world": 1}, keep)


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def chosen(root: Path) -> str:
    choice = checkpoint.choose(root)
    assert choice is not None
    return choice.path.name


# ---- one checkpoint


@pytest.mark.parametrize("stride", [97, pytest.param(1, marks=pytest.mark.faults)])
def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path, stride: int) -> None:
    path = save(tmp_path, 1)
    file = path / checkpoint.MANIFEST
    content, found = file.read_bytes(), 0
    for bit in range(0, 8 * len(content), stride):
        flip(file, bit)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read_manifest(path)
        found += "\n" not in str(caught.value)
        file.write_bytes(content)
    if stride == 1:
        report("13", f"{found} of {8 * len(content)} bits of the manifest found")
    checkpoint.read_manifest(path)


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.faults)])
def test_flipped_bits_of_files_are_found(tmp_path: Path, count: int) -> None:
    path, rng = save(tmp_path, 1), random.Random(0)
    for _ in range(count):
        file = path / rng.choice([SHARD, "tensors.json"])
        content = file.read_bytes()
        flip(file, rng.randrange(8 * len(content)))
        with pytest.raises(CheckpointError, match=f"{file.name}: sha256 differs"):
            load_all(path)
        file.write_bytes(content)
    if count == 200:
        report("13", f"{count} of {count} bits of files found")


def test_truncated_files_are_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for name in (SHARD, "tensors.json", checkpoint.MANIFEST):
        content = (path / name).read_bytes()
        for part in range(20):
            left = len(content) * part // 20
            (path / name).write_bytes(content[:left])
            what = "not a readable manifest" if name == checkpoint.MANIFEST else f"{left} instead of {len(content)}"
            with pytest.raises(CheckpointError, match=f"{name}: {what}"):
                load_all(path)
        (path / name).write_bytes(content)
    report("12", "60 of 60 truncations found")
    load_all(path)


@pytest.mark.parametrize("kept", [[], ["tensors.json"]], ids=["no file", "description only"])
def test_a_manifest_that_does_not_list_every_file_is_refused(tmp_path: Path, kept: list[str]) -> None:
    path = save(tmp_path, 1)
    files = json.loads((path / checkpoint.MANIFEST).read_text())["files"]
    flip(path / SHARD, 900)
    forge(path, files={name: entry for name, entry in files.items() if name in kept})
    with pytest.raises(CheckpointError, match="rank00000-000.safetensors: missing from the manifest"):
        checkpoint.read_manifest(path)


def test_a_folder_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    path.rename(tmp_path / "step-00000008")
    with pytest.raises(CheckpointError, match="manifest.json: is of step 7, unlike its folder"):
        checkpoint.read_manifest(tmp_path / "step-00000008")
    shutil.copytree(tmp_path / "step-00000008", tmp_path / "best")
    assert load_all(tmp_path / "best")  # any other name is fine


def test_a_manifest_without_a_checksum_can_still_be_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    del manifest["sha256"]
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"schema": 2}))
    assert load_all(path)
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="sha256 differs"):
        load_all(path)


# ---- the folder of a run


def test_the_newest_valid_checkpoint_is_chosen(tmp_path: Path) -> None:
    assert checkpoint.choose(tmp_path / "nowhere") is None
    for step in range(1, 7):
        save(tmp_path, step)
    assert chosen(tmp_path) == "step-00000006"
    flip(tmp_path / "step-00000006" / SHARD, 900)
    (tmp_path / "step-00000005" / checkpoint.MANIFEST).unlink()
    shutil.rmtree(tmp_path / "step-00000004")
    (tmp_path / "step-00000004").symlink_to("step-00000003")
    (tmp_path / "step-00000099").write_text("a file")
    os.mkfifo(tmp_path / "step-00000098")
    (tmp_path / "step-00000097").symlink_to("step-00000097")
    (tmp_path / "step-00000096.tmp").mkdir()
    assert chosen(tmp_path) == "step-00000003"
    choice = checkpoint.choose(tmp_path)
    assert choice is not None and len(choice.passed_over) == 6
    line = checkpoint.describe(choice)
    assert line.startswith("resuming from step-00000003, because newer ones are not valid: ") and "\n" not in line
    assert "and 3 more" in line
    for step in (97, 98, 99):
        assert f"/step-000000{step}: is " in line and f"step-000000{step}/{checkpoint.MANIFEST}" not in line
    shutil.rmtree(tmp_path / "step-00000003")
    for step in (1, 2):
        flip(tmp_path / f"step-{step:08d}" / SHARD, 900)
    with pytest.raises(CheckpointError, match="no checkpoint in .* is valid: .*; and 5 more") as caught:
        checkpoint.choose(tmp_path)
    assert "\n" not in str(caught.value)


STRAY: dict[str, Callable[[Path], object]] = {
    "link": lambda root: (root / "step-00000001").symlink_to("/"),
    "link to itself": lambda root: (root / "step-00000001").symlink_to("step-00000001"),
    "link, unfinished": lambda root: (root / "step-00000003.tmp").symlink_to("/"),
    "file, unfinished": lambda root: (root / "step-00000003.tmp").write_text("x"),
    "pipe, unfinished": lambda root: os.mkfifo(root / "step-00000009.tmp"),
    "file": lambda root: (root / "step-00000001").write_text("x"),
    "pipe": lambda root: os.mkfifo(root / "step-00000001"),
    "empty folder": lambda root: (root / "step-00000001").mkdir(),
    "odd names": lambda root: [(root / name).mkdir() for name in ("step-\n\x1b[2J", "step-", "step-1", "x" * 255)],
    "not text": lambda root: (root / os.fsdecode(b"step-\xff.tmp")).mkdir(),
    "other numerals": lambda root: (root / "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661").mkdir(),
}


@pytest.mark.parametrize("kind", STRAY)
def test_a_save_succeeds_whatever_lies_in_the_folder(tmp_path: Path, kind: str) -> None:
    """What has the name of a checkpoint, finished or not, is ours to delete; all else stays."""
    save(tmp_path, 2)
    STRAY[kind](tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    strange = {path.name for path in tmp_path.iterdir() if kind in ("odd names", "not text", "other numerals")}
    save(tmp_path, 3, keep=2)
    assert chosen(tmp_path) == "step-00000003"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step-00000002", "step-00000003", "notes.txt"} | strange
    assert os.path.exists("/etc")


def test_an_entry_that_cannot_be_deleted_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def refuse(path: Path) -> None:
        if path.name == "step-00000001":
            raise OSError(1, "Operation not permitted", str(path))

    monkeypatch.setattr("equimoe.moe.checkpoint.retention.remove", refuse)
    with pytest.warns(RuntimeWarning, match="step-00000001: cannot be deleted .Operation not permitted") as warned:
        save(tmp_path, 2, keep=1)
    assert len(warned) == 1 and chosen(tmp_path) == "step-00000002"


def damage_bit(path: Path) -> None:
    flip(path / SHARD, 900)


def damage_manifest(path: Path) -> None:
    (path / checkpoint.MANIFEST).write_text("{}")


@pytest.mark.parametrize("damage", [damage_bit, damage_manifest, lambda path: (path / SHARD).unlink()])
@pytest.mark.parametrize("keep", [1, 2])
def test_retention_counts_valid_checkpoints_only(tmp_path: Path, damage: Callable[[Path], Any], keep: int) -> None:
    """A run resumes from step 20, because 40 is damaged, and saves 30; then 40 again."""
    for step in (10, 20, 40):
        save(tmp_path, step)
    damage(tmp_path / "step-00000040")
    for step in (15, 30):
        (tmp_path / f"step-{step:08d}.tmp").mkdir()  # abandoned
    save(tmp_path, 30, keep)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == (["step-00000020"] if keep == 2 else []) + ["step-00000030", "step-00000040"]
    assert chosen(tmp_path) == "step-00000030"
    save(tmp_path, 40, keep)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == (["step-00000030"] if keep == 2 else []) + ["step-00000040"]
    assert chosen(tmp_path) == "step-00000040"
    report("44", "the newest valid checkpoints are kept")


def test_damage_between_two_saves_of_a_run_is_noticed(tmp_path: Path) -> None:
    """What the run has saved itself is not read again, unless it has changed."""
    saver = checkpoint.Saver(keep_last=2)
    for step in range(1, 5):
        saver.start(tmp_path, step, state(), {})
        saver.wait()
        if step == 3:
            damage_bit(tmp_path / "step-00000003")
    saver.close()
    assert [path.name for path in checkpoint.complete(tmp_path)] == [f"step-0000000{step}" for step in (2, 3, 4)]


# ---- agreement of all ranks


def test_all_ranks_choose_the_same_checkpoint_and_share_the_work(tmp_path: Path) -> None:
    for step in (1, 2):
        run_ranks(lambda rank, world, step: checkpoint.save(tmp_path, step, ranks_state(rank), {}, 9) and None, 4, step)
    flip(tmp_path / "step-00000002" / "rank00003-000.safetensors", 900)

    def script(rank: int, world: int) -> tuple[str, str, int]:
        import equimoe.moe.checkpoint.manifest as manifest

        read, real = [], manifest.sha256
        manifest.sha256 = lambda file: (read.append(file.name), real(file))[1]  # type: ignore
        choice = checkpoint.choose(tmp_path)
        assert choice is not None
        return choice.path.name, checkpoint.describe(choice), len(read)

    found = run_ranks(script, 4)
    assert len({line for _, line, _ in found}) == 1 and "rank00003-000.safetensors: sha256 differs" in found[0][1]
    assert {name for name, *_ in found} == {"step-00000001"}
    assert sum(count for *_, count in found) == 2 * 5  # every file once


def ranks_state(rank: int) -> dict[str, torch.Tensor]:
    return {f"model.w{rank}": torch.ones(5, 3)}


def _remove_newest(root: Path) -> None:
    shutil.rmtree(root / "step-00000002")


def _other_manifest(root: Path) -> None:
    forge(root / "step-00000002", position={"other": 1})


def _without_file(root: Path) -> None:
    (root / "step-00000002" / SHARD).unlink()


@pytest.mark.parametrize(
    "change", [_remove_newest, _other_manifest, _without_file, lambda root: damage_bit(root / "step-00000002")]
)
@pytest.mark.parametrize("odd", [0, 1])
def test_nodes_that_see_different_folders_do_not_resume(
    tmp_path: Path, change: Callable[[Path], Any], odd: int
) -> None:
    for step in (1, 2):
        save(tmp_path / "node0", step)
    shutil.copytree(tmp_path / "node0", tmp_path / "node1")
    change(tmp_path / f"node{odd}")

    def script(rank: int, world: int) -> str:
        with pytest.raises(ViewError) as caught:
            checkpoint.choose(tmp_path / f"node{rank}")
        return str(caught.value)

    for line in run_ranks(script, 2):
        assert "step-00000002" in line and "put the run's folder (--run-dir) on storage" in line and "\n" not in line
    report("53", "different views of a folder: one line, and no resume")


def test_nodes_with_equal_copies_verify_their_own(tmp_path: Path) -> None:
    """Copies are allowed for reading; each is verified as a whole."""
    save(tmp_path / "node0", 1)
    shutil.copytree(tmp_path / "node0", tmp_path / "node1")
    names = run_ranks(lambda rank, world: chosen(tmp_path / f"node{rank}"), 2)
    assert names == ["step-00000001"] * 2


# ---- the command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Return a function that runs the small run on two ranks, with a save in every step."""
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())
    config = small.on(small.write_texts(tmp_path / "texts"), steps=3, checkpoint=CheckpointConfig(1, keep_last=3))
    (tmp_path / "small.yaml").write_text(to_yaml(config))
    base = ["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run")]
    return lambda *options, **how: launch([*base, *options], 2, cwd=tmp_path, **how)


def test_a_run_resumes_from_the_newest_valid_checkpoint_and_says_so(
    tmp_path: Path, run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run().codes == [0, 0]
    root = tmp_path / "run" / "checkpoints"
    flip(root / "step-00000003" / "rank00001-000.safetensors", 900)
    again = run("--resume")
    assert again.codes == [0, 0] and len(again.errors) == 1
    assert again.errors[0].startswith("note: resuming from step-00000002, because newer ones are not valid: ")
    assert "step-00000003/rank00001-000.safetensors: sha256 differs" in again.errors[0]
    load_all(root / "step-00000003")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    finished = run()
    assert finished.codes == [0, 0] and "is finished, as step-00000003 has reached" in finished.out[0]
    for path in checkpoint.complete(root):
        flip(path / "tensors.json", 9)
    lost = run()
    assert lost.codes == [env.CHECKPOINT] * 2 and len(lost.errors) == 1 and "no checkpoint in" in lost.errors[0]


def test_a_run_whose_ranks_see_different_checkpoints_ends(run: Callable[..., Ended]) -> None:
    @contextmanager
    def blind() -> Iterator[None]:
        seen = mock.patch("equimoe.moe.checkpoint.agreement.candidates", return_value=[])
        with seen if os.environ["RANK"] == "1" else nullcontext():
            yield

    assert run().codes == [0, 0]
    ended = run("--resume", within=blind)
    assert ended.codes == [env.DISAGREEMENT] * 2 and len(ended.errors) == 1
    assert "does not see step-00000003, unlike rank 0; put the run's folder" in ended.errors[0]


def forget_checkpoints(run_dir: Path) -> None:
    """Leave what a run leaves that is killed before its first save ends."""
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints" / "step-00000001.tmp").mkdir(parents=True)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(line for line in lines if '"kind": "checkpoint"' not in line))


def test_a_run_that_has_no_checkpoint_yet_starts_and_says_so(
    tmp_path: Path, run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = run("--resume")
    assert missing.codes == [env.CHECKPOINT] * 2 and "no complete checkpoint" in missing.errors[0]
    assert run("--steps", "1").codes == [0, 0]
    forget_checkpoints(tmp_path / "run")
    corrected = run("--steps", "1", "--optim.lr", "0.02")
    assert corrected.codes == [0, 0] and "ended before its first checkpoint; starting again" in corrected.errors[0]
    assert (tmp_path / "run" / "metrics.previous.jsonl").exists()
    forget_checkpoints(tmp_path / "run")
    begun = run("--resume", "--steps", "1")
    assert begun.codes == [0, 0] and len(begun.errors) == 1
    assert "ended before its first checkpoint; starting again from step 0" in begun.errors[0]
