"""Accelerate, Lightning and the Trainer with a DeepSpeed config train as one process that holds the whole batch.

The model has this package's layer, or the one with the signature of ``deepspeed.moe.layer.MoE``. Steps have two
micro-batches, on two ranks.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

deepspeed = pytest.importorskip("deepspeed", reason="needs DeepSpeed, which `make engines` installs")
pytestmark = pytest.mark.engines

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer  # noqa: E402
from deepspeed.runtime.engine import DeepSpeedEngine  # noqa: E402

from equimoe.moe import BalanceConfig, MoE, MoEConfig, counting_pass  # noqa: E402
from equimoe.moe.engines.deepspeed import MoE as DropInMoE  # noqa: E402
from tests.helpers import oracle  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.trainer import arguments  # noqa: E402

STEPS, PASSES, WORLD, RATE, COEFFICIENT = 3, 2, 2, 0.01, 0.5
#: more than fp32 sums in another order differ by
TOLERANCE = 1e-5


class Model(nn.Module):
    """Two linear layers and experts. ``kind``: "ours" attaches its loss, "drop-in" returns it, as DeepSpeed's does."""

    def __init__(self, kind: str, estimator: Any = "rolling", micro_batches: int | None = PASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        balance = BalanceConfig(coefficient=COEFFICIENT, estimator=estimator, micro_batches=micro_batches)
        moe: nn.Module = MoE(MoEConfig(8, 16, 4, 2, init_std=0.5, balance=balance))
        if kind == "drop-in":
            expert = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
            moe = DropInMoE(8, expert, 4, k=2, drop_tokens=False, micro_batches=micro_batches)
        self.first, self.moe, self.last = nn.Linear(8, 8), moe, nn.Linear(8, 8)
        #: the loss of each training forward, and the router's weight at its beginning
        self.losses: list[float] = []
        self.routers: list[Tensor] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.routers.append(self.moe.router.weight.detach().clone())
        y, aux = self.moe(self.first(x)), torch.zeros(())
        if isinstance(y, tuple):
            y, aux, _ = y
        loss = (self.last(y) - x).square().mean()
        self.losses.append(float(loss.detach()))
        return {"loss": loss + COEFFICIENT * aux}


class Trained(NamedTuple):
    """The losses of the training forwards, the router's gradient in each step, and the weights in the end."""

    losses: list[float]
    gradients: list[Tensor]
    weights: list[Tensor]


def result(model: Model, counted: int = 0) -> Trained:
    """``counted``: how many forwards of each step only counted."""
    each = PASSES + counted
    at_start = [*model.routers[::each], model.moe.router.weight.detach()]
    gradients = [(before - after) / RATE for before, after in zip(at_start, at_start[1:], strict=False)]
    losses = [loss for i, loss in enumerate(model.losses) if i % each >= counted]
    return Trained(losses, gradients, [p.detach().clone() for p in model.parameters()])


def tokens(step: int, m: int, rank: int) -> Tensor:
    """A micro-batch; each is another domain, so that its load is another."""
    generator = torch.Generator().manual_seed(100 * step + 10 * m + rank)
    return torch.randn(2, 6, 8, generator=generator) + 2 * torch.randn(8, generator=generator)


@cache
def one_process(kind: str, estimator: str = "rolling") -> Trained:
    model = Model(kind, estimator)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        batches = [torch.cat([tokens(step, m, rank) for rank in range(WORLD)]) for m in range(PASSES)]
        if estimator == "exact":
            with counting_pass():
                for x in batches:
                    model(x)
        for x in batches:
            (model(x)["loss"] / PASSES).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(model, counted=PASSES if estimator == "exact" else 0)


def check(found: list[Trained], right: Trained) -> None:
    for i, loss in enumerate(right.losses):
        assert sum(rank.losses[i] for rank in found) / WORLD == pytest.approx(loss, rel=TOLERANCE), f"forward {i}"
    for rank in found:
        for step, (value, expected) in enumerate(zip(rank.gradients, right.gradients, strict=True)):
            assert oracle.relative_error(value, expected) < 10 * TOLERANCE, f"the router's gradient in step {step}"
        for value, expected in zip(rank.weights, right.weights, strict=True):
            assert oracle.relative_error(value, expected) < TOLERANCE


def config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": PASSES,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Experts of DeepSpeed's kind are in groups of their own, as it asks."""
    found = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    return torch.optim.SGD([group for group in found if group["params"]], lr=RATE)


# ---- the three loops


def let_accelerate_see_ranks_without_gpus() -> None:
    """Without GPUs, Accelerate takes a rank under DeepSpeed for the only one. Affects the process of the rank only."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)  # the state of other tests, which forked ranks inherit
    if not torch.cuda.is_available():
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)


def accelerate(model: Model, rank: int, stage: int, folder: Path, exact: bool = False) -> Trained:
    from accelerate import Accelerator, DeepSpeedPlugin

    let_accelerate_see_ranks_without_gpus()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(config(stage)))
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    assert isinstance(prepared, DeepSpeedEngine)
    for step in range(STEPS):
        batches = [tokens(step, m, rank).to(accelerator.device) for m in range(PASSES)]
        if exact:
            with counting_pass():
                for x in batches:
                    prepared(x)
        for x in batches:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(x)["loss"])
                optimizer.step()
                optimizer.zero_grad()
    return result(model, counted=PASSES if exact else 0)


def lightning(model: Model, rank: int, stage: int, folder: Path) -> Trained:
    from lightning import LightningModule, Trainer
    from lightning.pytorch.strategies import DeepSpeedStrategy

    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, x: Tensor, number: int) -> Tensor:
            return self.model(x)["loss"] * self.trainer.accumulate_grad_batches  # DeepSpeed divides by it, too

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self)

    class OnAnyDevice(DeepSpeedStrategy):
        """Lightning lets DeepSpeed run on GPUs only. This leaves out that check, and the use of a GPU's number."""

        def setup_environment(self) -> None:
            super(DeepSpeedStrategy, self).setup_environment()

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu", self.local_rank)

    on_gpu, of_engine = torch.cuda.is_available(), config(stage)
    trainer = Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=WORLD,
        strategy=(DeepSpeedStrategy if on_gpu else OnAnyDevice)(config=of_engine),
        accumulate_grad_batches=of_engine.pop("gradient_accumulation_steps"),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    batches = [tokens(step, m, rank) for step in range(STEPS) for m in range(PASSES)]
    trainer.fit(Lit(), DataLoader(batches, batch_size=None))
    assert isinstance(trainer.model, DeepSpeedEngine)
    return result(model)


def transformers(model: Model, rank: int, stage: int, folder: Path) -> Trained:
    from transformers import Trainer

    let_accelerate_see_ranks_without_gpus()

    class Own(Trainer):
        """Under DeepSpeed, the Trainer makes the optimizer itself."""

        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            self.optimizer = optimizer_of(self.model)
            return self.optimizer

    settings = arguments(folder, STEPS, PASSES, deepspeed=config(stage), max_grad_norm=0.0)
    order = [(step, m, r) for step in range(STEPS) for m in range(PASSES) for r in range(WORLD)]
    data = [{"x": x} for batch in order for x in tokens(*batch)]  # the two ranks take turns
    trainer = Own(model, settings, train_dataset=data)
    trainer.train()
    assert isinstance(trainer.model_wrapped, DeepSpeedEngine)
    return result(model)


LOOPS: dict[str, Callable[..., Trained]] = {
    "accelerate": accelerate,
    "lightning": lightning,
    "transformers": transformers,
}


def needs(loop: str) -> Any:
    """Return a parameter that is skipped without its packages. They are imported here, once for all ranks."""
    packages = {"lightning": ["lightning.pytorch.strategies"], "transformers": ["accelerate", "transformers.trainer"]}
    try:
        for package in packages.get(loop, [loop]):
            import_module(package)
        missing = False
    except ImportError:
        missing = True
    reason = f"needs {loop.capitalize()}, which `make engines` installs"
    return pytest.param(loop, marks=pytest.mark.skipif(missing, reason=reason))


EACH = pytest.mark.parametrize("loop", [needs(loop) for loop in LOOPS])


def train(
    rank: int, world: int, loop: str, stage: int, folder: Path, model: Callable[[], Model], **how: Any
) -> Trained:
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, but the group exists
    return LOOPS[loop](model(), rank, stage, folder, **how)


@EACH
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_our_layer_equals_one_process(loop: str, stage: int, tmp_path: Path) -> None:
    check(run_ranks(train, WORLD, loop, stage, tmp_path, partial(Model, "ours")), one_process("ours"))


@EACH
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_layer_with_deepspeeds_signature_equals_one_process(loop: str, stage: int, tmp_path: Path) -> None:
    """It learns from DeepSpeed's engine how many micro-batches a step has."""
    model = partial(Model, "drop-in", micro_batches=None)
    check(run_ranks(train, WORLD, loop, stage, tmp_path, model), one_process("drop-in"))


def test_a_step_counted_ahead_equals_one_process(tmp_path: Path) -> None:
    """The number of micro-batches is the number counted."""
    if find_spec("accelerate") is None:
        pytest.skip("needs Accelerate, which `make engines` installs")
    model = partial(Model, "ours", "exact", micro_batches=None)
    check(run_ranks(partial(train, exact=True), WORLD, "accelerate", 2, tmp_path, model), one_process("ours", "exact"))


@EACH
@pytest.mark.parametrize("stage", [1, 2])
def test_an_unknown_number_of_micro_batches_is_refused(loop: str, stage: int, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ValueError: SGD: .* perhaps copies .*set balance.micro_batches to"):
        run_ranks(train, WORLD, loop, stage, tmp_path, partial(Model, "ours", micro_batches=None))
