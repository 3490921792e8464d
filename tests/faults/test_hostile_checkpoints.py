"""Checks that hostile checkpoints are refused in one line, in little time and memory, and that nothing is executed."""

from __future__ import annotations

import json
import os
import pickle
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from equimoe.moe import checkpoint
from equimoe.moe.checkpoint import CheckpointError
from equimoe.moe.checkpoint.manifest import seal
from tests.faults.table import report
from tests.helpers.checkpoints import forge, load_all, nothing_happens, save_old

SHARD = "rank00000-000.safetensors"


def save(root: Path, step: int, keep: int = 9) -> Path:
    return checkpoint.save(root, step, {"model.w": torch.full((5, 3), float(step))}, {}, keep)


def _pairs(path: Path) -> None:
    """List the files as pairs, of which a dict could be made."""
    file = path / checkpoint.MANIFEST
    fields = json.loads(file.read_text())
    file.write_bytes(seal(json.dumps(fields | {"files": list(fields["files"].items())}, indent=1).encode()))
    (path / SHARD).write_bytes(b"")


def _manifest_is(content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / checkpoint.MANIFEST).write_bytes(content)


def _replaced_by(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        (path / checkpoint.MANIFEST).unlink()
        make(path / checkpoint.MANIFEST)

    return change


HOSTILE: dict[str, Callable[[Path], object]] = {
    "/dev/zero": _replaced_by(lambda file: file.symlink_to("/dev/zero")),
    "pipe": _replaced_by(os.mkfifo),
    "folder": _replaced_by(Path.mkdir),
    "missing": _replaced_by(lambda file: None),
    "a million arrays": _manifest_is(b"[" * 1_000_000),
    "a million objects": _manifest_is(b'{"a":' * 1_000_000),
    "a million arrays in it": _manifest_is(b'{"schema": 3, "position": ' + b"[" * 1_000_000),
    "huge": lambda path: os.truncate(path / checkpoint.MANIFEST, 1 << 40),
    "huge number": _manifest_is(b'{"schema": 3, "step": ' + b"9" * 1_000_000 + b"}"),
    "pairs": _pairs,
    "not text": _manifest_is(b"\xff\xfe\x00"),
    "empty": _manifest_is(b""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_manifests(tmp_path: Path, kind: str) -> None:
    """One line in little time and memory, and the run goes on from the checkpoint before."""
    save(tmp_path, 1)
    HOSTILE[kind](save(tmp_path, 2))
    since, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with nothing_happens(tmp_path):
        choice = checkpoint.choose(tmp_path)
    assert choice is not None and choice.path.name == "step-00000001"
    assert "step-00000002" in checkpoint.describe(choice) and "\n" not in checkpoint.describe(choice)
    assert time.monotonic() - since < 5
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert grown < 200
    save(tmp_path, 3, keep=2)
    assert [path.name for path in checkpoint.complete(tmp_path)][-2:] == ["step-00000002", "step-00000003"]
    report("14", "hostile manifests are passed over with one line")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, (f"open({str(self.sentinel)!r}, 'w').close()",)


def _pickled_shard(path: Path, sentinel: Path) -> None:
    (path / SHARD).write_bytes(pickle.dumps(Bomb(sentinel)))
    forge(path)


def _pickled_description(path: Path, sentinel: Path) -> None:
    (path / "tensors.json").write_bytes(pickle.dumps(Bomb(sentinel)))
    forge(path)


def _pickled_metadata(path: Path, sentinel: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    old = save_old(path.parent, {"model.w": torch.ones(5, 3)})
    (old / ".metadata").write_bytes(pickle.dumps(Bomb(sentinel)))
    forge(old)


def _outside(name: str) -> Callable[[Path, Path], None]:
    def change(path: Path, sentinel: Path) -> None:
        (path.parent.parent / "outside").write_bytes((path / SHARD).read_bytes())
        files = json.loads((path / checkpoint.MANIFEST).read_text())["files"]
        forge(path, files=files | {name.format(path.parent.parent): files[SHARD]})

    return change


def _linked_shard(path: Path, sentinel: Path) -> None:
    (path / SHARD).rename(path.parent / "elsewhere")
    (path / SHARD).symlink_to("../elsewhere")


#: name -> what is changed, and words of the refusal
MALICIOUS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "pickle as a shard": (_pickled_shard, "is damaged or incomplete"),
    "pickle as the description": (_pickled_description, "tensors.json: refused: "),
    ".metadata with __reduce__": (_pickled_metadata, "the pickle names builtins.exec"),
    "path with ..": (_outside("../../outside"), "not a plain file of a checkpoint"),
    "absolute path": (_outside("{}/outside"), "not a plain file of a checkpoint"),
    "shard that is a link": (_linked_shard, "not a plain file of a checkpoint"),
}


@pytest.mark.parametrize("kind", MALICIOUS)
def test_malicious_checkpoints_execute_nothing(tmp_path: Path, kind: str) -> None:
    sentinel, path = tmp_path / "sentinel", save(tmp_path / "run", 1)
    change, words = MALICIOUS[kind]
    change(path, sentinel)
    with nothing_happens(tmp_path), pytest.raises(CheckpointError, match=words) as caught:
        load_all(path)
    assert "\n" not in str(caught.value) and not sentinel.exists()
    report("15", "pickles executed: 0")


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "sentinel")))
    assert (tmp_path / "sentinel").exists()
