"""Swapped models train as before: under Trainer, Accelerate, DDP, FSDP2, PEFT, and with activation checkpointing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs Transformers, which `make engines` installs")
pytest.importorskip("accelerate", reason="needs Accelerate, which `make engines` installs")
pytest.importorskip("peft", reason="needs PEFT, which `make engines` installs")
pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("ignore")]

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from transformers import Trainer  # noqa: E402

from equimoe.moe import BalanceConfig, MoE  # noqa: E402
from equimoe.moe.interop import swap  # noqa: E402
from equimoe.moe.parallel import ParallelConfig, build_mesh, parallelize  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.hf_models import FAMILIES, LENGTH, WORLD, batch, build, gradients, part, whole  # noqa: E402
from tests.helpers.trainer import arguments  # noqa: E402

OFF, GLOBAL = BalanceConfig(coefficient=0.0), BalanceConfig(coefficient=0.5)
STEPS = 20


@pytest.fixture(autouse=True)
def _no_accelerator_is_left() -> Iterator[None]:
    """Ranks that later tests fork would take the Trainer's accelerator, which knows of no ranks, for theirs."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def different(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not close(found[name], value)]


def layers(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


# ---- Trainer


def trained(model: Any, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Train for 20 steps of two micro-batches with padding."""
    settings = arguments(folder, STEPS, 2, learning_rate=0.05, logging_steps=1, use_cpu=True)
    micro_batches = [batch(seed % 4) for seed in range(2 * STEPS)]
    data = [{name: value[row] for name, value in each.items()} for each in micro_batches for row in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = Trainer(model, settings, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["mixtral", "qwen2", "deepseek v3", "phimoe", "gpt-oss"])
def test_twenty_steps_of_the_trainer_are_the_same(family: str, tmp_path: Path) -> None:
    losses, weights = trained(build(family), tmp_path)
    found, swapped = trained(swap(build(family), OFF), tmp_path)
    assert len(found) == STEPS and losses[-1] < losses[0]
    assert torch.allclose(torch.tensor(found), torch.tensor(losses), atol=1e-5)
    assert not different(swapped, weights)


# ---- several ranks


def under_accelerate(rank: int, world: int, family: str) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer may have left one in the parent
    model = swap(build(family), GLOBAL)
    wrapped = Accelerator(cpu=True).prepare(model)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    torch.manual_seed(1)
    wrapped(**part(rank)).loss.backward()
    assert sum(int(layer.stats.tokens) for layer in layers(model)) == (2 * LENGTH - 5 * (rank == 0)) * len(
        layers(model)
    )
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def under_fsdp2(rank: int, world: int, family: str, routers_apart: bool = False) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    model = swap(build(family), GLOBAL)
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    for layer in layers(model) if routers_apart else []:
        fully_shard(layer.router, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(**part(rank)).loss.backward()
    return whole_gradients(model)


def under_expert_parallelism(rank: int, world: int, family: str) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    mesh = build_mesh(ParallelConfig(ep=world, data_parallel="fsdp"))
    model = parallelize(swap(build(family), GLOBAL), mesh)
    (model(**part(rank)).loss / world).backward()
    return whole_gradients(model)


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p.full_tensor()) if p.grad is None else p.grad.full_tensor()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("wrap", "families"),
    [
        (under_accelerate, ["mixtral", "qwen2", "deepseek v3", "gpt-oss"]),
        (under_fsdp2, ["mixtral", "qwen2", "deepseek v3", "gpt-oss"]),
        (partial(under_fsdp2, routers_apart=True), ["qwen2", "gpt-oss"]),
        (under_expert_parallelism, ["mixtral", "qwen2", "deepseek v3"]),
    ],
    ids=["accelerate", "fsdp2", "fsdp2, routers apart", "expert parallelism"],
)
def test_gradients_on_two_ranks_equal_those_of_one_process(wrap: Any, families: list[str]) -> None:
    """With the balance loss over the global batch, and padding on one rank only."""
    for family in families:
        right = gradients(swap(build(family), GLOBAL), whole())[1]
        unbalanced = gradients(swap(build(family), OFF), whole())[1]
        assert any("gate" in name or "router" in name for name in different(unbalanced, right))
        for found in run_ranks(wrap, WORLD, family):
            assert not different(found, right), family


def test_experts_with_code_of_their_own_are_not_split() -> None:
    with pytest.raises(AssertionError, match="ValueError: parallel.ep, parallel.etp: the experts of GptOssMLP are not"):
        run_ranks(under_expert_parallelism, WORLD, "gpt-oss")


def test_compiled_layers_have_the_same_gradients() -> None:
    _, right = gradients(swap(build("mixtral", num_hidden_layers=1), GLOBAL))
    model = swap(build("mixtral", num_hidden_layers=1), GLOBAL)
    model.model.layers[0].compile(backend="eager")
    assert not different(gradients(model)[1], right)
    assert {int(layer.stats.tokens) for layer in layers(model)} == {2 * LENGTH - 5}


# ---- activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    model = swap(build(family), GLOBAL)
    _, right = gradients(model)
    counts = [layer.stats.counts for layer in layers(model)]
    model = swap(build(family), GLOBAL)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, found = gradients(model)
    assert not different(found, right)
    for layer, expected in zip(layers(model), counts, strict=True):
        assert torch.equal(layer.stats.counts, expected) and len(layer.balancer.visits) == 1


@pytest.mark.parametrize("family", ["qwen3", "gpt-oss"])
def test_checkpointing_knows_the_mask_of_each_of_several_forwards(family: str) -> None:
    def run(checkpointing: bool) -> dict[str, Tensor]:
        model = swap(build(family), BalanceConfig("micro", 0.5))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        first, second = model(**batch(0)).loss, model(**batch(1, padded=False)).loss
        (first + second).backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}

    assert not different(run(True), run(False))


# ---- PEFT


def adapted(family: str, swapped: bool, **targets: Any) -> tuple[Any, dict[str, Tensor]]:
    """The model's outputs, and the gradients of adapters with random weights."""
    model = swap(build(family), OFF) if swapped else build(family)
    peft = get_peft_model(model, LoraConfig(r=2, **targets))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    outputs, grads = gradients(peft)
    return outputs, {name: grad for name, grad in grads.items() if dict(peft.named_parameters())[name].requires_grad}


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("mixtral", ATTENTION),
        ("mixtral", EXPERTS),
        ("mixtral", {"target_modules": [], "target_parameters": ["gate.weight"]}),
        ("granite", {"target_modules": [], "target_parameters": ["router.weight", "experts.down_proj"]}),
        ("qwen2", {"target_modules": "all-linear"}),
        ("qwen2", ATTENTION | {"modules_to_save": ["gate"]}),
        ("deepseek v3", EXPERTS),
        ("gpt-oss", ATTENTION),
        ("gpt-oss", EXPERTS),
    ],
)
def test_adapters_train_as_before(family: str, targets: dict[str, Any]) -> None:
    outputs, right = adapted(family, False, **targets)
    found, grads = adapted(family, True, **targets)
    assert close(found.logits, outputs.logits) and len(right) > 1
    assert not different(grads, right)


@pytest.mark.parametrize(
    ("family", "parameter", "part"),
    [
        ("mixtral", "gate.weight", "gate"),
        ("granite", "router.weight", "router"),
        ("deepseek v3", "gate.weight", "gate"),
        ("mixtral", "experts.down_proj", "experts"),
    ],
)
def test_adapters_of_a_part_that_is_swapped_come_later(family: str, parameter: str, part: str) -> None:
    peft = get_peft_model(build(family), LoraConfig(r=2, target_modules=[], target_parameters=[parameter]))
    with pytest.raises(ValueError, match=rf"\.{part} has an adapter already.*call swap before the adapters are added"):
        swap(peft, OFF)


def test_a_bias_moves_also_if_the_router_is_adapted() -> None:
    model = swap(build("deepseek v3"), BalanceConfig(bias_update_rate=0.25))
    bias = model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    before = bias.clone()
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["gate.weight"]))
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.1)
    gradients(peft)
    optimizer.step()
    assert float((bias - before).abs().max()) == pytest.approx(0.25)
