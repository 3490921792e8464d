"""Dense models of transformers that are grown into MoE models, and written for transformers again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("transformers")

from equimoe.launch import initial, loaded  # noqa: E402
from equimoe.launch.convert import main as convert  # noqa: E402
from equimoe.launch.options import parse  # noqa: E402
from equimoe.launch.upcycle import main as upcycle  # noqa: E402
from tests.helpers.command import launch  # noqa: E402
from tests.helpers.hf_models import VOCABULARY, build  # noqa: E402
from tests.helpers.small import write_texts  # noqa: E402

pytestmark = pytest.mark.engines

LENGTH = 12
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]}
#: (dense model, settings, options, family that the grown model has)
GROWN: list[tuple[str, dict[str, Any], list[str], str]] = [
    ("llama", {"num_key_value_heads": 1}, [], "mixtral"),
    ("llama", {"tie_word_embeddings": True}, ["--moe-every", "2"], "qwen2_moe"),
    ("mistral", {}, [], "mixtral"),
    ("dense qwen2", WINDOWS, ["--experts", "4"], "qwen2_moe"),
    ("dense qwen2", {"tie_word_embeddings": True}, ["--dense-layers", "1"], "qwen2_moe"),
    ("dense qwen3", {"num_key_value_heads": 1}, ["--dense-layers", "1"], "qwen3_moe"),
    ("dense qwen3", {"attention_bias": True}, ["--method", "fine"], "qwen3_moe"),
]


def tokens() -> Tensor:
    return torch.randint(1, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def dense(folder: Path, family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Save a dense model in a folder, and return it."""
    model = build(family, **settings).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.3)
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    return model.eval()


@pytest.mark.parametrize(("family", "settings", "options", "kind"), GROWN, ids=range(len(GROWN)))
def test_logits_are_those_of_the_dense_model(
    family: str, settings: dict[str, Any], options: list[str], kind: str, tmp_path: Path
) -> None:
    """Of the grown model here, and of what is exported to transformers, with the dense model's small files."""
    import transformers

    model = dense(tmp_path / "dense", family, **settings)
    upcycle([str(tmp_path / "dense"), "--out", str(tmp_path / "grown"), "--method", "sparse", *options])
    with torch.no_grad():
        wanted = model(tokens()).logits
        grown = loaded.build(loaded.find(tmp_path / "grown"), None, torch.device("cpu"), LENGTH, torch.float32)
        torch.testing.assert_close(grown(tokens()), wanted, atol=1e-5, rtol=1e-5)
        convert(["export", str(tmp_path / "grown"), "--out", str(tmp_path / "moe")])
        theirs, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
        torch.testing.assert_close(theirs(tokens()).logits, wanted, atol=1e-5, rtol=1e-5)
    assert not any(found.values())
    assert theirs.config.model_type == kind and theirs.config.max_position_embeddings == 64
    for file in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "moe" / file).read_bytes() == (tmp_path / "dense" / file).read_bytes()
    again = initial.weights(tmp_path / "moe").architecture
    assert again == initial.weights(tmp_path / "grown").architecture


def test_a_model_that_transformers_does_not_have_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When it is made, and not only when it has been trained and is exported."""
    how = ["--method", "sparse", "--experts", "1", "--top-k", "1"]
    for name, bias, announced in (("without", False, False), ("with", True, True)):
        dense(tmp_path / name, "llama", attention_bias=bias)
        upcycle([str(tmp_path / name), "--out", str(tmp_path / f"{name} grown"), *how])
        printed = capsys.readouterr().out
        note = "note: convert export cannot write it: no model of transformers computes as this checkpoint's; the"
        assert (note in printed) == announced and ": 1 expert of width 24, 1 per token" in printed


def train(folder: Path, model: str, *options: str) -> str:
    """Train ``model`` in ``folder`` for two steps on two ranks; return what the first one prints."""
    argv = ["--init.from", str(folder / model), "--run-dir", str(folder / "run"), "--steps", "2", *options]
    argv += ["--data.path", str(write_texts(folder / "texts")), "--data.seq_len", "16", "--data.global_batch", "16"]
    argv += ["--log.eval_sequences", "1", "--log.trackers", "none"]
    assert (ended := launch(argv, 2, timeout=120)).codes == [0, 0], ended.err
    return ended.out[0]


def test_the_grown_model_is_trained_and_exported_in_the_dense_models_dtype(tmp_path: Path) -> None:
    import transformers

    dense(tmp_path / "dense", "dense qwen3", torch.bfloat16, vocab_size=300)
    upcycle([str(tmp_path / "dense"), "--out", str(tmp_path / "grown"), "--method", "drop", "--experts", "4"])
    train(tmp_path, "grown", "--parallel.ep", "2")
    convert(["export", str(tmp_path / "run"), "--out", str(tmp_path / "moe")])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert model.dtype == torch.bfloat16 and model.config.num_experts == 4
    assert (tmp_path / "moe" / "tokenizer_config.json").exists()


def test_a_run_trains_a_dense_model(tmp_path: Path) -> None:
    """Without growing it; the export is a dense model too."""
    before = dense(tmp_path / "dense", "llama", vocab_size=300).state_dict()
    found = parse(["--init.from", str(tmp_path / "dense")]).config
    assert found.model.moe_every == 0 and found.model.intermediate_size == 24
    assert "\nno MoE layer; 2 ranks (ddp, tp 2" in train(tmp_path, "dense", "--parallel.tp", "2")
    convert(["export", str(tmp_path / "run"), "--out", str(tmp_path / "back")])
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llama"
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
