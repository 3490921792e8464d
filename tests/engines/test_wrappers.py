"""Accelerate, Lightning and the Trainer around a user's model: counting ahead, accumulation, gradient scalers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("accelerate", reason="needs Accelerate, which `make engines` installs")
pytest.importorskip("lightning", reason="needs Lightning, which `make engines` installs")
pytest.importorskip("transformers", reason="needs Transformers, which `make engines` installs")
pytestmark = pytest.mark.engines

import lightning  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer  # noqa: E402

from equimoe.moe import BalanceConfig, MoE, MoEConfig, counting_pass, use_gradient_scaler  # noqa: E402
from tests.helpers import oracle  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.trainer import arguments  # noqa: E402

STEPS, MICRO_BATCHES, WORLD, RATE = 3, 2, 2, 0.01
REFUSED = r"^GradScaler: .*call equimoe.moe.use_gradient_scaler\(model, scaler\)"


class Model(nn.Module):
    def __init__(self, estimator: Any = "exact", micro_batches: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        balance = BalanceConfig(coefficient=0.5, estimator=estimator, micro_batches=micro_batches)
        moe = MoE(MoEConfig(8, 8, 8, 2, init_std=0.6, balance=balance))
        self.layers = nn.Sequential(nn.Linear(8, 8), moe, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers(x).square().mean()}


def tokens(step: int, m: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * m + rank)
    return torch.randn(2, 6, 8, generator=generator) + 2 * torch.randn(8, generator=generator)


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


def alone(world: int, estimator: Any = "exact") -> list[Tensor]:
    """The weights of one process without a scaler. ``exact``: it holds the whole step at once."""
    model = Model(estimator, None if estimator == "exact" else MICRO_BATCHES)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        batches = [torch.cat([tokens(step, m, rank) for rank in range(world)]) for m in range(MICRO_BATCHES)]
        for x in [torch.cat(batches)] if estimator == "exact" else batches:
            loss = model(x)["loss"]
            (loss if estimator == "exact" else loss / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def assert_equal(found: list[Tensor], right: list[Tensor]) -> None:
    for value, expected in zip(found, right, strict=True):
        assert oracle.relative_error(value, expected) < 1e-6


def accelerated(rank: int, world: int, scaled: bool, known: bool = True) -> list[Tensor]:
    """Accelerate's own accumulation; its gradient scaler is set by hand, because it refuses fp16 on a CPU."""
    warnings.simplefilter("ignore")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    accelerator.scaler = scaler() if scaled else None
    original = Model()
    model, optimizer = accelerator.prepare(original, torch.optim.SGD(original.parameters(), lr=RATE))
    if scaled and known:
        use_gradient_scaler(model, accelerator.scaler)
    for step in range(STEPS):
        with counting_pass():
            for m in range(MICRO_BATCHES):
                model(tokens(step, m, rank))
        for m in range(MICRO_BATCHES):
            with accelerator.accumulate(model):
                accelerator.backward(model(tokens(step, m, rank))["loss"])
                optimizer.step()
                optimizer.zero_grad()
    return [p.detach() for p in original.parameters()]


@pytest.mark.parametrize("scaled", [False, True])
def test_accelerate(scaled: bool) -> None:
    for found in run_ranks(accelerated, WORLD, scaled):
        assert_equal(found, alone(WORLD))


def test_accelerates_scaler_is_refused_if_unknown() -> None:
    with pytest.raises(AssertionError, match="ValueError: " + REFUSED.lstrip("^")):
        run_ranks(accelerated, WORLD, True, False)


class Lit(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model("rolling", MICRO_BATCHES)

    def training_step(self, x: Tensor, number: int) -> Tensor:
        return self.model(x)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def fit(folder: Path, scaler: torch.amp.GradScaler | None, known: bool = True) -> list[Tensor]:
    model = Lit()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=MICRO_BATCHES,
        plugins=[] if scaler is None else [MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    if scaler is not None:
        trainer.precision_plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        if known:
            use_gradient_scaler(model, scaler)
    batches = [tokens(step, m, 0) for step in range(STEPS) for m in range(MICRO_BATCHES)]
    trainer.fit(model, DataLoader(batches, batch_size=None))
    return [p.detach() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scaled", [False, True])
def test_lightning(scaled: bool, tmp_path: Path) -> None:
    assert_equal(fit(tmp_path, scaler() if scaled else None), alone(1, "rolling"))


@pytest.mark.filterwarnings("ignore")
def test_lightnings_scaler_is_refused_if_unknown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        fit(tmp_path, scaler(), known=False)


#: the settings of the Trainer for the steps of this file
CPU = {"max_grad_norm": 0.0, "use_cpu": True}


def trained(folder: Path, scaler: torch.amp.GradScaler | None) -> list[Tensor]:
    model = Model("rolling", MICRO_BATCHES)
    data = [{"x": x} for step in range(STEPS) for m in range(MICRO_BATCHES) for x in tokens(step, m, 0)]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    trainer = Trainer(
        model, arguments(folder, STEPS, MICRO_BATCHES, **CPU), train_dataset=data, optimizers=(optimizer, None)
    )
    if scaler is not None:
        trainer.accelerator.scaler = scaler
        use_gradient_scaler(model, scaler)
    trainer.train()
    return [p.detach() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scaled", [False, True])
def test_the_trainer(scaled: bool, tmp_path: Path) -> None:
    assert_equal(trained(tmp_path, scaler() if scaled else None), alone(1, "rolling"))


def llama() -> nn.Module:
    """A model of Transformers' whose feed-forwards are experts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, use_cache=False, **sizes))
    balance = BalanceConfig(coefficient=0.5, micro_batches=MICRO_BATCHES)
    for block in model.model.layers:
        block.mlp = MoE(MoEConfig(16, 16, 4, 2, init_std=0.5, balance=balance))
    return model


def ids(step: int, m: int, rank: int) -> Tensor:
    return torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(100 * step + 10 * m + rank))


def llama_alone(world: int) -> list[Tensor]:
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        for m in range(MICRO_BATCHES):
            x = torch.cat([ids(step, m, rank) for rank in range(world)])
            (model(x, labels=x).loss / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def llama_trained(rank: int, world: int, folder: Path, reentrant: bool) -> list[Tensor]:
    warnings.simplefilter("ignore")
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model, batches = (
        llama(),
        [(step, m, r) for step in range(STEPS) for m in range(MICRO_BATCHES) for r in range(world)],
    )
    data = [{"input_ids": row, "labels": row} for batch in batches for row in ids(*batch)]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    Trainer(
        model, arguments(folder, STEPS, MICRO_BATCHES, **CPU, **how), train_dataset=data, optimizers=(optimizer, None)
    ).train()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_of_transformers_with_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    for found in run_ranks(llama_trained, WORLD, tmp_path, reentrant):
        assert_equal(found, llama_alone(WORLD))
