"""Checks that reading a malicious checkpoint executes, writes and deletes nothing.

Sizes and digests in the manifest always fit, because whoever writes the files can compute them.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from equimoe.moe import checkpoint
from equimoe.moe.checkpoint import CheckpointError
from tests.helpers.checkpoints import forge, load_all, nothing_happens, save_old

SHARD = "rank00000-000.safetensors"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_text("data")
    state = {"model.w": torch.arange(15.0).view(5, 3), "model.b": torch.ones(4, dtype=torch.bfloat16)}
    return checkpoint.save(tmp_path / "run", 1, state, {}, keep_last=1)


def refused(path: Path, *words: str) -> None:
    with nothing_happens(path.parent.parent), pytest.raises(CheckpointError) as caught:
        load_all(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700, message
    assert all(word in message for word in words), message


def w(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors["model.w"].update(fields)


def chunks(*boxes: tuple[list[Any], list[Any]], file: Any = SHARD) -> Callable[[dict[str, Any]], object]:
    return w(chunks=[[file, offsets, sizes] for offsets, sizes in boxes])


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (w(shape=[2**62, 2**62], chunks=[[SHARD, [0, 0], [2**62, 2**62]]]), ["is not F32 of"]),
        (w(shape=[2**70, 3]), ["is not a valid shape"]),
        (w(shape=[10**4000, 3]), ["is not a valid shape"]),
        (w(shape=[-5, 3]), ["is not a valid shape"]),
        (w(shape=[5.0, 3]), ["is not a valid shape"]),
        (w(shape=[True, 3]), ["is not a valid shape"]),
        (w(shape=["5", 3]), ["is not a valid shape"]),
        (w(shape=[1] * 100_000), ["is not a valid shape"]),
        (w(shape=5), ["TypeError"]),
        (w(shape=[]), ["numbers of dimensions"]),
        (chunks(([0, 0], [5])), ["numbers of dimensions"]),
        (chunks(([-1, 0], [6, 3])), ["is not a box"]),
        (chunks(([0, 0], [-5, -3])), ["is not a box"]),
        (chunks(([0, 0.0], [5, 3])), ["is not a box"]),
        (w(shape=[1e999, 3]), ["Infinity is not JSON"]),
        (chunks(), ["overlap, leave holes"]),
        (chunks(([0, 0], [4, 3])), ["overlap, leave holes"]),
        (chunks(([1, 0], [5, 3])), ["overlap, leave holes"]),
        (chunks(([0, 0], [5, 3]), ([0, 0], [5, 3])), ["overlap, leave holes"]),
        (chunks(([0, 0], [5, 2]), ([0, 1], [5, 2])), ["overlap, leave holes"]),
        (chunks(([0, 0], [2, 2]), ([0, 2], [2, 1]), ([2, 0], [3, 2]), ([2, 0], [3, 2])), ["overlap, leave holes"]),
        (chunks(([0, 0], [0, 3])), ["overlap, leave holes"]),
        (chunks(([0, 0], [3, 3]), ([3, 0], [2, 3])), ["in this file or in tensors.json, not in both"]),
        (chunks(([0, 0], [5, 3]), file="../victim/precious"), ["not in the manifest"]),
        (chunks(([0, 0], [5, 3]), file="/etc/passwd"), ["not in the manifest"]),
        (chunks(([0, 0], [5, 3]), file="tensors.json"), ["not in the manifest"]),
        (chunks(([0, 0], [5, 3]), file=["a"]), ["which is not text"]),
        (w(dtype="float64"), ["is not F64 of [5, 3]"]),
        (w(dtype="load"), ["dtype='load'"]),
        (w(dtype={"a": 1}), ["unhashable"]),
        (w(chunks=None), ["TypeError"]),
        (w(chunks=[[SHARD]]), ["not enough values"]),
        (lambda tensors: tensors.pop("model.w"), ["'model.w' is in this file or in tensors.json, not in both"]),
        (lambda tensors: tensors.update(more=tensors["model.w"]), ["'more' is in this file or in tensors.json"]),
        (lambda tensors: tensors.update({"line\nbreak" * 99: None}), ["TypeError"]),
    ],
)
def test_description_of_tensors(path: Path, edit: Callable[[dict[str, Any]], object], words: list[str]) -> None:
    file = path / "tensors.json"
    tensors = json.loads(file.read_text())
    edit(tensors)
    file.write_text(json.dumps(tensors))
    forge(path)
    refused(path, "refused: ", *words)


@pytest.mark.parametrize(
    "text",
    [
        '{"model.w": 1, "model.w": 2}',
        '{"model.w": NaN}',
        '{"model.w": {"dtype": "float32", "shape": [1e999], "chunks": []}}',
        "[" * 200_000,
        '{"a":' * 200_000,
        "[]",
        "null",
        "",
        "\udcff",
        "9" * 10_000,
    ],
    ids=range(10),
)
def test_description_that_is_no_object(path: Path, text: str) -> None:
    (path / "tensors.json").write_bytes(text.encode(errors="surrogateescape"))
    forge(path)
    refused(path, "tensors.json: refused: ")


def test_description_that_is_too_large(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equimoe.moe.checkpoint.reader.MAX_TENSORS_BYTES", 100)
    refused(path, "tensors.json: refused: larger than 100 bytes")
    with pytest.raises(checkpoint.SaveError, match="tensors.json: .* bytes are too many to load"):
        checkpoint.save(path.parent, 2, {"model.w": torch.ones(2), "model.b": torch.ones(2)}, {}, keep_last=1)
    assert checkpoint.complete(path.parent) == [path]


def test_names_do_not_break_the_line_of_an_error(tmp_path: Path) -> None:
    state = {"model.w": torch.ones(2), "model.\n\x1b[2J" + "x" * 9999: torch.ones(2)}
    path = checkpoint.save(tmp_path, 1, state, {}, 1)
    with pytest.raises(CheckpointError, match=r"model\.\?\?\[2Jx+: this run wants None, .* that saved it$") as caught:
        checkpoint.load(path, {"model.w": torch.ones(2)}, checkpoint.read_manifest(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("kind", ["new", "old"])
def test_description_that_the_manifest_does_not_list(tmp_path: Path, kind: str) -> None:
    """Reading an unchecked file could follow a link, or wait for a pipe forever."""
    state = {"model.w": torch.ones(5, 3)}
    path = checkpoint.save(tmp_path, 1, state, {}, 1) if kind == "new" else save_old(tmp_path, state)
    file = path / ("tensors.json" if kind == "new" else ".metadata")
    file.unlink()
    os.mkfifo(file)
    forge(path, without=file.name)
    refused(path, f"{file}: missing from the manifest")


def header(edit: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Change the JSON header of a safetensors file."""

    def change(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        fields = json.loads(content[8 : 8 + length])
        edit(fields)
        text = json.dumps(fields).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return change


def offsets(name: str, *values: Any) -> Callable[[bytes], bytes]:
    return header(lambda fields: fields[name].update(data_offsets=list(values)))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: struct.pack("<Q", 2**63) + content[8:],
        lambda content: struct.pack("<Q", 2**64 - 1) + content[8:],
        lambda content: struct.pack("<Q", len(content)) + content[8:],
        lambda content: struct.pack("<Q", 90 << 20) + content[8:],
        lambda content: content[:-1],
        lambda content: content + b"more",
        lambda content: b"",
        lambda content: b"PK\x03\x04" + content,
        lambda content: content[:8] + b"[" * (len(content) - 8),
        offsets("model.w", 0, 2**62),
        offsets("model.w", -60, 0),
        offsets("model.w", 60, 0),
        offsets("model.b", 0, 8),
        header(lambda fields: fields["model.w"].update(dtype="F64")),
        header(lambda fields: fields["model.w"].update(dtype="OBJECT")),
        header(lambda fields: fields["model.w"].update(shape=[3, 5])),
        header(lambda fields: fields["model.w"].update(shape=[2**40, 2**40])),
        header(lambda fields: fields.update({"model.x": fields.pop("model.w")})),
        header(lambda fields: fields.update({"__metadata__": {"a": ["b"]}})),
    ],
    ids=range(19),
)
def test_file_of_tensors(path: Path, change: Callable[[bytes], bytes]) -> None:
    file = path / SHARD
    file.write_bytes(change(file.read_bytes()))
    forge(path)
    refused(path, SHARD, "refused: ")


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/hostname",
        f"{SHARD}/../../x",
        "evil.so",
        "",
        ".",
        f"{SHARD}\n",
        "\0",
        "rank٠٠٠٠٠-000.safetensors",
    ],
)
def test_files_outside_the_folder(path: Path, name: str) -> None:
    forge(path, files={name: {"bytes": 1, "sha256": "0"}})
    refused(path, "not a plain file of a checkpoint")


@pytest.mark.parametrize("size", [-1, 1e9, "100", None, 10**3000])
def test_sizes_in_the_manifest(path: Path, size: Any) -> None:
    files = json.loads((path / checkpoint.MANIFEST).read_text())["files"]
    forge(path, files=files | {SHARD: {"bytes": size, "sha256": "0"}})
    refused(path, "instead of")


@pytest.mark.parametrize("name", [SHARD, "tensors.json", checkpoint.MANIFEST])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_plain_file(path: Path, name: str, kind: str) -> None:
    """Reading a pipe would wait forever."""
    file = path / name
    if kind == "link":
        file.rename(path.parent.parent / "elsewhere")
        file.symlink_to(path.parent.parent / "elsewhere")
    else:
        file.unlink()
        os.mkfifo(file) if kind == "pipe" else file.mkdir()
    refused(path, "not a readable manifest" if name == checkpoint.MANIFEST else "not a plain file")


@pytest.mark.parametrize("kind", ["new", "old"])
def test_random_damage_is_refused_or_harmless(tmp_path: Path, kind: str) -> None:
    """Wherever the parser fails, the error must be one line."""
    state = {"model.w": torch.arange(15.0).view(5, 3), "step": torch.tensor(3)}
    path = checkpoint.save(tmp_path, 1, state, {}, 1) if kind == "new" else save_old(tmp_path, state)
    original = {file: file.read_bytes() for file in sorted(path.iterdir())}
    refusals = 0
    for seed in range(80):
        rng = random.Random(seed)
        file, content = rng.choice(list(original.items()))
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 2, 20))):
            at, length = rng.randrange(len(damaged)), rng.randrange(5)
            damaged[at : at + length] = rng.randbytes(rng.randrange(5))
        file.write_bytes(damaged)
        if file.name != checkpoint.MANIFEST:
            forge(path)
        with nothing_happens(path):
            try:
                load_all(path)
            except CheckpointError as error:
                refusals += 1
                assert "\n" not in str(error)
        for each, whole in original.items():
            each.write_bytes(whole)
    assert refusals > 60


def test_a_link_in_the_run_folder_is_never_followed_to_delete(path: Path) -> None:
    """Saving removes old and unfinished checkpoints; for a link, it must remove only the link."""
    root, victim = path.parent, path.parent.parent / "victim"
    for name in ("step-00000000", "step-00000002.tmp", "step-00000003.tmp", "step-00000002"):
        (root / name).symlink_to(victim)
    checkpoint.save(root, 2, {"model.w": torch.ones(2)}, {}, keep_last=1)
    assert [entry.name for entry in root.iterdir()] == ["step-00000002"] and not (root / "step-00000002").is_symlink()
    assert (victim / "precious").read_text() == "data"


def test_the_watch_notices(tmp_path: Path) -> None:
    """The tests above must be able to fail."""
    import pickle

    for act in (
        lambda: pickle.loads(pickle.dumps(Path("x"))),
        lambda: os.system("true"),
        lambda: (tmp_path / "new").write_text("x"),
        lambda: (tmp_path / "new").unlink(),
    ):
        with pytest.raises(AssertionError), nothing_happens(tmp_path):
            act()
