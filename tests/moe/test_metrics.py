"""Checks metrics.jsonl and its copies in trackers."""

from __future__ import annotations

import builtins
import errno
import io
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equimoe.moe.observe import metrics
from equimoe.moe.observe.metrics import MetricsWriter, read_records, to_line, write_atomically
from tests.helpers.runs import made_up_run

TRAIN = {"kind": "train", "step": 10, "loss": 4.2034, "grad_norm": 1.1, "lr": 3e-3, "balance": 1.034}
TRAIN |= {"max_over_mean": 1.42, "tokens": 40960, "tokens_per_s": 5120.0}


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path) if "step" in record]


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    records = made_up_run(steps=20, every=5, eval_every=10)
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        for number, record in enumerate(records, 1):
            writer.write(record)
            assert len(read_records(writer.path)) == number  # each line is written immediately
    assert read_records(writer.path) == records


def strict(line: bytes) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null_and_marked() -> None:
    record = {"kind": "train", "step": 1, "loss": math.nan, "domain_loss": {"a": math.inf, "b": 1.0}, "x": [-math.inf]}
    assert strict(to_line(record)) == {
        "kind": "train", "step": 1, "loss": None, "domain_loss": {"a": None, "b": 1.0}, "x": [None], "nonfinite": True,
    }  # fmt: skip
    assert "nonfinite" not in strict(to_line({"kind": "train", "loss": 1.0}))
    assert record["loss"] is not None, "the caller's record is left alone"


def test_tensors_arrays_and_paths_are_written() -> None:
    record = {
        "kind": "run",
        "a": torch.tensor([1, 2]),
        "b": np.float32(0.5),
        "c": torch.tensor(math.nan),
        "d": Path("x"),
    }
    found = strict(to_line(record))
    assert found == {"kind": "run", "a": [1, 2], "b": 0.5, "c": None, "d": "x", "nonfinite": True}


def test_resume_cuts_off_what_the_interrupted_run_wrote_later(tmp_path: Path) -> None:
    records = made_up_run(steps=40, every=5, eval_every=20)
    with MetricsWriter(tmp_path) as writer:
        for record in records:
            writer.write(record)
    with open(writer.path, "ab") as file:
        file.write(b'{"kind": "train", "st')  # killed while writing
    with MetricsWriter(tmp_path, resume_step=20) as resumed:
        kept = read_records(resumed.path)
        assert kept == [record for record in records if record.get("step", 0) <= 20]
        assert [record["kind"] for record in kept[:2]] == ["run", "baseline"]
        resumed.write(TRAIN | {"step": 25})
    assert steps_of(resumed.path) == [5, 10, 15, 20, 20, 25]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_cut_that_fails_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsWriter(tmp_path) as writer:
        for record in made_up_run(steps=20, every=5):
            writer.write(record)
    before = writer.path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\); choose another folder"):
        MetricsWriter(tmp_path, resume_step=10)
    assert writer.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    for step in (10, 20):
        with MetricsWriter(tmp_path) as writer:
            writer.write(TRAIN | {"step": step})
    assert steps_of(writer.path) == [20]
    assert steps_of(tmp_path / "metrics.previous.jsonl") == [10]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^run_dir='.*file/run': cannot be written \(Not a directory\); choose"):
        MetricsWriter(tmp_path / "file" / "run")


def test_a_full_disk_gives_one_warning_and_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(TRAIN | {"step": 1})
    real = builtins.open

    class Full(io.FileIO):
        def write(self, data: Any) -> int:  # half of the line reaches the disk
            super().write(bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(builtins, "open", lambda path, mode: Full(path, mode))
    with pytest.warns(RuntimeWarning, match="No space left on device.*training continues") as caught:
        writer.write(TRAIN | {"step": 2})
        writer.write(TRAIN | {"step": 3})
    assert len(caught) == 1
    monkeypatch.setattr(builtins, "open", real)
    assert not writer.path.read_bytes().endswith(b"\n"), "the test must leave a torn line"
    assert steps_of(writer.path) == [1]
    writer.write(TRAIN | {"step": 4})  # there is space again
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps_of(writer.path) == [1, 4]


def test_a_folder_that_vanishes_gives_one_warning(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run")
    writer.path.unlink()
    writer.path.parent.rmdir()
    with pytest.warns(RuntimeWarning, match="No such file or directory") as caught:
        writer.write(TRAIN)
        writer.write(TRAIN)
    assert len(caught) == 1


def test_lines_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(to_line(TRAIN) + b'{"kind": "tra')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_records(path) == [TRAIN]
    path.write_bytes(b'\xff\x00\n[1]\n\n{}\n{"kind": 3}\n' + to_line(TRAIN))
    with pytest.warns(RuntimeWarning, match="skipped unreadable lines: 4"):
        assert read_records(path) == [TRAIN]


def test_write_atomically_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_file_documents_itself() -> None:
    for kind in ("run", "baseline", "train", "eval"):
        assert f"``{kind}``" in (metrics.__doc__ or "")
