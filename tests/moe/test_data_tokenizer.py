"""Checks that tokenizers turn text into ids and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equimoe.moe.train.data import load_tokenizer
from equimoe.moe.train.data import tokenizer as tokenizers_of

ROOT = Path(__file__).resolve().parents[2]


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


def test_the_token_that_ends_a_document_is_the_configured_one_or_asked_for(tmp_path):
    """It is never a new id, and one that is not in our list is found in tokenizer_config.json."""
    pytest.importorskip("tokenizers")
    path, settings = tmp_path / "t.json", tmp_path / "tokenizer_config.json"
    strange = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    save(path, {"<unk>": 0, "one": 1, "</s>": 2}, [strange])
    assert load_tokenizer(str(path)).end_of_document == 2
    for value in (strange, {"content": strange, "special": True}):
        settings.write_text(json.dumps({"eos_token": value}))
        assert load_tokenizer(str(path)).end_of_document == 3
    assert load_tokenizer(str(path), "one").end_of_document == 1
    with pytest.raises(ValueError, match=r"^data\.end_of_document='two': is not a token of '.*t\.json'; give one of"):
        load_tokenizer(str(path), "two")
    save(path, {"<unk>": 0, "one": 1})
    for config, why in (("{}", "no file says it"), ('{"eos_token": "<end>"}', "names '<end>', which it does not have")):
        settings.write_text(config)
        with pytest.raises(ValueError, match=rf"{why}\); set data\.end_of_document to one of its tokens$"):
            load_tokenizer(str(path))
    with pytest.raises(ValueError, match=r"^data\.end_of_document='one': the tokenizer 'bytes' ends documents"):
        load_tokenizer("bytes", "one")


def bpe(path, special=("<|endoftext|>",), added=(), **changes):
    """Save a BPE tokenizer like GPT-2's, trained on a few words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog's back, it's 1999 again"] * 9, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    spec = json.loads(tokenizer.to_str())
    for name, value in changes.items():
        (spec["model"] if name == "dropout" else spec)[name] = value
    path.write_text(json.dumps(spec))
    return load_tokenizer(str(path))


def test_special_tokens_spelled_out_in_text_are_text(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = bpe(tmp_path / "tokenizer.json")
    text = "the marker <|endoftext|> ends the text"
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_document not in ids and tokenizer.decode(ids) == text
    assert tokenizer.end_of_document in tokenizer.encode_prompt(text)
    assert np.array_equal(tokenizer.encode(text), ids)


def test_dropout_truncation_and_padding_of_a_tokenizer_are_off(tmp_path):
    """With dropout, every reading would have other ids; truncation would drop the end of long documents."""
    pytest.importorskip("tokenizers")
    wanted = bpe(tmp_path / "tokenizer.json").encode("the quick brown fox " * 50)
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 999}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    odd = bpe(tmp_path / "tokenizer.json", dropout=0.5, truncation=truncation, padding=padding)
    for _ in range(3):
        assert np.array_equal(odd.encode("the quick brown fox " * 50), wanted)


#: characters at which tokenizers may cut
ALPHABET = list("aZ 's\n\t.,12\u00e9\u0301\u4e2d\u3042<|>")
LONG = "the quick  brown\n\nfox's 1234567 \u00e9tude \u4e2d\u6587\u5b57 over... <|x y|> dog e\u0301 "


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.sampled_from(ALPHABET), max_size=300))
def test_pieces_of_a_long_text_have_the_ids_of_the_whole(tmp_path_factory, text):
    pytest.importorskip("tokenizers")
    tokenizer = bpe(tmp_path_factory.mktemp("t") / "tokenizer.json", added=["  ", "<|x|>"])
    assert tokenizer._cuts
    whole = tokenizer._encode(text + LONG).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("equimoe.moe.train.data.tokenizer.PIECE", 3)
        parts = list(tokenizer._parts(text + LONG))
        assert "".join(parts) == text + LONG and len(parts) > 1
        assert tokenizer.encode(text + LONG).tolist() == whole


@pytest.mark.parametrize("pattern", tokenizers_of.SAFE_PATTERNS, ids=range(len(tokenizers_of.SAFE_PATTERNS)))
@settings(deadline=None)
@given(text=st.text(st.sampled_from(ALPHABET), max_size=200))
def test_every_safe_pattern_cuts_between_words(pattern, text):
    """Where a text may be cut, the pattern always cuts, and cuts both parts as it cuts the whole."""
    tokenizers = pytest.importorskip("tokenizers")
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    text = f"{text} end of words {text}"
    pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
    for cut in tokenizers_of.CUT.finditer(text):
        parts = [[p for p, _ in split.pre_tokenize_str(part)] for part in (text[: cut.start()], text[cut.start() :])]
        if "\\p{L}" in pattern:
            assert parts[0] + parts[1] == pieces


def test_a_tokenizer_that_may_join_words_reads_long_texts_whole(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    joined = bpe(tmp_path / "tokenizer.json", added=["fox jumps"])
    assert not joined._cuts and list(joined._parts("the fox jumps " * 100_000)) == ["the fox jumps " * 100_000]
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    for change in (
        {"normalizer": {"type": "Prepend", "prepend": "_"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": True}},
        {"pre_tokenizer": spec["pre_tokenizer"] | {"add_prefix_space": True}},
        {"pre_tokenizer": spec["pre_tokenizer"] | {"use_regex": False}},
    ):
        assert not tokenizers_of._may_cut(spec | {"added_tokens": []} | change), change
    assert tokenizers_of._may_cut(spec | {"added_tokens": []}) and tokenizers


@pytest.mark.slow
def test_a_long_document_takes_little_memory(tmp_path):
    """Without pieces it takes more than 100 bytes for each byte of text."""
    pytest.importorskip("tokenizers")
    bpe(tmp_path / "tokenizer.json")
    program = (
        "import resource, sys; from equimoe.moe.train.data import load_tokenizer\n"
        "tokenizer, text = load_tokenizer(sys.argv[1]), 'the quick brown fox jumps over the lazy dog ' * 500_000\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); tokenizer.encode(text); print((peak() - before) / len(text))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert float(done.stdout) < 8, done.stderr


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
