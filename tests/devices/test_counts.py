"""Holds how often a layer and a training step launch kernels, exchange, copy, and make the host wait, on a GPU.

``pytest -s`` prints the counts, for the table in benchmarks/NOTES.md.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from equimoe.moe import CapacityConfig, MoE, MoEConfig, Step
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small
from tests.helpers.fake_cuda import Watch, needs_fake_cuda, on_fake_cuda, real_tensors

pytestmark = needs_fake_cuda

T, D = 4096, 512
LAYER = MoEConfig(hidden_size=D, intermediate_size=1024, num_experts=16, top_k=2)
LAYERS = {"dropless": LAYER, "capacity": replace(LAYER, capacity=CapacityConfig())}
JUDGE, RECORD, EVALUATE = "moe/train/judge.py:__call__", "moe/train/trainer.py:record", "moe/train/evaluate.py:evaluate"


def of_layer(config: MoEConfig) -> dict[str, dict[str, Any]]:
    """Count an evaluation, and a training micro-batch, of a bf16 layer."""
    torch.set_default_dtype(torch.bfloat16)  # fake modules cannot be converted
    with torch.device("cuda"):
        layer, x = MoE(config), torch.randn(T, D, requires_grad=True)
    torch.set_default_dtype(torch.float32)
    step, found = Step.of(layer), {}
    with Watch() as watch:
        for _ in range(2):  # tables move to the device once
            with torch.no_grad():
                layer.eval()(x)
            found["evaluation"] = watch.counts()
            with step.micro_batch():
                layer.train()(x).backward(torch.empty_like(x))
            found["training"] = watch.counts()
    return found


def of_run(config: Any) -> dict[str, dict[str, Any]]:
    """Count the parts of a run after the first step, which creates the optimizer's moments."""
    with real_tensors():
        corpus = load_corpus(config.data, load_tokenizer("bytes"))
    trainer, found = Trainer(config, corpus, None, torch.device("cuda", 0)), {}
    with Watch() as watch:
        for _ in range(2):
            norm = trainer.train_step()
        trainer.record(norm)
        watch.counts()
        trainer.train_step(observed=False)
        found["step"] = watch.counts()
        norm = trainer.train_step()
        watch.counts()
        trainer.record(norm)
        trainer.speed(1.0)
        found["record"] = watch.counts()
        with suppress(DataDependentOutputException, DynamicOutputShapeException):  # reads what is on the host by then
            trainer.evaluate()
        found["evaluation"] = watch.counts()
    return found


def show(title: str, found: dict[str, dict[str, Any]]) -> None:
    for name, counts in found.items():
        said = ", ".join(f"{key} {len(v) if isinstance(v, list) else v}" for key, v in counts.items())
        print(f"\n{title}, {name}: {said}", end="")


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str) -> None:
    """Without a wait, no size depends on values: fake tensors have none. So a CUDA graph can hold the forward."""
    found = on_fake_cuda(lambda: of_layer(LAYERS[name]))
    show(name, found)
    limits = {"dropless": (14, 54), "capacity": (36, 76)}[name]
    for (part, counts), kernels in zip(found.items(), limits, strict=True):
        assert counts["kernels"] <= kernels, (part, counts)
        assert not any(counts[seen] for seen in ("waits", "copies", "sent", "exchanges", "mixed")), (part, counts)


def test_a_run(tmp_path: Path) -> None:
    """A step waits once, for what decides about its update; so do a record of all layers, and an evaluation."""
    model = replace(small.CONFIG.model, recompute=True)
    config = small.on(small.write_texts(tmp_path), dtype="bfloat16", model=model)
    found = on_fake_cuda(lambda: of_run(config), timeout=120)
    show("run", found)
    assert {part: counts["waits"] for part, counts in found.items()} == {
        "step": [JUDGE],
        "record": [RECORD],
        "evaluation": [EVALUATE],
    }
    assert all(counts["copies"] == counts["mixed"] == [] for counts in found.values()), found
    assert found["step"]["kernels"] <= 2200 and found["record"]["kernels"] <= 400
