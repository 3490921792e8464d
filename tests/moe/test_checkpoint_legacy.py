"""Checks that checkpoints of equimoe 0.1 can be read, and that no opcode of their pickles is executed.

``checkpoints/`` holds two, of 2 steps on 2 ranks with expert parallelism and with FSDP, and the sha256 of each tensor.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

from equimoe.moe import MoEConfig, checkpoint
from equimoe.moe.checkpoint import CheckpointError
from equimoe.moe.checkpoint.tensors import DTYPES
from equimoe.moe.parallel import build_mesh
from equimoe.moe.train.config import ModelConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small
from tests.helpers.checkpoints import forge, load_all, nothing_happens, save_old
from tests.helpers.fork import run_ranks

DCP = "torch.distributed.checkpoint.metadata"


@pytest.fixture(params=["ep2", "fsdp2"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, dict[str, str]]:
    shutil.unpack_archive(Path(__file__).parent / "checkpoints" / f"{request.param}.zip", tmp_path)
    return request.param, tmp_path / "step-00000002", json.loads((tmp_path / "expected.json").read_text())


def digests(state: dict[str, torch.Tensor]) -> dict[str, str]:
    whole = {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in state.items()}
    as_bytes = {name: value.contiguous().view(-1).view(torch.uint8) for name, value in whole.items()}
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in as_bytes.items()}


def test_every_tensor_bit_for_bit(written: tuple[str, Path, dict[str, str]]) -> None:
    _, path, expected = written
    load_all(path)  # imports what DCP imports late
    with nothing_happens(path.parent):
        found = load_all(path)
    assert digests(found) == expected


def test_resume(written: tuple[str, Path, dict[str, str]]) -> None:
    """Resume the expert-parallel checkpoint on the same mesh, and the FSDP checkpoint of 2 ranks on 1 process."""
    name, path, expected = written
    model = ModelConfig(vocab_size=258, num_layers=1, num_heads=1, intermediate_size=4)
    layer = MoEConfig(4, 4, num_experts=4, top_k=2)
    config = small.on(small.write_texts(path.parent / "texts"), ep=2 if name == "ep2" else 1, model=model, moe=layer)
    corpus = load_corpus(config.data, load_tokenizer("bytes"))
    manifest = checkpoint.read_manifest(path)
    manifest["position"]["data"] = corpus.fingerprint  # the data do not matter here

    def script(rank: int, world: int) -> tuple[int, dict[str, str]]:
        mesh = build_mesh(config.parallel) if world > 1 else None
        trainer = Trainer(config, corpus, mesh, torch.device("cpu"))
        trainer.resume(path, manifest)
        found = trainer.step, digests(trainer.state())
        trainer.train_step()
        return found

    found = run_ranks(script, 2) if name == "ep2" else [script(0, 1)]
    for step, state in found:
        assert step == 2
        assert state == {n: d for n, d in expected.items() if n[:9] != "generator"}


def test_all_dtypes_and_layouts(tmp_path: Path) -> None:
    state = {
        str(dtype): (torch.arange(-3, 9).view(3, 4) % 2).to(dtype)
        for dtype in DTYPES
        if dtype.itemsize > 1 or not dtype.is_floating_point
    }
    state |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "transposed": torch.arange(6.0).view(2, 3).t()}
    state |= {"step": torch.tensor(7), "part": torch.arange(10.0)[3:7]}
    found = load_all(save_old(tmp_path, state))
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name].double(), value.double()), name


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


#: "planted": True as a slot, which BUILD would set with setattr
PLANT = b"N}" + text("planted") + b"\x88s\x86b"
POP = b"0"


@pytest.mark.parametrize(
    ("opcodes", "words"),
    [
        (name(DCP, "StorageMeta") + PLANT + POP, "found a Name instead of a Record"),
        (name("torch.serialization", "_get_layout") + PLANT + POP, "found a Name instead of a Record"),
        (name(DCP, "StorageMeta") + b")\x81" + PLANT + PLANT, "the state of a record twice"),
        (b")" + PLANT, "found a tuple instead of a Record"),
        (b"cos\nsystem\n" + text("touch planted") + b"\x85R", "names os.system"),
        (name("posix", "system") + text("touch planted") + b"\x85R", "names posix.system"),
        (name("builtins", "eval") + text("1") + b"\x85R", "names builtins.eval"),
        (name("torch", "load") + text("x") + b"\x85R", "names torch.load"),
        (name("shutil", "rmtree") + text("victim") + b"\x85R", "names shutil.rmtree"),
        (name("torch.distributed.checkpoint.filesystem", "FileSystem") + b")\x81", "names torch.distributed"),
        (name(DCP, "Metadata.__init__.__globals__"), "names torch.distributed.checkpoint.metadata.Metadata.__init__"),
        (text("posix") + b"N\x93", "found a NoneType instead of a str"),
        (b"(" + text("x") + b"ios\nsystem\n", "opcode INST"),
        (b"(" + name(DCP, "Metadata") + b"o", "opcode OBJ"),
        (name(DCP, "Metadata") + b")}\x92", "opcode NEWOBJ_EX"),
        (b"\x82\x01", "opcode EXT1"),
        (b"\x83\x01\x00", "opcode EXT2"),
        (b"\x84\x01\x00\x00\x00", "opcode EXT4"),
        (b"Pwhatever\n", "opcode PERSID"),
        (b")Q", "names .storage"),
        (b"N0", "opcode POP"),
        (b"N2", "opcode DUP"),
        (b"(1", "opcode POP_MARK"),
        (b"p0\n", "opcode PUT"),
        (b"\x8f", "opcode EMPTY_SET"),
        (b"\x8b\x01\x00\x00\x00\x01", "opcode LONG4"),
        (b"\x97", "opcode NEXT_BUFFER"),
        (b"\x96" + b"\xff" * 8, "count"),
        (b"\x8e" + b"\xff" * 8, "count"),
        (b"\x8d" + b"\xff" * 8, "count"),
        (b"I" + b"9" * 9999 + b"\n", ""),
        (b"R", "stack is empty"),
        (b"t", "has no mark"),
        (b"(R", "stack is empty"),
        (b"b", "stack is empty"),
        (b"h\xfe", "KeyError"),
        (b"}NNs", "a key that"),
        (b"}(" + text("a") + b"N" + text("a") + b"Nu", "a key that"),
        (b"}(Nu", "zip()"),
        (b"}]Ns", "a key that"),
        (b"N", "more than one value"),
        (b")" + b"\x85" * 100_000, "more than one value"),
        (b"]\x94h\x00a", "found a list instead of a str"),
        (b"\xff", "opcode"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_opcodes_in_the_metadata(tmp_path: Path, opcodes: bytes, words: str) -> None:
    """Put opcodes in front of valid metadata."""
    path = save_old(tmp_path, {"model.w": torch.ones(5, 3)})
    file = path / ".metadata"
    good = file.read_bytes()
    file.write_bytes(good[:2] + opcodes + good[2:])
    forge(path)
    refused(path, ".metadata: refused: ", words)
    assert not hasattr(StorageMeta, "planted") and not hasattr(torch.serialization._get_layout, "planted")


def refused(path: Path, *words: str) -> None:
    state = {"model.w": torch.zeros(5, 3)}
    with nothing_happens(path.parent), pytest.raises(CheckpointError) as caught:
        checkpoint.load(path, state, checkpoint.read_manifest(path))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and all(word in message for word in words), message


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04", b"N.", b"\x80\x04}.", b"PK\x03\x04", b"{}", b"\x80\x04\x95" + b"\xff" * 8]
)
def test_metadata_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = save_old(tmp_path, {"model.w": torch.ones(5, 3)})
    (path / ".metadata").write_bytes(content)
    forge(path)
    refused(path, ".metadata: refused: ")


def edited(path: Path, edit: Callable[[Metadata, Any, Any], object]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (info,) = metadata.storage_data.values()
    edit(metadata, metadata.state_dict_metadata["model.w"], info)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(path)


def doubled(depth: int) -> tuple[Any, ...]:
    """Return a short pickle whose value takes 2^depth steps to hash or print."""
    value: tuple[Any, ...] = ()
    for _ in range(depth):
        value = (value, value)
    return value


def put(where: Any, **fields: Any) -> None:
    where.__dict__.update(fields)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda all, w, info: put(info, relative_path="../victim"), "outside the files of the checkpoint"),
        (lambda all, w, info: put(info, relative_path="/etc/passwd"), "outside the files of the checkpoint"),
        (lambda all, w, info: put(info, relative_path=".metadata"), "outside the files of the checkpoint"),
        (lambda all, w, info: put(info, relative_path=("a",)), "found a tuple instead of a str"),
        (lambda all, w, info: put(info, relative_path=doubled(60)), "found a tuple instead of a str"),
        (lambda all, w, info: put(info, offset=doubled(60)), "found a tuple instead of a int"),
        (lambda all, w, info: put(w, size=doubled(60)), ""),
        (lambda all, w, info: put(w.chunks[0], offsets=doubled(60)), ""),
        (lambda all, w, info: put(info, offset=-1), "is not a size"),
        (lambda all, w, info: put(info, offset=True), "found a bool instead of a int"),
        (lambda all, w, info: put(info, offset=1.0), "found a float instead"),
        (lambda all, w, info: put(info, length=2**62), "outside the files of the checkpoint"),
        (lambda all, w, info: put(info, length=2**90), "is not a size"),
        (lambda all, w, info: put(info, length=10), "not a zip file"),
        (lambda all, w, info: put(info, transform_descriptors=["zstd"]), "in a way that our checkpoints do not use"),
        (lambda all, w, info: put(w, size=torch.Size([2**62, 3])), "overlap, leave holes"),
        (lambda all, w, info: put(w, chunks=[]), "overlap, leave holes"),
        (lambda all, w, info: put(w.chunks[0], sizes=torch.Size([4, 3])), "overlap, leave holes"),
        (lambda all, w, info: put(w.chunks[0], offsets=torch.Size([1, 0])), "KeyError"),
        (lambda all, w, info: put(w.chunks[0], offsets=[0, 0]), "found a list instead of a Record"),
        (lambda all, w, info: put(w.properties, dtype=torch.complex64), "names torch.complex64"),
        (lambda all, w, info: put(w.properties, dtype=torch.strided), ""),
        (lambda all, w, info: all.state_dict_metadata.update(x=BytesStorageMetadata()), "BytesStorageMetadata"),
        (lambda all, w, info: put(all, storage_data=None), "found a NoneType instead of a dict"),
        (lambda all, w, info: all.state_dict_metadata.update({"model.v": w}), "KeyError"),
    ],
)
def test_metadata_that_is_wrong(tmp_path: Path, edit: Callable[[Metadata, Any, Any], object], words: str) -> None:
    path = save_old(tmp_path, {"model.w": torch.ones(5, 3)})
    edited(path, edit)
    refused(path, "refused: ", words)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("planted"),)


def archive(pickled: bytes, data: bytes = bytes(60), compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as into:
        for entry, content in {"data.pkl": pickled, "data/0": data, **more}.items():
            into.writestr(f"archive/{entry}", content)
    return stream.getvalue()


def tensor(
    count: int = 15, offset: int = 0, sizes: tuple[int, ...] = (5, 3), strides: tuple[int, ...] = (3, 1)
) -> bytes:
    """Return the pickle of a tensor, as torch.save writes it."""

    class Storage(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if value is Storage else None

    from collections import OrderedDict

    arguments = (Storage, offset, sizes, strides, False, OrderedDict())
    stream = io.BytesIO()
    Storage(stream, protocol=2).dump(Rebuilt(arguments))
    return stream.getvalue()


class Rebuilt:
    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


def test_the_archive_made_here_is_right(tmp_path: Path) -> None:
    path = with_archive(tmp_path, archive(tensor(), torch.arange(15.0).numpy().tobytes()))
    assert torch.equal(load_all(path)["model.w"], torch.arange(15.0).view(5, 3))


def with_archive(tmp_path: Path, content: bytes) -> Path:
    path = save_old(tmp_path, {"model.w": torch.ones(5, 3)})
    (path / "__0_0.distcp").write_bytes(content)
    edited(path, lambda all, w, info: put(info, offset=0, length=len(content)))
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps(Evil()), "not a zip file"),
        (archive(pickle.dumps(Evil(), 2)), "the pickle names "),
        (archive(b"cos\nsystem\n" + text("touch planted") + b"\x85R."), "names os.system"),
        (archive(b"ctorch._utils\n_rebuild_tensor_v2\n" + PLANT + b"."), "found a Name instead of a Record"),
        (archive(b"N."), "found a NoneType instead of a Record"),
        (archive(tensor() + bytes(5000)), "description is too large"),
        (archive(tensor(count=2**40)), "does not have the shape [5, 3]"),
        (archive(tensor(count=14)), "does not have the shape [5, 3]"),
        (archive(tensor(sizes=(3, 5))), "does not have the shape [5, 3]"),
        (archive(tensor(strides=(1,))), "does not have the shape [5, 3]"),
        (archive(tensor(offset=1)), "larger than its storage"),
        (archive(tensor(offset=-1)), "is not a size"),
        (archive(tensor(strides=(4, 1))), "larger than its storage"),
        (archive(tensor(strides=(-3, 1))), "is not a size"),
        (archive(tensor(), bytes(56)), "does not have the shape [5, 3]"),
        (archive(tensor(), compression=zipfile.ZIP_DEFLATED), "not one that torch writes"),
        (archive(tensor(), byteorder=b"big"), "not little-endian"),
        (archive(tensor()).replace(b"data/0", b"data/1"), "KeyError"),
        (archive(tensor(), **{"data/1": bytes(60)}).replace(b"data/1", b"data/0"), "have the same name"),
        (archive(tensor())[:-30], "not a zip file"),
    ],
)
def test_tensors_that_are_wrong(tmp_path: Path, content: bytes, words: str) -> None:
    refused(with_archive(tmp_path, content), "refused: ", words)
    assert not (tmp_path / "planted").exists() and not Path("planted").exists()
