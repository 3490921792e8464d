"""Checks the readers of data files: the same documents give the same tokens in every format, and odd files one line."""

from __future__ import annotations

import gzip
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from equimoe.moe.train.config import DataConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer, read_documents
from equimoe.moe.train.data.formats import READERS
from equimoe.moe.train.data.megatron_files import HEADER, MAGIC, TYPES

pyarrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
datasets = pytest.importorskip("datasets")

BYTES = load_tokenizer("bytes")
#: characters of one to four bytes, line ends, and text that looks like something else
TEXTS = [
    f"document {i}: caf\u00e9 \u4e2d\u6587 \U0001f600\r\n\ttab {{}} \\n <|endoftext|> " + "word " * i for i in range(40)
]


def load(path: Path, **changes):
    settings = DataConfig(path=str(path), seq_len=4, heldout_fraction=0.1, domain_by="kind")
    return load_corpus(replace(settings, **changes), BYTES)


def as_text(folder: Path, texts=TEXTS) -> Path:
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_bytes(text.encode())
    return folder


def lines(texts=TEXTS) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def raw(name: str, content: bytes):
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def table():
    return pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})


def as_parquet(folder: Path) -> Path:
    from pyarrow import parquet

    parquet.write_table(table(), folder / "x.parquet", row_group_size=7)
    return folder / "x.parquet"


def as_arrow(new):
    def write(folder: Path) -> Path:
        path = folder / "x.arrow"
        with new(str(path), table().schema) as writer:
            writer.write_table(table(), max_chunksize=9)
        return path

    return write


def as_saved(folder: Path) -> Path:
    datasets.Dataset.from_dict({"id": list(range(len(TEXTS))), "text": TEXTS}).save_to_disk(folder / "saved")
    return folder / "saved"


def as_splits(folder: Path) -> Path:
    train = datasets.Dataset.from_dict({"text": TEXTS})
    test = datasets.Dataset.from_dict({"text": ["never trained on"]})
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder / "splits")
    return folder / "splits"


#: format -> writes the texts into a folder, and returns the path to read
FORMATS = {
    "text": as_text,
    "jsonl": raw("x.jsonl", lines()),
    "jsonl with a byte order mark": raw("x.jsonl", b"\xef\xbb\xbf" + lines()),
    "jsonl with empty lines": raw("x.ndjson", b"\n" + lines().replace(b"\n", b"\n\n").rstrip()),
    "jsonl.gz": raw("x.jsonl.gz", gzip.compress(lines())),
    "jsonl.gz in parts": raw("x.jsonl.gz", gzip.compress(lines(TEXTS[:9])) + gzip.compress(lines(TEXTS[9:]))),
    "jsonl.zst": raw("x.jsonl.zst", zstandard.compress(lines())),
    "jsonl.zst in parts": raw("X.JSONL.ZST", b"".join(map(zstandard.compress, (lines(TEXTS[:9]), lines(TEXTS[9:]))))),
    "json list": raw("x.json", json.dumps([{"text": text} for text in TEXTS]).encode()),
    "json with lines": raw("x.json", lines()),
    "parquet": as_parquet,
    "arrow file": as_arrow(pyarrow.ipc.new_file),
    "arrow stream": as_arrow(pyarrow.ipc.new_stream),
    "saved dataset": as_saved,
    "splits of a saved dataset": as_splits,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_tokens_of_plain_text(tmp_path, name):
    (tmp_path / "plain").mkdir()
    (tmp_path / "other").mkdir()
    wanted, found = load(as_text(tmp_path / "plain")), load(FORMATS[name](tmp_path / "other"))
    (domain,), (other,) = wanted.domains, found.domains
    assert np.array_equal(wanted.train[domain], found.train[other])
    assert np.array_equal(wanted.heldout[domain], found.heldout[other])


def test_every_reader_is_tested():
    """By the suffix of a file of a format above, or as ids below."""
    names = " ".join([*FORMATS, "x.ndjson x.json x.parquet x.arrow .feather x.bin .tokens .npy x.jsonl"])
    assert all(suffix in names for suffix in READERS)


def test_a_folder_of_all_formats_is_read_once(tmp_path):
    """The same text in every format: all but the first are copies."""
    for i, write in enumerate(FORMATS.values()):
        (tmp_path / "all" / str(i)).mkdir(parents=True)
        write(tmp_path / "all" / str(i))
    found = load(tmp_path / "all", domain_by="kind")
    tokens = sum(len(text.encode()) for text in TEXTS)
    ids = np.concatenate([np.asarray(s) for streams in (found.train, found.heldout) for s in streams.values()])
    assert (ids != 256).sum() == tokens
    # two files of .json are left out inside a folder
    assert f"documents skipped because they are copies of others: {(len(FORMATS) - 3) * len(TEXTS)}" in found.notes
    assert any(
        "left out, JSON, whose records are read only if the file is named itself: 8/x.json, " in n for n in found.notes
    )


# ---- ids


def megatron(folder: Path, documents: list[list[int]], code: int = 8, version: int = 1, name: str = "x") -> Path:
    """Write documents as Megatron-LM's preprocessing does."""
    dtype = np.dtype(TYPES.get(code, "<u2"))
    lengths = np.array([len(document) for document in documents], "<i4")
    starts = np.concatenate([[0], np.cumsum(lengths[:-1])]).astype("<i8") * dtype.itemsize
    np.concatenate([np.array(document, dtype) for document in documents]).tofile(folder / f"{name}.bin")
    header = HEADER.pack(MAGIC, version, code, len(documents), len(documents) + 1)
    edges = np.arange(len(documents) + 1, dtype="<i8")
    (folder / f"{name}.idx").write_bytes(header + lengths.tobytes() + starts.tobytes() + edges.tobytes())
    return folder / f"{name}.bin"


@pytest.mark.parametrize("code", [4, 5, 8])
def test_megatron_files_have_the_documents_and_the_type_of_their_index(tmp_path, code):
    ids = [list(text.encode()) for text in TEXTS]
    path = megatron(tmp_path, [[*document, 256] for document in ids], code)
    for place in (path, tmp_path):
        (found,) = read_documents(DataConfig(path=str(place)), BYTES).values()
        assert sorted(np.asarray(document).tolist() for document in found) == sorted(ids)
    assert not load(tmp_path).notes
    (tmp_path / "x.idx").unlink()
    if code == 8:
        assert len(load(path).train["tokens"]) > 100
    else:
        with pytest.raises(ValueError, match=rf"every second id is 0 as uint16, .*set data\.token_dtype={'u?int'}"):
            load(path)


def test_megatron_documents_of_several_sequences(tmp_path):
    path = megatron(tmp_path, [[1, 2], [3], [4, 5, 6], [7]])
    header = HEADER.pack(MAGIC, 1, 8, 4, 3)
    body = (tmp_path / "x.idx").read_bytes()[HEADER.size : HEADER.size + 48]
    (tmp_path / "x.idx").write_bytes(header + body + np.array([0, 3, 4], "<i8").tobytes())
    (found,) = read_documents(DataConfig(path=str(path)), BYTES).values()
    assert sorted(np.asarray(document).tolist() for document in found) == [[1, 2, 3, 4, 5, 6], [7]]


def damaged(change):
    def write(folder: Path) -> Path:
        path = megatron(folder, [[1, 2, 3], [4, 5], [6] * 90])
        raw = bytearray((folder / "x.idx").read_bytes())
        (folder / "x.idx").write_bytes(bytes(change(raw)))
        return path

    return write


def put(at: int, layout: str, value: int):
    def change(raw: bytearray) -> bytearray:
        struct.pack_into(layout, raw, at, value)
        return raw

    return damaged(change)


LENGTHS, STARTS, EDGES = HEADER.size, HEADER.size + 12, HEADER.size + 36


def in_file(name: str, make):
    def write(folder: Path) -> Path:
        make(folder / name)
        return folder / name

    return write


def truncated_parquet(folder: Path) -> Path:
    path = as_parquet(folder)
    path.write_bytes(path.read_bytes()[:-30])
    return path


def damaged_dataset(folder: Path) -> Path:
    path = as_saved(folder)
    next(path.glob("*.arrow")).write_bytes(b"nothing")
    return path


ODD = {
    "truncated gz": (raw("x.jsonl.gz", gzip.compress(lines())[:-200]), "x.jsonl.gz': cannot be decompressed ("),
    "gz that is none": (raw("x.jsonl.gz", lines()), "x.jsonl.gz': cannot be decompressed (Not a gzipped file"),
    "damaged gz": (raw("x.jsonl.gz", gzip.compress(lines())[:60] + b"\0" * 900), "x.jsonl.gz': cannot be "),
    "zst that is none": (raw("x.jsonl.zst", lines()), "x.jsonl.zst': cannot be decompressed ("),
    "damaged zst": (raw("x.jsonl.zst", zstandard.compress(lines())[:90] + b"\xff" * 90), "x.jsonl.zst': cannot be "),
    "text in parquet": (raw("x.parquet", lines()), "x.parquet': cannot be read as Parquet ("),
    "empty parquet": (raw("x.parquet", b""), "x.parquet': cannot be read as Parquet ("),
    "truncated parquet": (truncated_parquet, "x.parquet': cannot be read as Parquet ("),
    "a folder called x.parquet": (in_file("x.parquet", Path.mkdir), "x.parquet': has no files"),
    "text in arrow": (raw("x.arrow", lines()), "x.arrow': cannot be read as Arrow ("),
    "truncated arrow": (
        lambda folder: raw("x.arrow", as_arrow(pyarrow.ipc.new_stream)(folder).read_bytes()[:1500])(folder),
        "x.arrow': cannot be read as Arrow",
    ),
    "damaged dataset": (damaged_dataset, "saved': cannot be read as a dataset ("),
    "nested": (raw("x.jsonl", lines(TEXTS[:2]) + b"[" * 1_000_000), "x.jsonl' line 3: is not JSON (nested too deeply)"),
    "nested list": (raw("x.json", b"[" * 1_000_000), "x.json': is not a JSON list of objects (nested too deeply)"),
    "empty": (raw("x.jsonl", b""), "no text found"),
    "empty gz": (raw("x.jsonl.gz", gzip.compress(b"")), "no text found"),
    "no such column": (
        lambda folder: (
            pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), folder / "x.parquet"),
            folder / "x.parquet",
        )[1],
        "data.text_field='text': is missing in '",
    ),
    "wide ids": (in_file("x.bin", np.arange(99, dtype="<u4").tofile), "ids are wider; set data.token_dtype=uint32"),
    "wider ids": (in_file("x.bin", np.arange(99, dtype="<i8").tofile), "set data.token_dtype=int64"),
    "truncated zst": (raw("x.jsonl.zst", zstandard.compress(lines())[:-9]), "(it ends within a frame); it is damaged"),
    "index of text": (damaged(lambda raw: b"text" * 99), "x.idx': is not an index of Megatron"),
    "short index": (damaged(lambda raw: raw[:9]), "x.idx': is not an index of Megatron"),
    "index of floats": (put(17, "<B", 7), "x.idx': has version 1 and type 7 of ids, which are unknown"),
    "index of another version": (put(9, "<Q", 2), "x.idx': has version 2 and type 8 of ids, which are unknown"),
    "index with many sequences": (put(18, "<Q", 1 << 60), "x.idx': has "),
    "truncated index": (damaged(lambda raw: raw[:-8]), "x.idx': has "),
    "start outside": (put(STARTS, "<q", 1 << 40), "x.idx': document 1 or one after it lies outside '"),
    "negative start": (put(STARTS, "<q", -2), "x.idx': document 1 or one after it lies outside '"),
    "odd start": (put(STARTS, "<q", 1), "x.idx': document 1 or one after it lies outside '"),
    "long sequence": (put(LENGTHS, "<i", 1 << 30), "x.idx': document 1 or one after it lies outside '"),
    "negative length": (put(LENGTHS, "<i", -1), "x.idx': document 1 or one after it lies outside '"),
    "document outside": (put(EDGES + 8, "<q", 99), "x.idx': document 1 or one after it has sequences outside 0..3"),
    "not UTF-8": (raw("x.jsonl", b'{"text": "caf\xe9"}'), "line 1: byte 0xe9 at 13 of the line is not UTF-8; convert"),
    "null": (raw("x.jsonl", b'{"text": null}'), "is null, not a text, in"),
    "binary column": (
        in_file("x.parquet", lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": [b"a"]}), path)),
        "is of type bytes, not a text, in",
    ),
    "no answer": (raw("x.jsonl", b'{"prompt": "a"}'), "'prompt'; for instruction data, rename fields to 'prompt' and"),
    "other names": (raw("x.jsonl", b'{"question": "a", "answer": "b"}'), "rename fields to 'prompt' and 'completion'"),
    "empty answer": (raw("x.jsonl", b'{"prompt": "a", "response": null}'), "prompt is a text, and response is null"),
    "messages that are none": (raw("x.jsonl", b'{"messages": "hello"}'), "line 1: messages is a text; write a list"),
    "a pipe": (in_file("x.jsonl", os.mkfifo), "x.jsonl': is neither a file nor a folder"),
    "an index": (raw("x.idx", b"MMIDIDX"), "x.idx': is an index of Megatron; give a file"),
    "an index of a file": (
        lambda folder: megatron(folder, [[1, 2]]).with_suffix(".idx"),
        "x.idx': is an index of Megatron; give '",
    ),
    "Megatron's name without its suffix": (
        lambda folder: megatron(folder, [[1]]).with_suffix(""),
        "does not exist or is not accessible; give '",
    ),
    "a store without its manifest": (
        lambda folder: (raw("0.ids", b"\0\0")(folder), raw("manifest.json", b"[]")(folder))[0].parent,
        "is a store of tokens whose manifest.json is damaged; tokenise again",
    ),
    "unknown id": (lambda folder: megatron(folder, [[1, 2], [3, 900]]), "x.bin:2': id 900 at position 1 is outside"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_files_give_one_line_that_names_them(tmp_path, name):
    write, words = ODD[name]
    with pytest.raises(ValueError, match=r"^data\.") as refused:
        load(write(tmp_path))
    message = str(refused.value)
    assert words in message and "\n" not in message and len(message) < 700, message


def test_a_cache_that_is_a_file_is_one_line_also_for_short_text(tmp_path):
    with pytest.raises(ValueError, match=r"^data\.cache='.*x': is a file; give a folder, which may be new$"):
        load(raw("x", b"text " * 50)(tmp_path), cache=str(tmp_path / "x"))


def test_the_index_of_a_file_that_is_not_there_is_left_out_by_name(tmp_path):
    raw("x.idx", b"MMIDIDX")(tmp_path)
    as_text(tmp_path)
    assert "left out, checksums and locks: x.idx" in load(tmp_path).notes


@pytest.mark.parametrize(
    ("name", "package"),
    [("parquet", "pyarrow"), ("arrow file", "pyarrow"), ("saved dataset", "datasets"), ("jsonl.zst", "zstandard")],
)
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, name, package):
    path = FORMATS[name](tmp_path)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(
        ValueError, match=rf"^data\.path='.*': needs the package {package}; run 'pip install equimoe\[data\]'$"
    ):
        load(path)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_flat_files_of_every_type(tmp_path, dtype):
    ids = np.random.default_rng(0).integers(0, 256, 500).astype(dtype)
    ids.tofile(tmp_path / "x.bin")
    np.save(tmp_path / "x.npy", ids)
    for path in (tmp_path / "x.bin", tmp_path / "x.npy"):
        settings = {"token_dtype": dtype} if path.suffix == ".bin" else {}
        found = load(path, **settings)
        assert np.array_equal(np.asarray(found.train["tokens"]), ids[:450])


END = "check data.tokenizer and data.end_of_document"


@pytest.mark.parametrize(
    ("documents", "note"),
    [
        ([[1, 2, 3] * 90], f"no end-of-document id (256) in x.bin: read as one document; {END}"),
        ([[1, 2, 256, 3] * 90], None),
        (
            [[i, i + 1, 7] for i in range(90)],
            f"every document ends with id 7, not with the tokenizer's 256, in x.bin; {END}",
        ),
        ([[i, i + 1, 256] for i in range(90)], None),
        ([[i, i + 1, i] for i in range(90)], None),
    ],
    ids=["none", "one", "another", "its own", "of Megatron's index"],
)  # fmt: skip
@pytest.mark.parametrize("stored", [False, True])
def test_token_files_without_the_end_of_a_document_are_named(tmp_path, monkeypatch, documents, note, stored):
    """Whether attention stays within documents, and what is held out, depends on it."""
    path = megatron(tmp_path, documents)
    expected = () if note is None else (note,)
    if stored:
        monkeypatch.setattr("equimoe.moe.train.data.sources.SHORT", -1)
    for _ in range(2):
        assert load(path, cache=str(tmp_path / "cache") if stored else None).notes == expected
    (tmp_path / "x.idx").unlink()
    for flat in (path, path.with_suffix(".npy")):
        np.save(path.with_suffix(".npy"), np.fromfile(path, "<u2"))
        without = 256 not in sum(documents, [])
        name = f"no end-of-document id (256) in {flat.name}: read as one document; {END}"
        assert load(flat).notes == ((name,) if without else ())


# ---- what is no data


def test_what_is_no_data_is_left_out_and_named(tmp_path):
    as_text(tmp_path)
    wanted = load(tmp_path, domain_by="auto")
    plain = sorted(BYTES.decode(np.asarray(d)) for d in read_documents(DataConfig(path=str(tmp_path)), BYTES)["text"])
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "vocab.json", "special_tokens_map.json"):
        (tmp_path / name).write_text('{"text": "not to be trained on"}')
    for name in ("train.log", "slurm.out", "slurm.err", "a.log.1", "meta.json", "stats.JSON", "SHA256SUMS", "_SUCCESS"):
        (tmp_path / name).write_text("not to be trained on")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.log").write_text("not to be trained on")
    found = load(tmp_path, domain_by="auto")
    assert found.fingerprint == wanted.fingerprint
    assert sorted(found.notes) == [
        "left out, JSON, whose records are read only if the file is named itself: meta.json, stats.JSON",
        "left out, checksums and locks: SHA256SUMS, _SUCCESS",
        "left out, logs: a.log.1, slurm.err, slurm.out and 2 more",
        "left out, of a tokenizer: merges.txt, special_tokens_map.json, tokenizer.json and 2 more",
    ]
    again = sorted(BYTES.decode(np.asarray(d)) for d in read_documents(DataConfig(path=str(tmp_path)), BYTES)["text"])
    assert again == plain


def test_runs_inside_a_data_folder_are_left_out(tmp_path):
    as_text(tmp_path)
    wanted = load(tmp_path).fingerprint
    begun, run = tmp_path / "runs" / "begun", tmp_path / "runs" / "one"
    for folder in (begun, run):
        (folder / "tokens").mkdir(parents=True)
        (folder / "lock").write_text("{}")
    (run / "config.yaml").write_text("steps: 3")
    (run / "metrics.jsonl").write_text('{"kind": "run"}\n')
    (run / "samples.txt").write_text("made by the model")
    found = load(tmp_path)
    assert found.fingerprint == wanted and "left out, runs: runs/begun/, runs/one/" in found.notes


@pytest.mark.parametrize("name", ["all", "All", " ALL ", "domain", "   "])
def test_a_domain_cannot_have_the_name_of_a_column_or_of_the_total(tmp_path, name):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "text " * 50, "domain": name}))
    with pytest.raises(ValueError, match=r"^data\.path='x\.jsonl:1': a domain cannot be called '.*rename it"):
        load(tmp_path / "x.jsonl", domain_by="auto")
    (tmp_path / "data" / "all").mkdir(parents=True)
    as_text(tmp_path / "data" / "all")
    with pytest.raises(ValueError, match=r"^data\.path='all/.*txt': a domain cannot be called 'all'"):
        load(tmp_path / "data", domain_by="auto")


def test_files_that_are_not_text_are_named(tmp_path):
    as_text(tmp_path)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "nul.txt").write_bytes(b"text\0text")
    (tmp_path / "wide.txt").write_bytes("text".encode("utf-16"))
    (note,) = load(tmp_path).notes
    assert note.startswith("files left out because they are not UTF-8 text: 3 of 43: ")
    for words in ("latin.txt (byte 0xe9 at 3 is not UTF-8)", "nul.txt (NUL byte at 4)", "wide.txt (NUL byte at 3)"):
        assert words in note


@pytest.mark.parametrize("name", ["with space", "\u00fcml\u00e4ut \u4e2d", 'it\'s "quoted"', "a:b#c%20"])
def test_odd_names_of_folders_work(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / name).mkdir()
    as_text(tmp_path / name)
    wanted = load(tmp_path / name).fingerprint
    assert load(Path("~", name)).fingerprint == wanted
    settings = DataConfig(path=f"~/{name}", seq_len=4, heldout_fraction=0.1, domain_by="kind", cache=f"~/{name} cache")
    monkeypatch.setattr("equimoe.moe.train.data.sources.SHORT", -1)
    stored = load_corpus(settings, BYTES)
    assert stored.fingerprint == wanted and stored.folder.parent == tmp_path / f"{name} cache"


@pytest.mark.parametrize("fraction", [0.01, 0.1])
@pytest.mark.parametrize(
    "sizes",
    [[60_000], [30_000] * 2, [100, 60_000], [60_000, *[30] * 40], [60_000] * 3 + [900] * 50, [7000] * 9, [200] * 500],
    ids=["one", "two", "short and long", "long and short", "long and many", "few", "many"],
)
def test_the_held_out_share_is_about_the_one_asked_for(tmp_path, sizes, fraction):
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_text(f"{i:06}".ljust(size, "x"))
    found = load(tmp_path, heldout_fraction=fraction)
    held, kept = (len(s["text"]) for s in (found.heldout, found.train))
    assert fraction * 0.99 <= held / (held + kept) <= fraction * 1.55
