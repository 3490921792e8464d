"""Channels divided among domains: which are kept, where they go, and that all of them give the dense model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from equimoe.launch import initial
from equimoe.launch.upcycle import main as upcycle
from equimoe.moe import MoEConfig
from equimoe.moe.interop.domains import (
    Divided,
    distillation_loss,
    divide,
    divided,
    domain_masks,
    mean_activity,
    soft_targets,
    watch_channels,
)
from equimoe.moe.model import Decoder
from tests.helpers.grown import HIDDEN, LAYERS, LENGTH, VOCABULARY, WIDTH, logits, tensors, write
from tests.helpers.small import write_texts

LAYER = "model.blocks.1.mlp."


def decoder(moe_every: int = 0) -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "seq_len": LENGTH, "num_layers": LAYERS, "num_heads": 2}
    return Decoder(**sizes, intermediate_size=WIDTH, moe=MoEConfig(HIDDEN, 12, 4, 2), moe_every=moe_every)


def feed_forward(weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
    gate, up, down = weights
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def dense_weights(found: dict[str, Tensor], prefix: str = LAYER) -> tuple[Tensor, ...]:
    return tuple(found[f"{prefix}{kind}_proj.weight"] for kind in ("gate", "up", "down"))


def test_activity_is_the_mean_magnitude_of_the_channels() -> None:
    model, ids = decoder(), torch.randint(VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    whole = mean_activity(model, [ids])
    assert whole.shape == (LAYERS, WIDTH)
    torch.testing.assert_close(mean_activity(model, [ids[:1], ids[1:]]), whole)
    block = model.blocks["0"]
    x = block.mlp_norm(model.embedding(ids) + block.attention(block.attention_norm(model.embedding(ids))))
    channels = F.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)
    torch.testing.assert_close(whole[0], channels.abs().double().mean((0, 1)), atol=1e-9, rtol=1e-5)


def test_a_domain_keeps_its_most_active_channels() -> None:
    activity = torch.tensor([[[3.0, 1.0, 2.0, 0.0]], [[0.0, 1.0, 2.0, 3.0]]])
    masks = domain_masks(activity, 0.5)
    assert masks.tolist() == [[[True, False, True, False]], [[False, False, True, True]]]
    for keep in (0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"--keep-channels=.*: must be at most 1"):
            domain_masks(activity, keep)


def test_all_channels_give_the_dense_model(tmp_path: Path) -> None:
    source = write(tmp_path / "dense")
    divide(initial.weights(source), torch.ones(3, LAYERS, WIDTH, dtype=torch.bool), tmp_path / "moe")
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(source), atol=1e-5, rtol=1e-5)


def test_experts_have_the_channels_of_their_domains(tmp_path: Path) -> None:
    """The sum of the shared expert and two domains' experts is the feed-forward of all channels that they keep."""
    source, x = write(tmp_path / "dense"), torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    masks = domain_masks(torch.rand(2, LAYERS, WIDTH, generator=draw), 0.7)
    divide(initial.weights(source), masks, tmp_path / "moe", files=3)
    old, new = tensors(source), tensors(tmp_path / "moe")
    for block in range(LAYERS):
        prefix = f"model.blocks.{block}.mlp."
        gate, up = new[f"{prefix}experts.gate_up_proj"].chunk(2, dim=1)
        down = new[f"{prefix}experts.down_proj"]
        experts = [feed_forward((gate[e], up[e], down[e]), x) for e in range(2)]
        shared = feed_forward(dense_weights(new, f"{prefix}shared.mlp."), x)
        dense_gate, dense_up, dense_down = dense_weights(old, prefix)
        for domain in range(2):
            kept = masks[domain, block]
            wanted = feed_forward((dense_gate[kept], dense_up[kept], dense_down[:, kept]), x)
            torch.testing.assert_close(shared + experts[domain], wanted, atol=1e-5, rtol=1e-4)
        kept = masks[:, block].any(0)
        wanted = feed_forward((dense_gate[kept], dense_up[kept], dense_down[:, kept]), x)
        torch.testing.assert_close(shared + sum(experts), wanted, atol=1e-5, rtol=1e-4)
    for name in old:
        assert ".mlp." in name or torch.equal(new[name], old[name])


def test_any_box_has_the_same_values(tmp_path: Path) -> None:
    source = initial.weights(write(tmp_path / "dense"))
    masks = domain_masks(torch.rand(3, LAYERS, WIDTH, generator=torch.Generator().manual_seed(1)), 0.6)
    divide(source, masks, tmp_path / "moe")
    whole = tensors(tmp_path / "moe")
    with source.reader() as reader:
        values = Divided(reader, masks, divided(source.architecture, masks, 2), 0)
        for name, entry in values.wanted.items():
            offsets, sizes = tuple(n // 3 for n in entry.shape), tuple(max(1, n // 2) for n in entry.shape)
            part = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            assert torch.equal(values.box(name, offsets, sizes), whole[name][part]), name


def test_soft_targets_prefer_the_domain_whose_channels_are_active() -> None:
    model, ids = decoder(), torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with watch_channels(model) as seen:
        model(ids)
    masks = domain_masks(torch.rand(3, LAYERS, WIDTH, generator=torch.Generator().manual_seed(1)), 0.5)
    targets = soft_targets(seen, masks)
    share = torch.cat(seen, -1) @ masks.flatten(1).float().T
    assert torch.equal(targets.argmax(-1), share.argmax(-1))
    torch.testing.assert_close(targets.sum(-1), torch.ones(2, LENGTH))
    right, wrong = targets.log() + 3 * F.one_hot(torch.tensor([0, 1]), 3)[:, None], -targets.log()
    domains = torch.tensor([0, 1])
    assert distillation_loss(right, domains, targets) < distillation_loss(wrong, domains, targets)


def test_the_command_measures_text_by_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, texts = write(tmp_path / "dense"), write_texts(tmp_path / "texts")
    options = ["--method", "read-me", "--data", str(texts), "--tokenizer", "bytes", "--tokens", "300"]
    upcycle([str(source), "--out", str(tmp_path / "moe"), *options, "--keep-channels", "0.5"])
    assert "channels of one domain: domain0 " in capsys.readouterr().out
    assert logits(tmp_path / "moe").isfinite().all()
    found = initial.weights(tmp_path / "moe").architecture.moe
    assert found.num_experts == 3 and found.intermediate_size + found.shared_intermediate_size <= WIDTH
    for wrong, message in (
        (["--keep-channels", "0"], "--keep-channels=0.0: must be at most 1"),
        (["--top-k", "4"], "--top-k=4: must be between 1 and the number of domains, 3"),
        (["--tokens", "0"], "--tokens=0: must be at least 1"),
        (["--data", "none"], "--data='none': does not exist or is not accessible; give a file or folder\n"),
    ):
        with pytest.raises(SystemExit):
            upcycle([str(source), "--out", str(tmp_path / "wrong"), *options, *wrong])
        assert message in capsys.readouterr().err and not (tmp_path / "wrong").exists()
    with pytest.raises(SystemExit):
        upcycle([str(source), "--out", str(tmp_path / "wrong"), "--method", "read-me"])
    assert "--data: is missing" in capsys.readouterr().err
