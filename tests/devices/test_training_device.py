"""Checks training on one GPU: where the loop waits, and where a resumed run's optimizer state is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small
from tests.helpers.fake_cuda import Watch, needs_fake_cuda, on_fake_cuda, real_tensors

pytestmark = needs_fake_cuda


@pytest.fixture
def trainer_of(tmp_path: Path) -> Any:
    def make(**changes: object) -> Trainer:
        config = small.on(small.write_texts(tmp_path / "texts"), **changes)
        with real_tensors():
            corpus = load_corpus(config.data, load_tokenizer("bytes"))
        return Trainer(config, corpus, None, torch.device("cuda", 0))

    return make


def test_a_training_step_waits_for_its_decision_alone(trainer_of: Any) -> None:
    """A step waits once, to decide whether to update the weights. Its inputs are copied from pinned memory."""

    def body() -> dict[str, Any]:
        trainer = trainer_of(dtype="bfloat16", model=replace(small.CONFIG.model, recompute=True))
        with Watch() as watch:
            trainer.train_step(observed=False)  # created once: the optimizer's moments
            watch.waits.clear(), watch.copies.clear()
            trainer.train_step(observed=False)
        moments = [t for name, t in trainer.state().items() if name.startswith("optimizer.")]
        left = {str(t.device) for t in (*moments, *trainer.model.parameters(), *trainer.model.buffers())}
        return {"waits": watch.waits, "copies": watch.copies, "mixed": watch.mixed, "left on": left}

    expected = {"waits": ["moe/train/judge.py:__call__"], "copies": [], "mixed": [], "left on": {"cuda:0"}}
    assert on_fake_cuda(body) == expected


def test_a_resumed_optimizer_is_on_the_device(trainer_of: Any) -> None:
    """Resuming fills the tensors of a run that has not stepped yet; a fused AdamW needs all of them on the device."""

    def body() -> dict[str, Any]:
        trainer = trainer_of()
        state = {name: t for name, t in trainer.state().items() if not name.startswith("generator.")}
        with Watch() as watch:
            trainer.train_step(observed=False)
        return {"mixed": watch.mixed, "left on": {str(t.device) for t in state.values()}}

    assert on_fake_cuda(body) == {"mixed": [], "left on": {"cuda:0"}}
