"""Checks that tokenizers turn text into ids and back."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equimoe.moe.train.data import load_tokenizer


@given(st.text())
def test_bytes_round_trip_any_text(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


@given(st.binary())
def test_bytes_hold_any_bytes_and_decode_to_what_can_be_printed(raw):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(raw)
    assert bytes(ids.tolist()) == raw
    assert tokenizer.decode(ids) == raw.decode("utf-8", errors="replace")
    tokenizer.decode(ids).encode("utf-8")


def test_bytes_end_of_document_and_lone_surrogates():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.decode(np.array([72, 256, 105])) == "Hi"
    assert tokenizer.encode("a\ud800b").tolist() == [97, ord("?"), 98]


def save(path, vocabulary, special=()):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(path))


def test_hugging_face_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    save(path, {"<unk>": 0, "one": 1, "two": 7}, ["</s>"])
    for name in (path, tmp_path):
        tokenizer = load_tokenizer(str(name))
        # the ids have a gap: the largest id of a word is 7
        assert tokenizer.vocab_size > 7
        assert tokenizer.decode([tokenizer.end_of_document]) == ""
        ids = tokenizer.encode("one two three \ud800")
        assert ids.tolist() == [1, 7, 0, 0] and ids.dtype == np.uint16
        assert tokenizer.decode(ids[:2]) == "one two"


def test_hugging_face_tokenizer_without_an_end_gets_one(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "t.json"
    save(path, {"<unk>": 0, "one": 1})
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.end_of_document, tokenizer.vocab_size) == (2, 3)


def test_errors_name_field_value_and_remedy(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"^data\.tokenizer='gpt2': no such file; use 'bytes' or a path"):
        load_tokenizer("gpt2")
    broken = tmp_path / "tokenizer.json"
    broken.write_text('{"model":')
    with pytest.raises(
        ValueError, match=r"^data\.tokenizer='.*tokenizer\.json': cannot be read as .*'bytes'"
    ) as caught:
        load_tokenizer(str(broken))
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ValueError, match=r"^data\.tokenizer=.*needs the package tokenizers; run 'pip install tokenizers'"
    ):
        load_tokenizer(str(broken))
