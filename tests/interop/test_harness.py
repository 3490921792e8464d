"""Checks the model class for the LM evaluation harness against the harness's own class for transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="make engines installs it")
pytest.importorskip("lm_eval", reason="make engines installs it")
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, PreTrainedTokenizerFast

from equimoe.launch import generate
from equimoe.launch.harness import EquiMoE
from equimoe.moe.train.data import load_tokenizer

pytestmark = pytest.mark.engines

LENGTH = 24


@pytest.fixture(scope="module", params=["", "<|begin|>"], ids=["no token at the beginning", "a token at the beginning"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny transformers model with a tokenizer of single characters."""
    path, begin = tmp_path_factory.mktemp("model"), request.param
    letters = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz .,:!?\n", *([begin] if begin else [])]
    backend = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        bos_token=begin or None,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 35}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = MixtralConfig(**sizes, **heads, num_local_experts=4, initializer_range=0.3, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=n) for n, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[EquiMoE, HFLM]:
    theirs = HFLM(pretrained=str(folder), max_length=LENGTH, device="cpu", dtype="float32", batch_size=2)
    return EquiMoE(folder, max_length=LENGTH, batch_size=3), theirs


def test_multiple_choice(both: tuple[EquiMoE, HFLM]) -> None:
    ours, theirs = both
    asked = requests(
        "loglikelihood",
        ("the cat ", "sat on"),
        ("the cat", " sat on"),
        ("a", "b"),
        ("", "no context"),
        ("a context that is longer than the model reads at once", " the end"),
        ("x", "a continuation that fills it whole"[: LENGTH - 1]),
    )
    found, want = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in want]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in want], abs=1e-4)
    assert len({round(value, 3) for value, _ in found}) == len(asked) - 1  # spaces move to the continuation


def test_a_greedy_continuation_is_recognised(both: tuple[EquiMoE, HFLM]) -> None:
    ours, theirs = both
    text = ours.generate_until(requests("generate_until", ("hello", {"until": [], "max_gen_toks": 4})))[0]
    asked = requests("loglikelihood", ("hello", text), ("hello", text[:-1] + "zq"[text[-1] == "z"]))
    greedy = [g for _, g in ours.loglikelihood(asked)]
    assert greedy == [g for _, g in theirs.loglikelihood(asked, disable_tqdm=True)] == [True, False]


def test_whole_texts(both: tuple[EquiMoE, HFLM]) -> None:
    ours, theirs = both
    asked = requests("loglikelihood_rolling", ("short",), ("a text of many words. " * 5,))
    want = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("until", [["."], [], ["\n\n", " "]])
def test_generation(both: tuple[EquiMoE, HFLM], until: list[str]) -> None:
    ours, theirs = both
    settings = {"until": until, "max_gen_toks": 9, "do_sample": False}
    texts = ("once upon a time", "b", "a context that is longer than the model reads at once")
    asked = requests("generate_until", *((text, dict(settings)) for text in texts))
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_no_room_for_a_continuation_is_refused(both: tuple[EquiMoE, HFLM]) -> None:
    asked = requests("generate_until", ("a", {"until": [], "max_gen_toks": LENGTH}))
    with pytest.raises(ValueError, match=f"max_gen_toks={LENGTH}: leaves no room in max_length={LENGTH}"):
        both[0].generate_until(asked)


def test_the_script_of_the_page_gives_the_harness_this_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "inference.md").read_text()
    script = page.split("```python\n")[-1].split("```")[0].replace("runs/quickstart", str(folder))
    asked: list[dict[str, Any]] = []

    def evaluate(**settings: Any) -> dict[str, Any]:  # the real one would download the task
        asked.append(settings)
        return {"results": {}}

    monkeypatch.setitem(vars(lm_eval), "simple_evaluate", evaluate)
    exec(script, {})
    assert isinstance(asked[0]["model"], EquiMoE) and asked[0]["tasks"] == ["hellaswag"]


def test_prompts_and_ends_are_those_of_transformers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tokenizer adds a token before each text, and generation ends after any of several tokens."""
    path = folder.with_name("marked")
    shutil.copytree(folder, path, dirs_exist_ok=True)
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="? $A", special_tokens=[("?", 32)])
    backend.save(str(path / "tokenizer.json"))
    assert backend.token_to_id("?") == 32
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 32
    free = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, free[5]]}))
    want = free[: free.index(free[5]) + 1]
    generate.main(["--run-dir", str(path), "--prompt", "the cat", "--temperature", "0", "--max-tokens", "12"])
    assert capsys.readouterr().out == "the cat" + tokenizer.decode(want, skip_special_tokens=True) + "\n"


def test_the_end_of_a_text_is_what_the_tokenizer_says(folder: Path, tmp_path: Path) -> None:
    """Not all families use a name that is known."""
    backend = Tokenizer(models.WordLevel({"a": 0, "<｜end▁of▁sentence｜>": 1}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    for content in ("<｜end▁of▁sentence｜>", {"content": "<｜end▁of▁sentence｜>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": content}))
        found = load_tokenizer(str(tmp_path))
        assert (found.end_of_document, found.vocab_size) == (1, 2)
    for broken in ('{"eos_token": 3}', '{"eos_token": "unknown"}'):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(ValueError, match="which token ends a document is unknown .*; set data.end_of_document"):
            load_tokenizer(str(tmp_path))
        assert load_tokenizer(str(tmp_path), "<｜end▁of▁sentence｜>").end_of_document == 1
