"""Checks which text is read, its domains, and what is held out."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from equimoe.moe.train.config import DataConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.data.token_file import TokenFile

BYTES = load_tokenizer("bytes")
ROOT = Path(__file__).resolve().parents[2]


def config(path, **changes):
    return replace(DataConfig(path=str(path), seq_len=4), **changes)


def load(path, **changes):
    return load_corpus(config(path, **changes), BYTES)


def documents(tokens):
    """Return the set of texts between the end-of-document ids."""
    pieces = np.split(tokens, np.flatnonzero(tokens == 256))
    return {BYTES.decode(piece) for piece in pieces if len(piece)}


def holds(corpus, domain, contents):
    """Return whether training and held-out text of the domain have exactly the tokens of these texts."""
    ids = np.concatenate([corpus.train[domain], corpus.heldout[domain]])
    return sorted(ids[ids != 256]) == sorted("".join(contents).encode())


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def texts(count, prefix="document"):
    return [f"{prefix} {i} " + "word " * (i % 7 + 3) for i in range(count)]


def test_kinds_hidden_binary_and_empty_files(tmp_path):
    files = {
        "a.py": "print('a')", "b.PY": "print('b')", "c.md": "# title", "README": "read me", "d.xyz": "some text",
        "e.png": b"\x89PNG\0\0", "f.dat": b"\xff\xfe latin", ".hidden.py": "secret", ".git/x.py": "secret",
        "bom.txt": b"\xef\xbb\xbfmarked", "empty.txt": "",
    }  # fmt: skip
    corpus = load(write(tmp_path, files))
    assert corpus.domains == ("markdown", "python", "text", "xyz")
    assert list(corpus.train) == list(corpus.heldout) == list(corpus.domains)
    assert holds(corpus, "python", ["print('a')", "print('b')"])
    assert holds(corpus, "text", ["read me", "marked"])
    assert corpus.notes == (
        "files left out because they are not UTF-8 text: 2 of 9: e.png (NUL byte at 4), f.dat (byte 0xff at 0 is not "
        "UTF-8)",
    )


def test_folders_name_domains_and_the_kind_can_be_asked_for(tmp_path):
    write(
        tmp_path, {"law/a.txt": "law " * 9, "law/deep/b.md": "law b " * 9, "code/c.py": "code " * 9, "d.md": "top " * 9}
    )
    assert load(tmp_path).domains == ("code", "law", "markdown")
    assert load(tmp_path, domain_by="folder").domains == tuple(sorted(["code", "law", tmp_path.name]))
    assert load(tmp_path, domain_by="kind").domains == ("markdown", "python", "text")
    assert load(tmp_path / "d.md").domains == ("markdown",)


def test_linked_folders_are_read_and_circles_end(tmp_path):
    write(tmp_path, {"far/a.txt": "far away " * 9, "data/b.txt": "near " * 9})
    (tmp_path / "data" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    assert load(tmp_path / "data").domains == ("link", "text")


def test_jsonl_fields(tmp_path):
    rows = [{"body": f"row {i} " * 5, "lang": "en" if i % 2 else 7} for i in range(8)] + [{"body": "none " * 9}]
    lines = "\n\n".join(map(json.dumps, rows)) + "\n"
    write(tmp_path, {"sub/x.jsonl": lines})
    fields = {"text_field": "body", "domain_field": "lang"}
    corpus = load(tmp_path, **fields)
    assert corpus.domains == ("7", "en", "sub")
    assert holds(corpus, "en", [f"row {i} " * 5 for i in (1, 3, 5, 7)])
    assert load(tmp_path, domain_by="kind", **fields).domains == ("jsonl",)
    assert load(tmp_path / "sub" / "x.jsonl", domain_by="folder", **fields).domains == ("sub",)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_flat_token_files_are_cut_by_position(tmp_path, dtype):
    ids = np.arange(200, dtype=dtype)
    for name in ("x.bin", "y.tokens"):
        ids.astype(f"<{dtype[0]}{np.dtype(dtype).itemsize}").tofile(tmp_path / name)
        corpus = load(tmp_path / name, token_dtype=dtype, heldout_fraction=0.1)
        assert np.array_equal(corpus.train["tokens"], ids[:180]) and np.array_equal(corpus.heldout["tokens"], ids[180:])
        assert isinstance(corpus.train["tokens"], TokenFile)
    np.save(tmp_path / "z.npy", ids.astype(np.int64))
    corpus = load(tmp_path / "z.npy", heldout_fraction=0.1)
    assert np.array_equal(corpus.train["tokens"], ids[:180]) and corpus.train["tokens"].dtype == np.uint16
    # several: each is cut, and the pieces are joined
    corpus = load(tmp_path, token_dtype=dtype, heldout_fraction=0.1)
    assert len(corpus.train["tokens"]) == 3 * 180 + 2 and len(corpus.heldout["tokens"]) == 3 * 20 + 2


def test_one_document_is_cut_by_position(tmp_path):
    corpus = load(write(tmp_path, {"a.txt": "0123456789" * 10}), heldout_fraction=0.05)
    assert BYTES.decode(corpus.heldout["text"]) == "56789"
    assert len(corpus.train["text"]) == 95
    corpus = load(write(tmp_path, {"a.txt": "0123456789"}), heldout_fraction=0.05)
    assert BYTES.decode(corpus.heldout["text"]) == "89"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=2, max_size=40), st.floats(0.001, 0.999))
def test_the_asked_share_is_held_out_and_every_token_is_on_one_side(tmp_path_factory, sizes, fraction):
    total = sum(sizes) + 3 * len(sizes)
    target = max(fraction * total, 2)
    assume(total - 1.5 * target >= 2)  # a sequence of one token and the token after it are left to train on
    root = write(tmp_path_factory.mktemp("d"), {f"{i}.txt": f"{i:03}" + "x" * size for i, size in enumerate(sizes)})
    corpus = load(root, heldout_fraction=fraction, seq_len=1)
    train, heldout = (stream["text"][stream["text"] != 256] for stream in (corpus.train, corpus.heldout))
    assert len(train) + len(heldout) == total
    assert int(target) <= len(heldout) <= 1.5 * target
    assert sorted(np.concatenate([train, heldout])) == sorted(b"".join(path.read_bytes() for path in root.iterdir()))


@pytest.mark.parametrize(("count", "size"), [(1, 50_000), (2, 25_000), (3, 10_000), (10, 5_000), (30, 1_000)])
def test_few_documents_are_cut(tmp_path, count, size):
    """With two documents and 2 % held out, 2 % of each must be held out, not one of the two."""
    words = {f"{i}.txt": f"{i:02}" + "w" * (size - 2 - i) for i in range(count)}
    corpus = load(write(tmp_path, words), heldout_fraction=0.02)
    train, heldout = (stream["text"] for stream in (corpus.train, corpus.heldout))
    assert (heldout != 256).sum() == int(0.02 * sum(map(len, words.values())))
    starts = {text[:2] for text in documents(train)}
    assert starts == {f"{i:02}" for i in range(count)}
    assert documents(heldout) == {"w" * len(text) for text in documents(heldout)}


def test_one_long_document_among_short_ones_is_trained_on(tmp_path):
    texts = {"long.txt": "long " * 9000} | {f"{i}.txt": f"{i} short " * 5 for i in range(9)}
    corpus = load(write(tmp_path, texts), heldout_fraction=0.05)
    held, kept = (len(stream["text"]) for stream in (corpus.heldout, corpus.train))
    assert 0.049 < held / (held + kept) < 0.076


def test_the_held_out_share_is_near_what_was_asked(tmp_path):
    corpus = load(write(tmp_path, {f"{i}.txt": t for i, t in enumerate(texts(400))}), heldout_fraction=0.1)
    share = len(corpus.heldout["text"]) / (len(corpus.heldout["text"]) + len(corpus.train["text"]))
    assert 0.1 <= share < 0.13


def test_split_depends_on_contents_not_on_names_or_order(tmp_path):
    content = texts(60)
    first = load(write(tmp_path / "a", {f"{i}.txt": t for i, t in enumerate(content)}))
    random.Random(0).shuffle(content)
    second = load(write(tmp_path / "b", {f"n{i}.txt": t for i, t in enumerate(content)}))
    rows = [json.dumps({"text": t, "domain": "text"}) for t in content]
    third = load(write(tmp_path / "c", {"x.jsonl": "\n".join(rows)}))
    assert first.fingerprint == second.fingerprint == third.fingerprint
    assert np.array_equal(first.train["text"], third.train["text"])


def test_copies_never_stand_on_both_sides(tmp_path):
    copies = {f"{folder}/{i}.txt": t for folder in ("a", "b") for i, t in enumerate(texts(30))}
    corpus = load(write(tmp_path, {**copies, "b/other.txt": "not in a " * 5}))
    train = set().union(*map(documents, corpus.train.values()))
    heldout = set().union(*map(documents, corpus.heldout.values()))
    assert heldout and not train & heldout
    assert "documents skipped because they are copies of others: 30" in corpus.notes


def test_fingerprint_tells_data_apart(tmp_path):
    files = {f"{i}.txt": t for i, t in enumerate(texts(20))}
    base = load(write(tmp_path, files)).fingerprint
    assert len(base) == 64 and load(tmp_path).fingerprint == base
    assert load(tmp_path, heldout_fraction=0.3).fingerprint != base
    write(tmp_path, {"3.txt": files["3.txt"] + "!"})
    assert load(tmp_path).fingerprint != base


def test_the_cap_of_the_built_in_text_does_not_reach_other_text(tmp_path):
    """Under a cap of 1 kB, ten files of 10 kB must all be trained on."""
    write(tmp_path, {f"a/{i:03}.txt": f"{i:03} " + "word " * 2000 for i in range(10)})
    rows = "\n".join(json.dumps({"text": t, "domain": "b"}) for t in texts(200, "row"))
    write(tmp_path, {"b.jsonl": rows})
    np.arange(1000, dtype=np.uint8).astype(np.uint16).tofile(tmp_path / "t.bin")
    capped, whole = (load(tmp_path, builtin_bytes_per_domain=cap) for cap in (1000, None))
    assert capped.fingerprint == whole.fingerprint
    ids = {d: np.concatenate([whole.train[d], whole.heldout[d]]) for d in whole.domains}
    assert {d: int((i != 256).sum()) for d, i in ids.items()} == {
        "a": 10 * 10_004, "b": sum(map(len, texts(200, "row"))), "tokens": 1000
    }  # fmt: skip


def npy_header(shape: str) -> bytes:
    header = f"{{'descr': '<u8', 'fortran_order': False, 'shape': {shape}}}".ljust(500) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def test_empty_documents_are_passed_over(tmp_path):
    write(tmp_path, {"a.txt": "text " * 20, "b.txt": "", "c.txt": "", "d.bin": b""})
    write(tmp_path, {"e.jsonl": "\n".join(json.dumps({"text": t, "domain": "text"}) for t in ("", "", "row " * 9))})
    corpus = load(tmp_path)
    assert corpus.domains == ("text",) and corpus.notes == ()


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        ({}, {}, r"data\.path='.*': has no files"),
        (
            {"a.png": b"\0\1", "b.txt": ""},
            {},
            r"data\.path='.*': no text found; files left out because they are not UTF-8 text: 1 of 2: a\.png \(",
        ),
        (
            {"a.bin": b"\1\0\2"},
            {},
            r"data\.path='.*a\.bin': its size, 3, is not a multiple of that of uint16.*set data\.token_dtype",
        ),
        (
            {"a.bin": np.array([5, 6, 300, 400], "<u2").tobytes()},
            {},
            r"data\.path='.*a\.bin': id 300 at position 2 is outside the 257 ids of data\.tokenizer='bytes'; give the",
        ),
        (
            {"x.jsonl": '{"text": "good"}\n{"text": \n'},
            {},
            r"data\.path='.*x\.jsonl' line 2: is not JSON \(.*; write one",
        ),
        (
            {"x.jsonl": b'{"text": "\xff"}\n'},
            {},
            r"data\.path='.*x\.jsonl' line 1: byte 0xff at 10 .*; convert the file",
        ),
        ({"x.jsonl": "[1]\n"}, {}, r"data\.path='.*x\.jsonl' line 1: is a list; write one JSON object per line"),
        (
            {"x.jsonl": '\n{"body": "b", "id": 3}\n'},
            {},
            r"data\.text_field='text': is missing in '.*x\.jsonl' line 2; .*one of: 'body', 'id'",
        ),
        ({"x.jsonl": '{"text": [1]}\n'}, {}, r"data\.text_field='text': is a list, not a text, in .* line 1; mend"),
        (
            {"x.jsonl": '{"text": "t", "source": "s"}\n'},
            {"domain_by": "field"},
            r"data\.domain_field='domain': has no text or number in '.*' line 1; .*one of: 'text', 'source'",
        ),
        (
            {"a.txt": "text"},
            {"domain_by": "field"},
            r"data\.domain_by='field': '.*a\.txt' is not a \.jsonl file .*use 'auto'",
        ),
        ({"a.txt": "text"}, {"domain_by": "size"}, r"data\.domain_by='size': use one of auto, folder, kind, field"),
        ({"a.txt": "text"}, {"token_dtype": "int8"}, r"data\.token_dtype='int8': use one of uint16, uint32"),
        (
            {"a.txt": "0123456789"},
            {"seq_len": 8},
            r"data\.path='.*': no domain has the 9 training tokens of one sequence \(the longest has 8\); give more",
        ),
        (
            {"x.jsonl": "[" * 100_000},
            {},
            r"data\.path='.*x\.jsonl' line 1: is not JSON \(nested too deeply\); write one",
        ),
        (
            {"z.npy": npy_header("(" + "9" * 40 + ",)")},
            {},
            r"data\.path='.*z\.npy': is not a plain \.npy array \(.*\); save it with np\.save",
        ),
        (
            {"z.npy": npy_header("(" * 90 + ")" * 90)},
            {},
            r"data\.path='.*z\.npy': is not a plain \.npy array \(.*\); save it with np\.save",
        ),
        (
            {"z.npy": b"not numpy"},
            {},
            r"data\.path='.*z\.npy': is not a plain \.npy array \(.*\); save it with np\.save",
        ),
    ],
)
def test_errors_name_field_value_and_remedy(tmp_path, files, changes, message):
    with pytest.raises(ValueError, match="^" + message) as caught:
        load(write(tmp_path, files), **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1, 2, -3, 4]), r"id -3 at position 2 is negative; write ids of 0 or more"),
        (np.array([1, 2, 3, 1 << 40]), r"id 1099511627776 at position 3 is outside the 257 ids"),
        (np.ones(4), r"holds float64 of shape \(4,\); save a one-dimensional integer array"),
        (np.ones((2, 2), int), r"holds int64 of shape \(2, 2\); save a one-dimensional integer array"),
        (np.array([{}]), r"is not a plain \.npy array \(.*[Oo]bject.*\); save it with np\.save"),
    ],
)
def test_npy_errors(tmp_path, array, message):
    np.save(tmp_path / "z.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=r"^data\.path='.*z\.npy': " + message):
        load(tmp_path)


def test_bad_ids_are_found_behind_the_first_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("equimoe.moe.train.data.sources.CHUNK", 10)
    ids = np.zeros(35, np.uint16)
    ids[[23, 31]] = 257
    ids.tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="id 257 at position 23 "):
        load(tmp_path)


def test_unreadable_paths(tmp_path):
    with pytest.raises(ValueError, match=r"^data\.path='.*nowhere': does not exist or is not accessible; give a file"):
        load(tmp_path / "nowhere")
    write(tmp_path, {"a.txt": "text " * 9})
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(
        ValueError, match=r"^data\.path='.*gone\.txt': cannot be read \(No such file.*; make it readable"
    ):
        load(tmp_path)


def test_domains_too_short_are_reported(tmp_path):
    corpus = load(write(tmp_path, {"a/a.txt": "long " * 40, "b/b.txt": "xyz", "c/c.txt": "x"}))
    assert "too short for one sequence and not trained on: 'b', 'c'" in corpus.notes
    assert any("domain 'c' has too few tokens to hold any out" in note for note in corpus.notes)


BUILTIN = DataConfig(builtin_bytes_per_domain=200_000)


def test_the_cap_bounds_each_domain_of_the_built_in_text():
    corpus = load_corpus(replace(BUILTIN, builtin_bytes_per_domain=30_000), BYTES)
    for domain in corpus.domains:
        ids = np.concatenate([corpus.train[domain], corpus.heldout[domain]])
        assert (ids != 256).sum() == 30_000


def test_built_in_text_is_enough_and_of_several_kinds():
    corpus = load_corpus(BUILTIN, BYTES)
    assert {"python", "bytecode", "unicode"} <= set(corpus.domains)
    frequencies = []
    for domain in corpus.domains:
        assert 150_000 < len(corpus.train[domain]) <= 200_000
        assert len(corpus.heldout[domain]) > 2000
        frequencies.append(np.bincount(corpus.train[domain], minlength=257) / len(corpus.train[domain]))
    for i, one in enumerate(frequencies):
        for other in frequencies[:i]:
            assert np.abs(one - other).sum() / 2 > 0.1


def test_no_paragraph_of_the_built_in_text_is_both_trained_on_and_held_out():
    corpus = load_corpus(replace(BUILTIN, builtin_bytes_per_domain=500_000), BYTES)

    def paragraphs(streams):
        whole = "\n\n".join(text for stream in streams.values() for text in documents(stream))
        keys = {" ".join(paragraph.split()) for paragraph in whole.split("\n\n")}
        return {key for key in keys if len(key) >= 60}

    train, heldout = paragraphs(corpus.train), paragraphs(corpus.heldout)
    assert len(heldout) > 100 and len(train) > 3000
    assert not train & heldout


def test_docstrings_leave_the_source():
    import ast

    from equimoe.moe.train.data.builtin import _without_docstrings

    source = '"""M\u00e9."""\nclass A:\n    """A."""\n    x = 1\ndef f(): "F."\ndef g():\n    """G\n    g."""\n'
    prose, code = _without_docstrings(source, ast.parse(source))
    assert prose == "M\u00e9.\n\nA.\n\nF.\n\nG\ng."
    assert code == "class A:\n    x = 1\ndef f(): pass\ndef g():\n    pass\n"
    ast.parse(code)


def test_bytecode_has_neither_docstrings_nor_an_order_of_sets():
    import ast

    from equimoe.moe.train.data.builtin import _disassemble

    names = [f"name{i}" for i in range(9)]
    source = f"'Doc of m.'\ndef f(x):\n    return x in {{{', '.join(map(repr, reversed(names)))}}}\n"
    listing = _disassemble(ast.parse(source), "m.py")
    assert "f(x):" in listing and "<code f>" in listing
    assert "{" + ", ".join(map(repr, names)) + "}" in listing
    assert "Doc" not in listing and " at 0x" not in listing


def test_the_corpus_is_the_same_in_every_process():
    program = (
        "from equimoe.moe.train.config import DataConfig; from equimoe.moe.train.data import *;"
        "print(load_corpus(DataConfig(builtin_bytes_per_domain=200_000), load_tokenizer('bytes')).fingerprint)"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # Python's hash seed there is random or 0, unlike here
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == load_corpus(BUILTIN, BYTES).fingerprint, done.stderr
