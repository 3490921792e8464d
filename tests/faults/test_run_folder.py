"""Checks what a run makes of its folder: one that cannot be used, that has lost its checkpoints, or that disappears."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from equimoe.launch import env, train
from equimoe.moe import checkpoint
from equimoe.moe.observe.metrics import MetricsWriter, read_records
from equimoe.moe.train.config import CheckpointConfig
from equimoe.moe.train.trainer import Trainer
from tests.faults.conftest import Run, command
from tests.helpers.command import one_line

pytestmark = pytest.mark.faults

FILES = "equimoe.moe.checkpoint.files"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs four steps in folder ``run``, with a save in steps 2 and 4."""
    return command(tmp_path, monkeypatch, steps=4, checkpoint=CheckpointConfig(2))


# ---- the checkpoints are gone


def _delete(root: Path) -> None:
    shutil.rmtree(root)


def _empty(root: Path) -> None:
    """As a mount point whose file system is not mounted."""
    _delete(root)
    root.mkdir()


def _file(root: Path) -> None:
    _delete(root)
    root.write_text("a file")


def _dangle(root: Path) -> None:
    _delete(root)
    root.symlink_to("unmounted")


def _circle(root: Path) -> None:
    _delete(root)
    root.symlink_to(root.name)


LOSSES = {
    _delete: "holds no checkpoint, although the run has saved one in step 4; put it back",
    _empty: "holds no checkpoint, although the run has saved one in step 4; put it back",
    _file: "holds no checkpoint, although the run has saved one in step 4; put it back",
    _dangle: "holds no checkpoint, although the run has saved one in step 4; put it back",
    _circle: "cannot be read (Too many levels of symbolic links)",
}


@pytest.mark.parametrize(("lose", "every"), [*((lose, "2") for lose in LOSSES), (_empty, "0")])
def test_a_run_whose_checkpoints_are_gone_does_not_start_again(
    tmp_path: Path, run: Run, lose: Callable[[Path], None], every: str
) -> None:
    root, metrics = tmp_path / "run" / "checkpoints", tmp_path / "run" / "metrics.jsonl"
    assert run("--checkpoint.every", every).codes == [0]
    before = metrics.read_bytes()
    saves = [record["step"] for record in read_records(metrics) if record["kind"] == "checkpoint"]
    assert saves == ([2, 4] if every == "2" else [4])
    lose(root)
    for options in (["--resume"], ["--requeue"], ["--resume", "--dry-run"]):
        one_line(run(*options, "--steps", "5"), env.CHECKPOINT, f"{root}: ", LOSSES[lose])
    if lose is _delete:  # who asks for a new run gets one
        ended = run("--dry-run")
        assert ended.codes == [0] and len(ended.errors) == 1 and "one in step 4; starting from step 0" in ended.err[0]
    assert metrics.read_bytes() == before and not (tmp_path / "run" / "metrics.previous.jsonl").exists()


def test_ranks_refuse_alike_if_the_checkpoints_are_gone(tmp_path: Path, run: Run) -> None:
    assert run().codes == [0]
    _circle(tmp_path / "run" / "checkpoints")
    one_line(run("--resume", world=2), env.CHECKPOINT, "cannot be read (Too many levels of symbolic links)")
    (tmp_path / "run" / "checkpoints").unlink()
    one_line(run("--requeue", world=2), env.CHECKPOINT, "although the run has saved one in step 4")


@contextmanager
def breaking(action: Callable[[Trainer], None], step: int = 1) -> Iterator[None]:
    """Call ``action`` at the beginning of the training step after ``step``."""
    real = Trainer.train_step

    def train_step(trainer: Trainer, observed: bool = True) -> torch.Tensor:
        if trainer.step == step:
            action(trainer)
        return real(trainer, observed)

    with mock.patch.object(Trainer, "train_step", train_step):
        yield


def _end(_: Trainer) -> None:
    raise ArithmeticError("planted")


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(tmp_path: Path, run: Run) -> None:
    """Also if its first save failed: there is a record of that step, but no checkpoint."""
    assert run(within=lambda: breaking(_end)).codes == [1]
    full = mock.patch(f"{FILES}.open", side_effect=OSError(28, "No space left on device"), create=True)
    assert run("--resume", within=lambda: full).codes == [env.CANNOT_WRITE]  # type: ignore[arg-type,return-value]
    assert max(record.get("step", 0) for record in read_records(tmp_path / "run" / "metrics.jsonl")) >= 2
    ended = run("--resume")
    assert ended.codes == [0], ended
    assert ended.errors[0].endswith("the earlier attempt ended before its first checkpoint; starting again from step 0")
    _delete(tmp_path / "run" / "checkpoints")
    one_line(run("--resume"), env.CHECKPOINT, "put it back (is its disk mounted?), or choose another --run-dir")


def test_a_missing_folder_of_checkpoints_is_no_early_end(tmp_path: Path, run: Run) -> None:
    """The metrics tell of no checkpoint, but the run made the folder before it wrote any."""
    assert run(within=lambda: breaking(_end)).codes == [1]
    (tmp_path / "run" / "checkpoints").rmdir()
    one_line(run("--requeue"), env.CHECKPOINT, "checkpoints: is missing, although the run had begun; put it back")


@pytest.mark.parametrize("lost", [True, False])
def test_metrics_that_somebody_else_wrote_end_no_run(tmp_path: Path, run: Run, lost: bool) -> None:
    """Records that lack fields, or are nested deeply: with checkpoints, the run goes on, else it says what it lacks."""
    assert run("--checkpoint.every", "0").codes == [0]
    metrics = tmp_path / "run" / "metrics.jsonl"
    nested = '{"kind": "x", "a": ' + "[" * 600 + "]" * 600 + "}"
    lines = ['{"kind": "baseline"}', '{"kind": "baseline", "bigram": [1]}', '{"kind": "checkpoint"}', nested]
    metrics.write_text("\n".join(lines) + "\n" + metrics.read_text())
    if lost:
        _empty(tmp_path / "run" / "checkpoints")
        one_line(run("--resume"), env.CHECKPOINT, "although the run has saved one in step 4")
        return
    ended = run("--resume", "--steps", "5")
    assert ended.codes == [0] and "bigram nan" in ended.out[0], ended
    assert [json.loads(line) for line in metrics.read_text().splitlines()[:4]] == [json.loads(line) for line in lines]


def test_a_run_that_was_killed_before_its_report_gets_one_when_it_is_started_again(tmp_path: Path, run: Run) -> None:
    assert run().codes == [0]
    page = tmp_path / "run" / "report.html"
    for change in (page.unlink, lambda: os.utime(page, (1, 1))):  # none, or one of before the last steps
        change()
        assert run("--resume", "--dry-run").codes == [0] and not (page.exists() and page.stat().st_mtime > 1)
        ended = run("--resume")
        assert ended.codes == [0] and f"report:     {page}" in ended.out[0] and page.stat().st_mtime > 1


def test_a_job_that_starts_at_the_same_time_overwrites_nothing(tmp_path: Path, run: Run) -> None:
    """The other one makes the folder while this one prepares, and has ended when this one takes it."""
    real, folder = train.introduce, tmp_path / "run"

    @contextmanager
    def together() -> Iterator[None]:
        def introduce(*args: Any) -> None:
            real(*args)
            (tmp_path / "theirs").rename(folder)

        with mock.patch.object(train, "introduce", introduce):
            yield

    assert run().codes == [0]
    before = (folder / "metrics.jsonl").read_bytes()
    folder.rename(tmp_path / "theirs")
    one_line(run(within=together), env.CHECKPOINT, f"run_dir={str(folder)!r}: already holds a run; add --resume")
    assert (folder / "metrics.jsonl").read_bytes() == before and (folder / "exit_code").read_text() == "0\n"


# ---- a folder that cannot be used


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 300, "cannot be used (File name too long)"),
        (f"{'x' * 300}/run", "cannot be used (File name too long)"),
        ("/dev/null/x", "/dev/null is not a folder"),
        ("small.yaml", "small.yaml is not a folder"),
        ("small.yaml/a/b", "small.yaml is not a folder"),
        ("dangling", "dangling is a link to nothing"),
        ("circle/run", "cannot be used (Too many levels of symbolic links)"),
        (os.fsdecode(b"r\xfcn"), "is not UTF-8; choose another"),
    ],
)
def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path, run: Run, name: str, words: str) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    there = sorted(tmp_path.iterdir())
    for options in ([], ["--dry-run"], ["--resume"]):
        one_line(run("--run-dir", name, *options), env.CANNOT_WRITE, "run_dir=", words, "choose another --run-dir")
    assert sorted(tmp_path.iterdir()) == there
    one_line(run("--run-dir", name, world=2), env.CANNOT_WRITE, words)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "lock", "exit_code", "config.yaml"])
def test_a_file_of_the_folder_that_is_none_is_refused(
    tmp_path: Path, run: Run, name: str, make: Callable[[Path], None]
) -> None:
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / name)
    for options in ([], ["--dry-run"]):
        one_line(run(*options), env.CANNOT_WRITE, f"/run/{name}: is not a regular file; delete it, or choose another")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@pytest.mark.parametrize("name", ["report.html", "tensorboard", "metrics.previous.jsonl"])
def test_other_entries_of_the_folder_do_not_end_a_run(
    tmp_path: Path, run: Run, name: str, make: Callable[[Path], None]
) -> None:
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / name)
    ended = run("--log.trackers", "tensorboard")
    assert ended.codes == [0], ended


def test_metrics_are_not_written_to_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    for step in (None, 3):
        with pytest.raises(ValueError, match=r"metrics\.jsonl: is not a regular file; delete it"):
            MetricsWriter(tmp_path, resume_step=step)


# ---- a folder that disappears


@pytest.mark.parametrize(
    ("instead", "world"), [("nothing", 1), ("another", 2), ("another while saving", 2), ("lock deleted", 1)]
)
def test_a_folder_that_disappears_ends_the_run_at_the_next_save(
    tmp_path: Path, run: Run, instead: str, world: int
) -> None:
    """Nothing is written to, or deleted from, a folder that takes its place."""
    folder = tmp_path / "run"

    def move(trainer: Trainer) -> None:
        if os.environ["RANK"] != "0":
            return
        assert trainer.saver._flight is not None
        if instead != "another while saving":
            trainer.saver._flight[0].exception(20)
        if instead == "lock deleted":  # then another job may hold the folder
            (folder / "lock").unlink()
            return
        folder.rename(tmp_path / "moved")
        if instead.startswith("another"):
            (folder / "checkpoints" / "step-00000004.tmp").mkdir(parents=True)
            (folder / "metrics.jsonl").write_text("theirs\n")

    @contextmanager
    def moving() -> Iterator[None]:
        def opened(*args: Any, **kwargs: Any) -> Any:
            if instead == "another while saving":
                time.sleep(0.5)
            return open(*args, **kwargs)

        with mock.patch(f"{FILES}.open", opened, create=True), breaking(move, step=2):
            yield

    ended = run(world=world, within=moving)
    assert ended.codes == [env.CANNOT_WRITE] * world, ended
    errors = [line for line in ended.errors if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in "".join(ended.errors), ended
    assert f"run_dir={str(folder)!r}: was moved, deleted or replaced while the run used it; put it back" in errors[0]
    if instead == "nothing":
        assert not folder.exists()
    if instead.startswith("another"):
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "metrics.jsonl"]
        assert (folder / "metrics.jsonl").read_text() == "theirs\n"
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000004.tmp"]
        shutil.rmtree(folder)
    if instead != "lock deleted":
        (tmp_path / "moved").rename(folder)
    saved = [path.name for path in checkpoint.complete(folder / "checkpoints")]
    assert saved == ([] if instead == "another while saving" else ["step-00000002"])
    assert run("--resume", world=world).codes == [0] * world


def test_metrics_stay_out_of_a_folder_that_took_the_place(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    record: dict[str, Any] = {"kind": "checkpoint", "step": 1}
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        writer.write(record)
    assert not list((tmp_path / "run").iterdir())
