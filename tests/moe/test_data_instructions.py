"""Checks instruction data: what its text is, and which of its tokens are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from equimoe.moe.train.config import DataConfig
from equimoe.moe.train.data import Batches, heldout_batches, load_corpus, load_tokenizer
from equimoe.moe.train.data.packing import IGNORED
from tests.moe.test_data_tokenizer import bpe

BYTES = load_tokenizer("bytes")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Bye \u4e2d"},
    {"role": "assistant", "content": "See you."},
]
#: as many models have it (ChatML)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: as Llama 2 and Mistral have it: the system message is a part of the first question
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{% elif message.role == 'user' %}"
    "[INST] {% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
    "{{ message.content }} [/INST]{% elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('roles are system, user and assistant') }}{% endif %}{% endfor %}"
)


def write(folder: Path, *records: dict) -> Path:
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tokens(folder: Path, tokenizer, *records: dict, name: str = "bytes"):
    """Return ids and mask of all training text of these records."""
    config = DataConfig(path=str(write(folder, *records)), seq_len=1, heldout_fraction=1e-9, tokenizer=name)
    corpus = load_corpus(config, tokenizer)
    (domain,) = corpus.domains
    ids = np.concatenate([corpus.train[domain], corpus.heldout[domain]])
    return ids, np.concatenate([corpus.train_masks[domain], corpus.heldout_masks[domain]])


def trained(tokenizer, ids, mask) -> list[str]:
    """Return the text of each run of tokens that are trained on."""
    edges = np.flatnonzero(np.diff(mask.astype(int))) + 1
    runs = zip(np.split(ids, edges), np.split(mask, edges), strict=True)
    return [tokenizer._backend.decode(run.tolist(), skip_special_tokens=False) for run, on in runs if on[0]]


def test_the_plain_form_of_a_conversation(tmp_path):
    ids, mask = tokens(tmp_path, BYTES, {"messages": TALK})
    text = "System: Be brief.\n\nUser: Hello\n\nAssistant: Hi!\n\nUser: Bye \u4e2d\n\nAssistant: See you."
    assert bytes(ids.tolist()).decode() == text
    assert bytes(ids[mask == 1].tolist()).decode() == "Hi!\n\nSee you."


def test_a_prompt_and_its_completion_are_one_text(tmp_path):
    ids, mask = tokens(tmp_path, BYTES, {"prompt": "2 + 2 =", "completion": " 4"})
    assert bytes(ids.tolist()) == b"2 + 2 = 4" and bytes(ids[mask == 1].tolist()) == b" 4"
    other = tokens(tmp_path, BYTES, {"prompt": "2 + 2 =", "response": " 4"})
    assert np.array_equal(ids, other[0]) and np.array_equal(mask, other[1])
    lists = {"prompt": TALK[:2], "completion": [TALK[2]]}
    same = {"messages": TALK[:3]}
    assert all(
        np.array_equal(a, b) for a, b in zip(tokens(tmp_path, BYTES, lists), tokens(tmp_path, BYTES, same), strict=True)
    )


def test_ids_of_the_whole_text_with_a_subword_tokenizer(tmp_path):
    """A token over the edge of prompt and completion is trained on: it holds the completion's first character."""
    pytest.importorskip("tokenizers")
    tokenizer = bpe(tmp_path / "tokenizer.json")
    ids, mask = tokens(tmp_path, tokenizer, {"prompt": "the quick bro", "completion": "wn fox"}, name=str(tmp_path))
    assert np.array_equal(ids, tokenizer.encode("the quick brown fox"))
    text = "".join(trained(tokenizer, ids, mask))
    assert text.endswith("wn fox") and not text.startswith("the quick")


def chat(folder: Path, template: str, special=("<|im_start|>", "<|im_end|>", "<s>", "</s>")):
    pytest.importorskip("jinja2")
    settings = {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return bpe(folder / "tokenizer.json", special=special)


def test_a_chat_template_writes_the_conversation(tmp_path):
    tokenizer = chat(tmp_path, CHATML)
    ids, mask = tokens(tmp_path, tokenizer, {"messages": TALK}, name=str(tmp_path))
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
    assert tokenizer._backend.decode(ids.tolist(), skip_special_tokens=False) == text
    assert (ids == tokenizer.id_of("<|im_start|>")).sum() == (ids == tokenizer.id_of("<|im_end|>")).sum() == 5
    assert trained(tokenizer, ids, mask) == ["Hi!<|im_end|>\n", "See you.<|im_end|>\n"]


def test_a_template_that_moves_the_system_message_and_ends_with_the_end_of_a_document(tmp_path):
    tokenizer = chat(tmp_path, INST)
    ids, mask = tokens(tmp_path, tokenizer, {"messages": TALK[:3]}, name=str(tmp_path))
    found = tokenizer._backend.decode(ids.tolist(), skip_special_tokens=False)
    assert found == "<s>[INST] Be brief. Hello [/INST] Hi!"  # the store adds </s> itself, once
    assert trained(tokenizer, ids, mask) == [" Hi!"]


def test_templates_of_other_files(tmp_path):
    chat(tmp_path, CHATML)
    wanted = tokens(tmp_path, load_tokenizer(str(tmp_path)), {"messages": TALK}, name=str(tmp_path))
    settings = tmp_path / "tokenizer_config.json"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    settings.write_text(json.dumps({"chat_template": several, "eos_token": "</s>"}))
    named = tokens(tmp_path, load_tokenizer(str(tmp_path)), {"messages": TALK}, name=str(tmp_path))
    settings.write_text(json.dumps({"eos_token": "</s>"}))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    other = tokens(tmp_path, load_tokenizer(str(tmp_path)), {"messages": TALK}, name=str(tmp_path))
    assert all(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in zip(wanted, named, other, strict=True))


def test_special_tokens_in_a_message_are_text_and_those_of_the_template_are_not(tmp_path):
    tokenizer = chat(tmp_path, CHATML)
    talk = [{"role": "user", "content": "what is <|im_end|>?"}, {"role": "assistant", "content": "<|im_end|> ends"}]
    ids, mask = tokens(tmp_path, tokenizer, {"messages": talk}, name=str(tmp_path))
    assert (ids == tokenizer.id_of("<|im_end|>")).sum() == 2
    text = "<|im_start|>user\nwhat is <|im_end|>?<|im_end|>\n<|im_start|>assistant\n<|im_end|> ends<|im_end|>\n"
    assert tokenizer._backend.decode(ids.tolist(), skip_special_tokens=False) == text
    assert trained(tokenizer, ids, mask) == ["<|im_end|> ends<|im_end|>\n"]


def test_the_templates_of_transformers_agree(tmp_path):
    """The text is the one that transformers writes."""
    transformers = pytest.importorskip("transformers")
    tokenizer = chat(tmp_path, CHATML)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=CHATML, eos_token="</s>"
    )
    ids, _ = tokens(tmp_path, tokenizer, {"messages": TALK}, name=str(tmp_path))
    assert ids.tolist() == theirs.apply_chat_template(TALK, tokenize=True, return_dict=False)


def test_the_end_of_a_document_is_trained_on_and_labels_are_ignored_elsewhere(tmp_path):
    records = [{"prompt": f"question {i}: ", "completion": f"answer {i}"} for i in range(40)]
    config = DataConfig(path=str(write(tmp_path, *records)), seq_len=8, heldout_fraction=0.2)
    corpus = load_corpus(config, BYTES)
    batches = Batches(corpus.train, 8, 10, 0, corpus.train_masks)
    found = [(i, l) for step in range(20) for i, l, _ in batches.sample(step, 0, 1, 1, 10)]
    labels = np.concatenate([label.numpy().ravel() for _, label in found])
    kept = labels[labels != IGNORED]
    assert 256 in kept and set(bytes(kept[kept < 256].tolist())) <= set(b"answer 0123456789")
    assert (labels == IGNORED).mean() > 0.4
    # evaluation leaves the same labels out
    evaluated = [label[mask].numpy() for _, _, label, mask in heldout_batches(corpus, 8, None, 4)]
    ids = np.concatenate(evaluated)
    assert (ids == IGNORED).mean() > 0.4
    ids = ids[ids != IGNORED]
    assert len(ids) and set(bytes(ids[ids < 256].tolist())) <= set(b"answer 0123456789")


def test_instruction_data_and_text_in_one_domain(tmp_path):
    rows = [{"text": f"text {i} " * 3, "domain": "d"} for i in range(9)]
    rows += [{"prompt": "q", "completion": "a", "domain": "d"}, {"messages": TALK, "domain": "d"}]
    corpus = load_corpus(DataConfig(path=str(write(tmp_path, *rows)), seq_len=1, heldout_fraction=0.1), BYTES)
    ids, mask = corpus.train["d"], corpus.train_masks["d"]
    documents = np.split(ids, np.flatnonzero(ids == 256))
    masks = np.split(mask, np.flatnonzero(ids == 256))
    for document, own in zip(documents, masks, strict=True):
        text = bytes(document[document != 256].tolist()).decode()
        assert own.all() == text.startswith("text")
        assert own[document == 256].all()
    assert {bool(own[:-1].all()) for own in masks} == {True, False}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "' line 1: has no message of role 'assistant', so nothing of it would be trained on"),
        ({"messages": [TALK[1]]}, "' line 1: has no message of role 'assistant'"),
        ({"messages": [{"role": "assistant"}]}, "' line 1: message 1 needs a 'role' and a 'content', both text"),
        ({"messages": ["Hello"]}, "' line 1: message 1 needs a 'role' and a 'content', both text"),
        ({"messages": [*TALK, {"content": "x"}]}, "' line 1: message 6 needs a 'role' and a 'content', both text"),
        ({"messages": [{"role": "assistant", "content": [{"image": 1}]}]}, "' line 1: message 1 needs a 'role'"),
        ({"messages": "Hello"}, "' line 1: messages is a text; write a list of objects"),
        ({"prompt": "q"}, "data.text_field='text': is missing in"),
        ({"prompt": "q", "completion": ["a"]}, "' line 1: prompt is a text, and completion is a list; write two"),
    ],
)
def test_wrong_records_are_one_line(tmp_path, record, message):
    with pytest.raises(ValueError) as refused:
        load_corpus(DataConfig(path=str(write(tmp_path, record))), BYTES)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_content_in_parts(tmp_path):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, {"role": "assistant", "content": "c"}]
    ids, _ = tokens(tmp_path, BYTES, {"messages": parts})
    assert bytes(ids.tolist()) == b"User: ab\n\nAssistant: c"


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (INST, [{"role": "tool", "content": "x"}, *TALK[1:3]], "(roles are system, user and assistant); mend the"),
        (
            "{{ messages | length }}",
            TALK,
            "(it writes a message differently when others follow); mend the conversation",
        ),
        ("{{ messages[0].nothing.at_all }}", TALK, "cannot write this conversation ("),
        ("{{ 1 / 0 }}", TALK, "(division by zero); mend"),
        ("{{ 'x' * 10**15 }}", TALK, "(MemoryError); mend"),
        ("{% for i in range(10**9) %}x{% endfor %}", TALK, "(Range too big."),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", TALK, "(maximum recursion depth exceeded"),
        ("{{ strftime_now('%d') }}", TALK, "'strftime_now' is undefined); mend"),
        ("{% include '/etc/passwd' %}", TALK, "cannot write this conversation ("),
    ],
)
def test_a_template_that_fails_is_one_line(tmp_path, template, messages, words):
    tokenizer = chat(tmp_path, template)
    path = write(tmp_path, {"text": "fine"}, {"messages": messages})
    with pytest.raises(ValueError, match=r"^data\.path='chat\.jsonl:2': the tokenizer's chat template") as refused:
        load_corpus(DataConfig(path=str(path)), tokenizer)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_templates_write_json_and_generations_as_transformers_does(tmp_path):
    """JSON without the escapes of HTML; a block ``generation`` is what is in it."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m | tojson }} {% endif %}{% endfor %}"
    )
    talk = [{"role": "user", "content": "a < b & 'c' \u4e2d"}, {"role": "assistant", "content": "yes"}]
    tokenizer = chat(tmp_path, template)
    ids, mask = tokens(tmp_path, tokenizer, {"messages": talk}, name=str(tmp_path))
    expected = json.dumps(talk[0], ensure_ascii=False) + " yes"
    assert tokenizer._backend.decode(ids.tolist(), skip_special_tokens=False) == expected
    assert trained(tokenizer, ids, mask)[-1].strip() == "yes"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", b"{", "is not a JSON object; save it again, or remove it"),
        ("tokenizer_config.json", b"[]", "is not a JSON object; save it again, or remove it"),
        ("tokenizer_config.json", b'{"a":' * 100_000, "is not a JSON object; save it again, or remove it"),
        ("tokenizer_config.json", b"\xff", "is not a JSON object; save it again, or remove it"),
        ("chat_template.jinja", b"\xff\xfe", "is not UTF-8 text; save it again"),
    ],
)
def test_damaged_files_next_to_a_tokenizer_are_one_line(tmp_path, name, content, words):
    """They say which token ends a document, and how conversations are written: neither may be lost in silence."""
    bpe(tmp_path / "tokenizer.json")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^data\.tokenizer='") as refused:
        load_tokenizer(str(tmp_path))
    assert str(refused.value) == f"data.tokenizer={str(tmp_path / name)!r}: {words}"


def test_a_template_that_is_wrong_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^data\.tokenizer='.*json': its chat template is wrong \(.*\); mend it$"):
        chat(tmp_path, "{% for message in %}")


def test_a_template_cannot_reach_the_machine(tmp_path):
    tokenizer = chat(tmp_path, "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match=r"chat template cannot write this conversation"):
        tokenizer.conversation(TALK, "x")
