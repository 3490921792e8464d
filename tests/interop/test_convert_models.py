"""Models of transformers and this package's decoder with their weights: files, logits, gradients and training steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("transformers")

from equimoe.launch.convert import main as convert  # noqa: E402
from equimoe.launch.options import parse  # noqa: E402
from equimoe.moe import checkpoint  # noqa: E402
from equimoe.moe.engines import Batch, build_engine  # noqa: E402
from equimoe.moe.interop.convert import weights_of  # noqa: E402
from equimoe.moe.interop.families import FAMILIES, read_config  # noqa: E402
from equimoe.moe.interop.names import names  # noqa: E402
from equimoe.moe.train.build import build_model  # noqa: E402
from tests.helpers import oracle  # noqa: E402
from tests.helpers.hf_folders import assert_same, read  # noqa: E402
from tests.helpers.hf_models import VOCABULARY, build  # noqa: E402

pytestmark = pytest.mark.engines

LENGTH = 24
_ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_parameters": _ROPE | {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.8}}
LLAMA3 = {"rope_parameters": _ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}}
LINEAR = {"rope_parameters": _ROPE | {"rope_type": "linear"}}
KINDS = {"layer_types": ["full_attention", "sliding_attention"]}
#: (family or a variant of it, settings)
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"num_key_value_heads": 1, "sliding_window": 4}),
    ("mixtral gelu", LLAMA3),
    ("mixtral", YARN | {"head_dim": 12}),
    ("qwen2", LINEAR),
    ("qwen2", {"num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 5} | KINDS),
    ("qwen2", {"qkv_bias": False, "mlp_only_layers": [0]}),
    ("qwen3", YARN | {"attention_bias": True}),
    ("qwen3 plain", {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 3}),
    ("olmoe", {"num_key_value_heads": 1}),
    ("olmoe", LINEAR | {"attention_bias": True, "tie_word_embeddings": True, "norm_topk_prob": True}),
    ("deepseek v2", YARN),
    ("deepseek v2 lite", {"q_lora_rank": None}),
    ("deepseek v3", YARN | {"attention_bias": True}),
    ("llama", LLAMA3 | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "head_dim": 12}),
    ("mistral", {"num_key_value_heads": 1}),
    ("dense qwen2", YARN),
    ("dense qwen2", {"use_sliding_window": True, "sliding_window": 5} | KINDS),
    ("dense qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    ("deepseek v3 plain", {"first_k_dense_replace": 0, "q_lora_rank": None, "tie_word_embeddings": True}),
]
IDS = [f"{family} {number}" for number, (family, _) in enumerate(MODELS)]


def tokens(*shape: int) -> Tensor:
    """Return token ids without that of padding, for which transformers trains no embedding."""
    return torch.randint(1, VOCABULARY, shape)


def saved(folder: Path, family: str, v4: bool = True, **settings: Any) -> Any:
    """Save a model in a folder, and return it."""
    model = build(family, **settings)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.3)
            elif "norm" in name:
                p.uniform_(0.5, 1.5)
    model.save_pretrained(folder, save_original_format=v4)
    return model


def decoder_of(folder: Path, *options: str) -> tuple[Any, Any]:
    """Return the decoder with the weights of a folder, and the configuration of its run."""
    argv = ["--init.from", str(folder), "--data.seq_len", str(LENGTH), "--moe.balance.coefficient", "0", *options]
    config = parse(argv).config
    model = build_model(config, VOCABULARY)
    source = weights_of(folder)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    if config.model.tie_embeddings:
        del state["model.head.weight"]
    checkpoint.load_weights(source.path, state, source.tensors, source.opened)
    return model, config


def as_ours(folder: Path, theirs: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of transformers, in the layout of version 5, in the order and with the names of the decoder."""
    kind, found = read_config(json.loads((folder / "config.json").read_text()), "config.json")
    for name, tensor in names(FAMILIES[kind], found, "v5").items():
        if name.endswith("bias_E"):
            continue
        rows = []
        for part in tensor.parts:
            own = theirs[part.name][part.row : part.row + part.sizes[0]]
            rows.append(torch.cat((own[0::2], own[1::2])) if part.interleaved else own)
        yield name, torch.cat(rows)


@pytest.mark.parametrize(("family", "settings"), MODELS, ids=IDS)
def test_logits_and_gradients(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(tmp_path / "model", family, **settings)
    ours, _ = decoder_of(tmp_path / "model")
    ids = tokens(2, LENGTH + 1)
    logits = (ours(ids[:, :-1]), theirs(ids[:, :-1]).logits)
    assert oracle.relative_error(*logits) < 1e-5
    for found in logits:
        F.cross_entropy(found.flatten(0, 1), ids[:, 1:].flatten()).backward()
    want = dict(as_ours(tmp_path / "model", {name: p.grad for name, p in theirs.named_parameters()}))
    for name, p in ours.named_parameters():
        assert p.grad is not None
        assert oracle.relative_error(p.grad, want[name]) < 1e-4, name


@pytest.mark.parametrize("v4", [True, False])
@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2", "qwen3", "olmoe", "deepseek v2", "deepseek v3", "llama", "dense qwen2"]
)
def test_there_and_back(family: str, v4: bool, tmp_path: Path) -> None:
    """Both layouts are those that transformers writes, and it loads what comes back, with a tokenizer's files."""
    import transformers

    theirs = saved(tmp_path / "model", family, v4).bfloat16()
    theirs.save_pretrained(tmp_path / "model", save_original_format=v4, max_shard_size="10KB")
    (tmp_path / "model" / "model.safetensors").unlink(missing_ok=True)
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    convert(["import", str(tmp_path / "model"), "--out", str(tmp_path / "ours")])
    convert(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "back")])
    assert_same(read(tmp_path / "back"), read(tmp_path / "model"))
    for file in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    again, first = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("back", "model")
    )
    assert again.dtype == torch.bfloat16
    assert_same(again.state_dict(), first.state_dict())
    ids = tokens(1, 4)
    assert torch.equal(again.generate(ids, max_new_tokens=5), first.generate(ids, max_new_tokens=5))


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2", "qwen3", "olmoe", "deepseek v2", "deepseek v3", "llama", "dense qwen3"]
)
def test_training_goes_on_as_in_transformers(family: str, tmp_path: Path) -> None:
    """Ten steps of AdamW on the same data, without a balance loss, have the same losses."""
    theirs = saved(tmp_path / "model", family)
    how = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, config = decoder_of(tmp_path / "model")
    for layer in ours.moe_layers():
        if layer.router.bias_E is not None:
            assert layer.router.bias_E.abs().sum() > 0
    engine = build_engine(ours, None, lambda p: torch.optim.AdamW(p.values(), **how), max_norm=1.0)
    optimizer = torch.optim.AdamW(theirs.parameters(), **how)
    biases = [layer.router.bias_E.clone() for layer in ours.moe_layers() if layer.router.bias_E is not None]
    found: list[list[float]] = [[], []]
    for _ in range(10):
        ids = tokens(4, LENGTH + 1)
        losses = engine.step([Batch(ids[:, :-1], ids[:, 1:])], lr=how["lr"]).losses
        found[0].append(float(torch.stack(list(losses)).mean()))
        for layer, bias in zip([m for m in ours.moe_layers() if m.router.bias_E is not None], biases, strict=True):
            layer.router.bias_E.copy_(bias)  # transformers does not move it
        logits = theirs(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found[1].append(loss.item())
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[1][-1] != pytest.approx(found[1][0], abs=1e-2)  # the weights have moved
