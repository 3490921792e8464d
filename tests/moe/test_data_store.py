"""Checks the store of tokens: what is in it, when it is used again, and what happens if it is cut short or damaged."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equimoe.launch import tokenize
from equimoe.moe.train.config import DataConfig
from equimoe.moe.train.data import build, check_store, load_corpus, load_tokenizer, store_at, wanted_store
from equimoe.moe.train.data.stream import Stream
from equimoe.moe.train.data.token_file import TokenFile
from tests.moe.test_data_tokenizer import bpe

BYTES = load_tokenizer("bytes")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """All text is long here: it is stored, in many chunks."""
    monkeypatch.setattr("equimoe.moe.train.data.sources.SHORT", -1)
    monkeypatch.setattr(build, "CHUNK", 1500)


def write(folder: Path, seed: int = 0) -> Path:
    """Write documents of three domains, with copies, an empty one, and flat files."""
    draw = np.random.default_rng(seed)
    for i in range(60):
        place = folder / "abc"[i % 3] / f"{i}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("".join(chr(97 + c) for c in draw.integers(0, 26, int(draw.integers(1, 300)))))
    (folder / "b" / "copy.txt").write_text((folder / "a" / "0.txt").read_text())
    (folder / "c" / "empty.txt").write_text("")
    rows = [json.dumps({"prompt": f"question {i}? ", "completion": f"answer {i}"}) for i in range(9)]
    (folder / "c" / "chat.jsonl").write_text("\n".join(rows))
    draw.integers(0, 256, 500).astype("<u2").tofile(folder / "c" / "x.bin")
    np.save(folder / "c" / "y.npy", draw.integers(0, 256, 300))
    draw.integers(0, 256, 400).astype("<u2").tofile(folder / "flat.bin")
    return folder


def config(path: Path, **changes) -> DataConfig:
    return replace(DataConfig(path=str(path), seq_len=4, heldout_fraction=0.1), **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("fraction", [1e-9, 0.02, 0.1, 0.5])
def test_a_store_holds_the_corpus_that_memory_holds(tmp_path, fraction):
    asked = config(write(tmp_path / "data"), heldout_fraction=fraction)
    kept, stored = load_corpus(asked, BYTES), load_corpus(asked, BYTES, tmp_path / "cache")
    assert kept.folder is None and stored.folder is not None and stored.folder.parent == tmp_path / "cache"
    assert stored.fingerprint == kept.fingerprint and stored.notes == kept.notes
    assert stored.train_masks.keys() == kept.train_masks.keys() == {"c"}
    for name in ("train", "heldout", "train_masks", "heldout_masks"):
        for domain, stream in getattr(kept, name).items():
            assert np.array_equal(np.asarray(getattr(stored, name)[domain]), np.asarray(stream))
    assert isinstance(stored.train["a"], TokenFile | Stream) and isinstance(kept.train["a"], np.ndarray)


def test_what_fits_is_used_again_and_what_does_not_is_built(tmp_path, monkeypatch):
    data, cache = write(tmp_path / "data"), tmp_path / "cache"
    built = []
    real = build._build
    monkeypatch.setattr(build, "_build", lambda *given: (built.append(1), real(*given)))

    def load(**changes):
        built.clear()
        found = load_corpus(config(data, **changes), BYTES, cache)
        return len(built), found.folder

    first = load()
    assert first[0] == 1 and load() == (0, first[1]) and load(heldout_fraction=0.3) == (0, first[1])
    for changes in ({"domain_by": "kind"}, {"text_field": "prompt"}, {"domain_field": "completion"}):
        times, folder = load(**changes)
        assert times == 1 and folder != first[1]
    (data / "a" / "0.txt").write_text("changed")
    times, folder = load()
    assert times == 1 and folder != first[1]
    other = bpe(tmp_path / "tokenizer.json")
    built.clear()
    load_corpus(config(data, tokenizer=str(tmp_path)), other, cache)
    assert len(built) == 1


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    data = write(tmp_path / "data")
    tokenizer = bpe(tmp_path / "tokenizer.json")
    asked = config(data, tokenizer=str(tmp_path / "tokenizer.json"))
    found = []
    for workers in (1, 2):
        wanted = store_at(asked, tokenizer, tmp_path / f"out{workers}")
        wanted.build(workers)
        found.append(contents(wanted.folder))
    assert found[0] == found[1] and len(found[0]) > 8


def command(*options: object, chunks: int = 10_000) -> tuple[int, int]:
    """Run the command in a process of its own, which is killed after some chunks: (exit code, chunks it wrote)."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        left, real = [chunks], build._write

        def write_chunk(*given):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            os.write(writer, b"x")
            real(*given)

        build._write = write_chunk
        try:
            tokenize.main([*map(str, options)])
            sys.stdout.flush()
            os._exit(0)
        except SystemExit as ended:
            os._exit(ended.code)
        finally:
            os._exit(99)
    os.close(writer)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reader, "rb") as pipe:
        return code, len(pipe.read())


def test_a_killed_command_goes_on_and_leaves_nothing_half_written(tmp_path, capfd):
    data, out = write(tmp_path / "data"), tmp_path / "out"
    code, chunks = command("--data", data, "--out", tmp_path / "whole")
    assert code == 0 and chunks > 4
    assert command("--data", data, "--out", out, chunks=3) == (-signal.SIGKILL, 3)
    assert not out.exists()
    for part in (tmp_path / ".out.building").glob("run-0000001.ids"):
        part.write_bytes(part.read_bytes()[:-2])  # as after a crash of the machine
    assert command("--data", data, "--out", out) == (0, chunks - 2)
    assert contents(out) == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out", "whole"}
    capfd.readouterr()
    assert command("--data", data, "--out", out) == (0, 0)
    assert "is there already; train on it with --data.path" in capfd.readouterr().out


def test_chunks_of_other_options_are_not_used(tmp_path):
    data, out = write(tmp_path / "data"), tmp_path / "out"
    assert command("--data", data, "--out", out, chunks=3)[0] == -signal.SIGKILL
    assert command("--data", data, "--out", out, "--domain-by", "kind")[0] == 0
    assert list(json.loads((out / "manifest.json").read_text())["domains"]) == ["jsonl", "text", "tokens"]


def test_the_store_is_a_data_path(tmp_path, capfd):
    data, out = write(tmp_path / "data"), tmp_path / "out"
    assert command("--data", data, "--out", out)[0] == 0
    printed = capfd.readouterr().out
    assert f"{out} is written; train on it with --data.path {out} --data.tokenizer bytes" in printed
    assert "c: 29 documents" in printed and "800 tokens in files" in printed
    found = load_corpus(config(out), BYTES)
    assert found.fingerprint == load_corpus(config(data), BYTES).fingerprint and found.folder == out
    assert wanted_store(config(out), BYTES, tmp_path / "cache") is None
    with pytest.raises(ValueError, match=r"was tokenised with bytes, as it was then; give data\.tokenizer=bytes"):
        load_corpus(config(out), bpe(tmp_path / "tokenizer.json"))
    # a store inside a data folder is not read as text
    assert "left out, stores of tokens: out/" in load_corpus(config(tmp_path), BYTES).notes


def test_damage_is_found(tmp_path, capfd):
    data, out = write(tmp_path / "data"), tmp_path / "out"
    store_at(config(data), BYTES, out).build()
    assert check_store(out)["domains"]["c"]["documents"] == 29
    assert command("--out", out, "--check")[0] == 0
    capfd.readouterr()
    raw = bytearray((out / "0.ids").read_bytes())
    raw[40] ^= 1
    (out / "0.ids").write_bytes(raw)
    assert command("--out", out, "--check")[0] == 66
    assert capfd.readouterr().err == f"error: --data='{out}/0.ids': is damaged; delete the folder and tokenise again\n"
    (out / "0.ids").write_bytes(raw[:-2])
    with pytest.raises(ValueError, match=r"0\.ids': has \d+ bytes instead of \d+; delete the folder and tokenise"):
        load_corpus(config(out), BYTES)
    (out / "0.ids").unlink()
    with pytest.raises(ValueError, match=r"0\.ids': cannot be read \(No such file"):
        load_corpus(config(out), BYTES)


def test_flat_files_that_change_after_the_store_was_made_are_found(tmp_path):
    data = write(tmp_path / "data")
    store_at(config(data), BYTES, tmp_path / "out").build()
    os.utime(data / "flat.bin", (1, 1))
    with pytest.raises(ValueError, match=r"flat\.bin': has changed since the store was made; tokenise again"):
        load_corpus(config(tmp_path / "out"), BYTES)
    (data / "flat.bin").unlink()
    with pytest.raises(ValueError, match=r"flat\.bin': cannot be read \(No such file"):
        load_corpus(config(tmp_path / "out"), BYTES)


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (
            ["--out", "{full}", "--data", "{data}"],
            66,
            "--out='{full}': holds other files; give a new or an empty folder",
        ),
        (["--out", "{full}/x.txt/out", "--data", "{data}"], 66, "--out='{full}/x.txt/out': cannot be written ("),
        (["--out", "{out}", "--data", "{data}/nothing"], 66, "--data='{data}/nothing': does not exist"),
        (["--out", "{out}", "--data", "{data}", "--workers", "0"], 64, "--workers=0: must be at least 1"),
        (["--out", "{out}"], 64, "--data: give the text to tokenise, or --check for what is there"),
        (["--out", "{out}", "--check"], 66, "{out}: is no complete store of tokens; tokenise again"),
        (["--out", "{out}", "--data", "{data}", "--domain-by", "size"], 64, "--domain-by='size': use one of auto,"),
        (["--out", "{out}", "--data", "{data}", "--tokenizer", "x"], 66, "--tokenizer='x': no such file; use 'bytes'"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, capsys, options, code, line):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("something else")
    places = {"full": tmp_path / "full", "data": write(tmp_path / "data"), "out": tmp_path / "out"}
    with pytest.raises(SystemExit) as ended:
        tokenize.main([option.format(**places) for option in options])
    error = capsys.readouterr().err
    assert ended.value.code == code and error.startswith(f"error: {line.format(**places)}") and error.count("\n") == 1


def test_two_builders_make_one_store(tmp_path):
    """The second one waits for the first, and uses what it has built."""
    wanted = store_at(config(write(tmp_path / "data")), BYTES, tmp_path / "out")
    times, waited = [], []
    real = build._build

    def slow(*given):
        times.append(1)
        time.sleep(1.0)
        real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_build", slow)
        patch.setattr(build, "POLL_S", 0.1)
        threads = [threading.Thread(target=wanted.build, args=(1, None, lambda: waited.append(1))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(times) == 1 and waited and wanted.complete


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=6), st.data())
def test_a_stream_is_like_an_array(tmp_path_factory, lengths, data):
    whole = np.arange(sum(lengths), dtype=np.uint16)
    folder, pieces = tmp_path_factory.mktemp("s"), []
    for i, piece in enumerate(np.split(whole, np.cumsum(lengths))):
        piece.astype("<u2").tofile(folder / str(i))
        stored = TokenFile(str(folder / str(i)), np.dtype("<u2"), 0, len(piece))
        pieces.append(stored if i % 2 else piece)
    stream = Stream(pieces, np.uint16)
    assert len(stream) == len(whole) and np.array_equal(np.asarray(stream), whole)
    a, b = (data.draw(st.integers(-60, 60)) for _ in range(2))
    assert np.array_equal(np.asarray(stream[a:b]), whole[a:b]) and np.array_equal(stream[a:b:2], whole[a:b:2])
    assert np.array_equal(np.asarray(stream[a:][:b]), whole[a:][:b])
    if len(whole):
        places = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=20)), int)
        assert np.array_equal(stream[places], whole[places]) and stream[-1] == whole[-1]
        for piece in pieces:
            if isinstance(piece, TokenFile) and len(piece):
                assert np.array_equal(piece[places % len(piece)], np.asarray(piece)[places % len(piece)])
