"""Compares the operations per token with counts by hand and by torch, and checks what a run records of its speed."""

from __future__ import annotations

import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from equimoe.launch.recipes import RECIPES
from equimoe.moe.config import AttentionConfig
from equimoe.moe.observe.speed import PEAK_FLOPS, forward_flops, memory_in_use, peak_flops, speed_record, step_flops
from equimoe.moe.parallel import build_mesh
from equimoe.moe.train import trainer
from equimoe.moe.train.build import build_model
from equimoe.moe.train.config import ModelConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small
from tests.helpers.fork import run_ranks

BYTES = 257  # the vocabulary of bytes

#: recipe -> operations per token of a training step, counted by hand: 6 per weight that a token meets, and 6 per
#: channel of a query or value and position it sees, (S + 1) / 2 on average
BY_HAND = {
    # attention 4 * 192 * 192, scores 6 heads of 32 over 256, router, 2 of 8 experts of 192, head
    "quickstart": 6 * (4 * (4 * 192 * 192 + 128.5 * (192 + 192) + 192 * 8 + 2 * 3 * 192 * 192) + 192 * BYTES),
    # attention 4 * 512 * 512, scores 8 heads of 64 over 1024, router, 2 of 8 experts of 1536, head
    "mixtral": 6 * (8 * (4 * 512 * 512 + 512.5 * (512 + 512) + 512 * 8 + 2 * 3 * 512 * 1536) + 512 * BYTES),
    "deepseek_v3": 6
    * (
        61
        * (
            7168 * 1536 + 1536 * 128 * 192  # queries, through their latent
            + 7168 * (512 + 64) + 512 * 128 * (128 + 128)  # keys and values, through theirs
            + 128 * 128 * 7168  # output
            + 2048.5 * 128 * (192 + 128)  # scores, and sums of values
        )
        + 3 * 3 * 7168 * 18432  # dense feed-forwards
        + 58 * (7168 * 256 + (8 + 1) * 3 * 7168 * 2048)  # router, 8 routed experts and a shared one
        + 7168 * 129280  # head
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_operations_of_recipes_agree_with_a_count_by_hand(name: str) -> None:
    config = RECIPES[name]()
    with torch.device("meta"):
        model = build_model(config, config.model.vocab_size or load_tokenizer("bytes").vocab_size)
    assert step_flops(model) == pytest.approx(BY_HAND[name], rel=0.01)


def test_deepseeks_operations_are_as_published() -> None:
    """37 billion active parameters, of which the embedding computes nothing: about 250 GFLOP per token."""
    assert 240e9 < BY_HAND["deepseek_v3"] < 260e9


ATTENTIONS = {
    "multi-head": AttentionConfig(),
    "grouped": AttentionConfig(num_kv_heads=1),
    "latent": AttentionConfig(
        kind="latent", q_lora_rank=24, kv_lora_rank=16, qk_nope_width=16, qk_rope_width=8, v_width=12
    ),
    "window": AttentionConfig(window=5),
}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_operations_agree_with_torchs_counter(kind: str) -> None:
    """Of a dense and three MoE blocks with shared experts. Torch counts all pairs of positions, hidden or not."""
    length, sequences = 32, 3
    moe = replace(
        small.CONFIG.moe,
        hidden_size=32,
        intermediate_size=20,
        shared_intermediate_size=24,
        shared_gate=True,
        backend="reference",
    )
    config = replace(
        small.CONFIG,
        attention=ATTENTIONS[kind],
        moe=moe,
        data=replace(small.CONFIG.data, seq_len=length),
        model=ModelConfig(num_layers=4, num_heads=2, intermediate_size=48, dense_layers=1),
    )
    model = build_model(config, 100)
    ids_BS = torch.randint(0, 100, (sequences, length))
    with FlopCounterMode(display=False) as forward, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(ids_BS)
    with FlopCounterMode(display=False) as whole, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(ids_BS).flatten(0, 1), ids_BS.flatten()).backward()
    parts, tokens = forward_flops(model), sequences * length
    hidden = torch.ones(length, length).tril().triu(1 - (config.attention.window or length)).eq(0).sum().item()
    width = 2 * (24 + 12 if kind == "latent" else 32)  # of all heads' queries and values
    parts["attention"] += 4 * 2 * width * hidden / length
    assert forward.get_total_flops() / tokens == pytest.approx(sum(parts.values()), rel=1e-9)
    assert whole.get_total_flops() / tokens == pytest.approx(3 * sum(parts.values()), rel=1e-9)


def test_hidden_pairs_count_only_where_a_kernel_computes_them() -> None:
    config = replace(small.CONFIG, attention=AttentionConfig(window=4))
    model, plain = build_model(config, 100), build_model(small.CONFIG, 100)
    seen = sum(min(i + 1, 4) for i in range(16))
    layers, width = 2, 2 * 16
    more = [forward_flops(model, masked)["attention"] - forward_flops(plain)["attention"] for masked in (False, True)]
    assert more == [layers * 2 * width * (pairs - 136) / 16 for pairs in (seen, 256)]


def test_speed_of_a_device() -> None:
    assert speed_record(8000.0, 4, 2e9, None) == {
        "tokens_per_s": 8000.0, "tokens_per_s_per_device": 2000.0, "tflops_per_device": 4.0,
    }  # fmt: skip
    assert speed_record(8000.0, 4, 2e9, 16e12)["mfu"] == 0.25


def test_the_peak_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in {**PEAK_FLOPS, "NVIDIA of tomorrow": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak


def test_memory_of_a_process_and_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    page = resource.getpagesize()
    with monkeypatch.context() as told:
        told.setattr(Path, "read_text", lambda _: "9000 500 30 1 0 200 0\n")
        assert memory_in_use(cpu) == 500 * page
    with monkeypatch.context() as untold:
        untold.setattr(Path, "read_text", Mock(side_effect=FileNotFoundError("/proc/self/statm")))
        unit = 1 if sys.platform == "darwin" else 1024
        assert memory_in_use(cpu) == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, rel=0.01)
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 123)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    assert memory_in_use(cuda) == 123 and len(calls) == 1


def test_a_run_records_its_speed_and_memory(tmp_path: Path) -> None:
    config = small.on(small.write_texts(tmp_path))
    trainer = Trainer(config, load_corpus(config.data, load_tokenizer("bytes")), None, torch.device("cpu"))
    flops = step_flops(trainer.model)
    described = trainer.describe({})
    assert described["flops_per_token"] == flops and described["peak_flops"] is None
    found = trainer.speed(1000.0)
    assert 50 << 20 < found["memory_bytes"] < 8 << 30
    assert found["tflops_per_device"] == pytest.approx(flops * 1000 / 1e12)


def test_memory_is_that_of_the_rank_with_the_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small.on(small.write_texts(tmp_path))

    def script(rank: int, world: int) -> float:
        monkeypatch.setattr(trainer, "memory_in_use", lambda _: (7, 9)[rank])
        corpus = load_corpus(config.data, load_tokenizer("bytes"))
        return Trainer(config, corpus, build_mesh(config.parallel), torch.device("cpu")).speed(8.0)["memory_bytes"]

    assert run_ranks(script, 2) == [9, 9]
