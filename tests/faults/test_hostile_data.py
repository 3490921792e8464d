"""Checks that data files that are wrong, or change under a run, end it in one line and with the exit code for data."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from equimoe.launch import env
from equimoe.launch.options import to_yaml
from equimoe.moe.train.config import DataConfig, DeepSpeedConfig
from equimoe.moe.train.data import Corpus, DataError, load_corpus, load_tokenizer
from equimoe.moe.train.data.token_file import TokenFile
from equimoe.moe.train.trainer import Trainer
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.command import launch

IDS = np.random.default_rng(0).integers(0, 256, 20_000)


def load(path: Path, **changes: Any) -> Corpus:
    config = DataConfig(path=str(path), seq_len=16, **({"heldout_fraction": 0.1} | changes))
    return load_corpus(config, load_tokenizer(config.tokenizer))


def tokens_of(kind: str, folder: Path) -> Path:
    path = folder / f"tokens.{kind}"
    if kind == "npy":
        np.save(path, IDS.astype(np.uint16))
    else:
        IDS.astype("<u2").tofile(path)
    return path


# ---- files that change under a run

#: what happens to a token file between two steps, and words of the message
CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: os.truncate(path, 5000), "has shrunk from 40000 to 5000 bytes"),
    "emptied": (lambda path: os.truncate(path, 0), "has shrunk from 40000 to 0 bytes"),
    "overwritten": (lambda path: path.write_bytes(b"\xff" * 40000), "id 65535 at position"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_token_file_that_changes_under_a_run(tmp_path: Path, name: str) -> None:
    change, words = CHANGES[name]
    path = tokens_of("bin", tmp_path)
    config = small.on(path, steps=3)
    config = replace(config, data=replace(config.data, workers=0))  # reading ahead may be done before the change
    (tmp_path / "small.yaml").write_text(to_yaml(config))
    real = Trainer.train_step

    def step(self: Trainer, observed: bool = True) -> Any:
        if self.step == 1:
            if self.axis.rank == 0:
                change(path)
            dist.barrier()
        return real(self, observed)

    @contextmanager
    def within() -> Iterator[None]:
        Trainer.train_step = step  # type: ignore[method-assign]
        yield

    argv = ["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run")]
    ended = launch(argv, 2, within=within)
    assert ended.codes == [env.DATA] * 2, ended
    # the second rank with the error stays quiet if it can still ask whether it is the first
    assert 1 <= len(ended.errors) <= 2, ended.errors
    for line in ended.errors:
        assert line.startswith("error: rank ") and ", step 2, phase step: data.path=" in line and words in line
    report("31", "exit 66, one line", change=name, seconds=round(ended.seconds, 2))


def test_a_token_file_that_vanishes_can_still_be_read(tmp_path: Path) -> None:
    path = tokens_of("bin", tmp_path)
    corpus = load(path)
    path.unlink()
    IDS[::-1].astype("<u2").tofile(path)
    assert np.array_equal(corpus.train["tokens"], IDS[:18000])
    report("31", "goes on", change="vanished")


def test_a_mapped_file_would_have_died_of_a_signal(tmp_path: Path) -> None:
    """What the checks avoid: numpy's memory map of the same file."""
    path = tokens_of("bin", tmp_path)
    code = (
        "import numpy as np, os, resource, sys; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
        "ids = np.memmap(sys.argv[1], '<u2', 'r'); os.truncate(sys.argv[1], 0); ids.max()"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True).returncode == -7  # SIGBUS
    IDS.astype("<u2").tofile(path)
    corpus = load(path)
    os.truncate(path, 0)
    with pytest.raises(DataError, match="has shrunk from 40000 to 0 bytes"):
        np.asarray(corpus.train["tokens"])


@pytest.mark.parametrize("kind", ["bin", "npy"])
def test_a_token_file_is_like_an_array(tmp_path: Path, kind: str) -> None:
    path = tokens_of(kind, tmp_path)
    ids = load(path, heldout_fraction=1e-9).train["tokens"]
    assert isinstance(ids, TokenFile) and len(ids) == 19998 and ids.dtype == np.uint16
    chance = random.Random(0)
    for _ in range(200):
        a, b, c = (chance.randrange(-25000, 25000) for _ in range(3))
        assert np.array_equal(ids[a:b], IDS[:19998][a:b]) and np.array_equal(ids[a:][:c], IDS[:19998][a:][:c])
        assert ids[a % 19998] == IDS[a % 19998]
    places = np.array([5, 3, 19000, 3])
    assert np.array_equal(ids[places], IDS[places]) and len(ids[places[:0]]) == 0
    assert np.array_equal(ids[::7], IDS[:19998:7]) and ids[-1] == IDS[19997]
    assert np.array_equal(ids.astype(np.int64), IDS[:19998]) and ids.astype(np.int64).dtype == np.int64


# ---- files that are wrong


def _npy(array: Any, cut: int | None = None) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.save(folder / "x.npy", array, allow_pickle=True)
        if cut is not None:
            os.truncate(folder / "x.npy", cut)
        return folder / "x.npy"

    return make


def _raw(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _line(text: str) -> Callable[[Path], Path]:
    return _raw("x.jsonl", json.dumps({"text": "fine " * 100}).encode() + f"\n{text}\n".encode())


HEADER = b"\x93NUMPY\x01\x00v\x00{'descr': '%s', 'fortran_order': False, 'shape': (%s,), }"
WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "beyond 2^32": (_npy(np.array([1] * 99 + [1 << 33])), "id 8589934592 at position 99 is outside the 257 ids"),
    "2^64 - 1": (_npy(np.array([1] * 99 + [(1 << 64) - 1], np.uint64)), "id 18446744073709551615 at position 99 is"),
    "negative": (_npy(np.array([1, 2, -1] * 50)), "id -1 at position 2 is negative"),
    "floats": (_npy(np.ones(99)), "holds float64"),
    "two-dimensional": (_npy(np.ones((9, 9), np.int64)), "one-dimensional"),
    "objects": (_npy(np.array([{}], object)), "not a plain .npy array"),
    "truncated npy": (_npy(np.ones(999, np.int64), 500), "not a plain .npy array"),
    "huge npy": (_raw("x.npy", (HEADER % (b"<u2", b"1" + b"0" * 30)).ljust(127) + b"\n"), "not a plain .npy array"),
    "code in npy": (_raw("x.npy", b"\x93NUMPY\x01\x00v\x00__import__('os').system('true')".ljust(128)), "not a plain"),
    "odd bytes": (_raw("x.bin", b"\1" * 999), "not a multiple"),
    "empty": (_raw("x.bin", b""), "no text found"),
    "not JSON": (_line("{"), "line 2: is not JSON"),
    "nested": (_line("[" * 100_000), "line 2: is not JSON (nested too deeply)"),
    "nested objects": (_line('{"a":' * 100_000), "line 2: is not JSON (nested too deeply)"),
    "a list": (_line("[1]"), "line 2: is a list; write one"),
    "text missing": (_line('{"body": "x"}'), "data.text_field='text': is missing"),
    "text is a number": (_line('{"text": 1}'), "is a number, not a text, in"),
    "huge integer": (_line('{"text": ' + "9" * 5000 + "}"), "line 2: is not JSON (Exceeds the limit"),
    "not UTF-8": (_raw("x.jsonl", b'{"text": "\xff"}\n'), "line 1: byte 0xff at 10 of the line is not UTF-8"),
    "endless domain": (_line(json.dumps({"text": "x", "domain": "d" * 10_000})), "more than 100 characters"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data(tmp_path: Path, name: str) -> None:
    make, words = WRONG[name]
    with pytest.raises(ValueError, match=r"data\.") as refused:
        load(make(tmp_path))
    message = " ".join(str(refused.value).split())
    assert words in message and len(message) < 1000
    report("31", "exit 66, one line", case=name)


def test_names_that_control_a_terminal_are_escaped_in_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "words " * 50, "domain": "\x1b[2J\n\u202e\ud800"}) + "\n")
    assert load(tmp_path).domains == ("\\x1b[2J\\n\\u202e\\ud800",)


TOKENIZERS = {
    "empty": "",
    "not JSON": "{",
    "nested": '{"a":' * 100_000,
    "a list": "[]",
    "no model": "{}",
    "a wrong model": '{"model": {"type": "BPE", "vocab": 5, "merges": []}}',
    "a negative id": '{"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}',
    "an id beyond 2^32": '{"model": {"type": "WordLevel", "vocab": {"a": 99999999999}, "unk_token": "a"}}',
    "an id of 2^32 - 1": '{"model": {"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "a"}}',
    "an id of 2^31": '{"model": {"type": "WordLevel", "vocab": {"a": 2147483648}, "unk_token": "a"}}',
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_wrong_tokenizers(tmp_path: Path, name: str) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(TOKENIZERS[name])
    with pytest.raises(ValueError, match=r"data\.tokenizer=") as refused:
        load_tokenizer(str(tmp_path), end_of_document="a")
    assert "\n" not in str(refused.value)
    report("14", "one line", kind="tokenizer", case=name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"a": {"b": 1, "b": 2}}', "'b' is given twice"),
        ("[]", "must hold a JSON object"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read"),
    ],
)
def test_wrong_json_for_deepspeed(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ValueError, match=r"deepspeed\.config=") as refused:
        replace(DeepSpeedConfig(), config=str(tmp_path / "ds.json")).settings()
    assert words in str(refused.value) and "\n" not in str(refused.value)
