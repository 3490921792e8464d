"""Checks that a save that fails or is interrupted loses no older checkpoint, and ends all ranks alike with one line."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from equimoe.launch import env
from equimoe.moe import checkpoint
from equimoe.moe.checkpoint import SaveError
from equimoe.moe.train.config import CheckpointConfig
from equimoe.moe.train.trainer import Trainer
from tests.faults.conftest import Run, command
from tests.faults.table import report
from tests.helpers.checkpoints import load_all, small_state
from tests.helpers.command import one_line
from tests.helpers.fork import run_ranks

FILES = "equimoe.moe.checkpoint.files"


class Disk:
    """A disk with room for some bytes. Patches what the library opens for writing."""

    def __init__(self, room: int) -> None:
        self.room, self.written = room, 0

    def open(self, file: Path, mode: str, buffering: int = -1) -> io.FileIO:
        disk = self

        class Full(io.FileIO):
            def write(self, block: Any) -> int:
                if disk.written == disk.room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
                part = bytes(block[: disk.room - disk.written])
                disk.written += len(part)
                return super().write(part) or 0  # may be less than was asked for, as on a real disk

        return Full(file, "xb")

    @contextmanager
    def mounted(self) -> Iterator[None]:
        with mock.patch(f"{FILES}.open", self.open, create=True):
            yield


@contextmanager
def free(count: int | None) -> Iterator[None]:
    """Let file systems report ``count`` free bytes; None: they report nothing, as some network file systems do."""
    real = os.statvfs

    def statvfs(path: Any) -> os.statvfs_result:
        found = list(real(path))
        found[2:5] = [0, 0, 0] if count is None else [found[2], count // found[1], count // found[1]]
        return os.statvfs_result(found)

    with mock.patch("os.statvfs", statvfs):
        yield


def cut_points(folder: Path, count: int) -> list[int]:
    size = sum(file.stat().st_size for file in checkpoint.save(folder, 1, small_state(), {}, 1).iterdir())
    return [size * i // count for i in range(count)]


def test_a_full_disk_loses_no_checkpoint(tmp_path: Path) -> None:
    cuts = cut_points(tmp_path / "sizes", 20)
    for room in cuts:
        root = tmp_path / str(room)
        checkpoint.save(root, 1, small_state(1.0), {}, keep_last=1)
        with Disk(room).mounted(), pytest.raises(SaveError) as caught:
            checkpoint.save(root, 2, small_state(2.0), {}, keep_last=1)
        line = str(caught.value)
        why = "No space left on device; it needs 2400 bytes, "
        assert line.startswith(f"{root}/step-00000002: cannot be written: {why}") and "\n" not in line
        assert re.search(r", \d+ are free; make room there or choose another --run-dir", line)
        assert [path.name for path in root.iterdir()] == ["step-00000001"]
        assert torch.equal(load_all(root / "step-00000001")["model.w3"], small_state(1.0)["model.w3"])
    report("10", "checkpoints lost: 0", cut_points=len(cuts))


@pytest.mark.parametrize("rank_of_fault", [0, 1])
def test_a_full_disk_on_one_rank_ends_all_ranks_alike(tmp_path: Path, rank_of_fault: int) -> None:
    def script(rank: int, world: int) -> str:
        room = 700 if rank == rank_of_fault else 10**9
        with Disk(room).mounted(), pytest.raises(SaveError) as caught:
            checkpoint.save(tmp_path, 1, small_state(), {}, keep_last=1)
        assert f"rank {rank_of_fault}: No space left on device; it needs 2400 bytes" in str(caught.value)
        dist.barrier()
        return ",".join(path.name for path in tmp_path.iterdir())

    assert run_ranks(script, 2) == ["", ""]


@pytest.mark.parametrize(("count", "fits"), [(2400, False), (1000, False), (4096, True), (None, True)])
def test_free_space_is_checked_before_anything_is_written(tmp_path: Path, count: int | None, fits: bool) -> None:
    """2400 bytes need 1.2 times as many."""
    opened = mock.patch(f"{FILES}.open", side_effect=AssertionError("opened a file"), create=True)
    with free(count), opened, pytest.raises(SaveError) as caught:
        checkpoint.save(tmp_path / "run", 1, small_state(), {}, keep_last=1)
    assert ("opened a file" in str(caught.value)) == fits
    if not fits:
        assert "less than 1.2 times its size is free; it needs 2400 bytes, " in str(caught.value)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """Even in a row that is never used: it would push the good checkpoints out."""
    checkpoint.save(tmp_path, 1, small_state(), {}, keep_last=1)
    bad = {"model.w": torch.ones(2, 3), "model.unused": torch.ones(9, 2)}
    bad["model.unused"][7, 1] = value
    bad["model.unused"] = bad["model.unused"].to(dtype)
    with pytest.raises(checkpoint.NonFiniteStateError, match="not saved: model.unused: is not finite; resume from an"):
        checkpoint.save(tmp_path, 2, bad, {}, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_rank_0_must_see_the_files_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two node-local folders of the same name: the folder of rank 0 lacks the files of rank 1."""
    monkeypatch.setattr("equimoe.moe.checkpoint.store._VISIBLE_S", 0.2)

    def script(rank: int, world: int) -> str:
        local = tmp_path / str(rank)
        (local / "step-00000001.tmp").mkdir(parents=True)
        with pytest.raises(SaveError) as caught:
            checkpoint.save(local, 1, small_state(), {}, keep_last=1)
        return str(caught.value)

    lines = run_ranks(script, 2)
    assert re.search(r"rank 0: of rank00001-000.safetensors, \d+ bytes were written, but rank 0 sees 0; all", lines[0])
    assert not (tmp_path / "0" / "step-00000001").exists()


# ---- the command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs five steps on two ranks, with a save in every step."""
    return partial(command(tmp_path, monkeypatch, steps=5, checkpoint=CheckpointConfig(1, keep_last=2)), world=2)


@pytest.mark.faults
@pytest.mark.parametrize("room", [200, 30_000])
def test_a_run_on_a_full_disk_ends_with_73_and_resumes(tmp_path: Path, run: Run, room: int) -> None:
    """Either the first save fails, or a later one."""

    @contextmanager
    def full() -> Iterator[None]:
        per_save = Disk(room)
        with per_save.mounted():
            yield

    one_line(
        run(within=full),
        env.CANNOT_WRITE,
        "cannot be written: rank ",
        "No space left on device; it needs ",
        " are free;",
    )
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
    for path in checkpoint.complete(tmp_path / "run" / "checkpoints"):
        load_all(path)
    ended = run("--resume", within=lambda: free(None))
    assert ended.codes == [0, 0], ended


def test_a_weight_that_is_not_finite_ends_the_run_with_70(tmp_path: Path, run: Run) -> None:
    """The weight takes no part in the step, so that no gradient tells."""

    @contextmanager
    def poisoned() -> Iterator[None]:
        real = Trainer.state

        def state(trainer: Trainer) -> dict[str, torch.Tensor]:
            found = real(trainer)
            if trainer.step == 3 and trainer.axis.rank == 1:
                found = found | {"model.unused": torch.full((3,), float("nan"))}
            return found

        with mock.patch.object(Trainer, "state", state):
            yield

    ended = run(within=poisoned)
    one_line(ended, env.NON_FINITE, "step-00000003: not saved: rank 1: model.unused: is not finite; resume from an ")
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("how", ["file", "read-only"])
def test_a_folder_that_cannot_be_written_ends_the_run_before_training(tmp_path: Path, run: Run, how: str) -> None:
    (tmp_path / "run").mkdir()
    if how == "file":
        (tmp_path / "run" / "checkpoints").write_text("a file")
    else:
        (tmp_path / "run" / "checkpoints").symlink_to("/proc/self")  # nobody can make a file there, not even root
    one_line(
        run(within=lambda: free(None)), env.CANNOT_WRITE, "run_dir=", "cannot be written: ", "choose another --run-dir"
    )
    report("11", "one line and exit code 73 before training")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_two_folders_of_the_same_name_end_the_run_before_training(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks start in different folders and are given a relative path, as with node-local disks."""
    monkeypatch.setattr("equimoe.moe.checkpoint.agreement._VISIBLE_S", 0.2)

    @contextmanager
    def on_own_disk() -> Iterator[None]:
        folder = tmp_path / f"node{os.environ['RANK']}"
        folder.mkdir()
        os.chdir(folder)
        # on two machines, the path would be the same
        with mock.patch("equimoe.launch.train.os.path.abspath", lambda path: str(path)):
            yield

    ended = run("--run-dir", "run", within=on_own_disk)
    one_line(ended, env.CANNOT_WRITE, "run_dir='run': is another folder than rank 0 on ", "for rank 1 on ", "share")
    assert not list(tmp_path.rglob("metrics.jsonl")) and not list(tmp_path.rglob("probe-*"))
    report("53", "two folders of the same name: one line and exit code 73 before training")


@pytest.mark.parametrize("broken", ["disk", "weight"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.faults
def test_another_error_while_a_save_fails_is_the_one_that_is_reported(
    tmp_path: Path, run: Run, broken: str, world: int
) -> None:
    """The save of step 2 fails in the background, and the loss of step 3 is NaN."""

    @contextmanager
    def both() -> Iterator[None]:
        full, real = Disk(0), Trainer.train_step

        def opened(file: Any, mode: str, *rest: Any, **kwargs: Any) -> Any:
            if broken == "disk" and "step-00000002.tmp" in str(file):
                return full.open(file, mode)
            return open(file, mode, *rest, **kwargs)

        def step(trainer: Trainer, observed: bool = True) -> torch.Tensor:
            norm = real(trainer, observed)
            if trainer.step == 2:
                with torch.no_grad():
                    trainer.model.head.weight.fill_(float("nan"))
            return norm

        planted = mock.patch.object(Trainer, "train_step", step)
        unseen = mock.patch.object(checkpoint.Saver, "check", lambda saver: None)  # the step fails first
        with mock.patch(f"{FILES}.open", opened, create=True), planted, unseen:
            yield

    for options in ((), ("--health.nonfinite", "skip", "--resume")):
        one_line(run(*options, world=world, within=both), env.NON_FINITE, "after step 2: ", "is not finite")
        assert (tmp_path / "run" / "exit_code").read_text() == f"{env.NON_FINITE}\n"
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.faults
def test_odd_paths(tmp_path: Path, run: Run) -> None:
    """Spaces, other scripts, a line break; a path that is relative; files for the owner only."""

    @contextmanager
    def odd() -> Iterator[None]:
        os.umask(0o077)
        yield

    for name in (" a b\u00e9 \u6587", "line\nbreak"):
        ended = run("--run-dir", name, within=odd)
        assert ended.codes == [0, 0], ended
        (path, _) = sorted((tmp_path / name / "checkpoints").iterdir(), reverse=True)
        assert load_all(path) and path.stat().st_mode & 0o777 == 0o700
        report("46", "odd paths and umask 077: works")


def test_metrics_that_cannot_be_written_do_not_end_the_run(tmp_path: Path, run: Run) -> None:
    @contextmanager
    def unwritable() -> Iterator[None]:
        def opened(*args: Any, **kwargs: Any) -> Any:
            raise OSError(28, "No space left on device")

        real = Trainer.train_step

        def step(trainer: Trainer, observed: bool = True) -> torch.Tensor:
            if trainer.step == 2:
                mock.patch("equimoe.moe.observe.metrics.open", opened, create=True).start()
            return real(trainer, observed)

        with mock.patch.object(Trainer, "train_step", step), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            yield
        for warning in seen:
            print(warning.message, file=sys.stderr)

    ended = run(within=unwritable)
    assert ended.codes == [0, 0], ended
    warned = [line for line in ended.errors if "metrics.jsonl cannot be written" in line]
    assert len(warned) == 1 and "training continues without metrics" in warned[0]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "step-00000005"
    report("49", "training goes on with one warning", steps=5)
