"""Models of transformers compute the same after swap: one row per family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs Transformers, which `make engines` installs")
pytestmark = pytest.mark.engines

from equimoe.moe import BalanceConfig, MoE  # noqa: E402
from equimoe.moe.interop import SwappedMoE, swap, unswap  # noqa: E402
from tests.helpers.hf_models import FAMILIES, LENGTH, batch, build, gradients  # noqa: E402

OFF = BalanceConfig(coefficient=0.0)


def layers(model: torch.nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def different(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [name for name, value in expected.items() if not close(found[name], value)]


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_gradients_and_names_stay_the_same(family: str) -> None:
    """With padding on both sides; and unswap restores the very modules."""
    model = build(family)
    parameters = dict(model.named_parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    outputs, right = gradients(model)

    assert swap(model, OFF) is model
    found, grads = gradients(model)
    assert close(found.loss, outputs.loss) and close(found.logits, outputs.logits)
    assert not different(grads, right)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p is parameters[name] for name, p in model.named_parameters())

    swapped = layers(model)
    assert len(swapped) == 2 - (family.startswith("deepseek") or family == "qwen3 plain")
    for layer in swapped:
        assert int(layer.stats.tokens) == 2 * LENGTH - 5 and int(layer.stats.counts.sum()) == 2 * (2 * LENGTH - 5)
        assert int(layer.stats.dropped_choices) == 0

    assert unswap(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert not any("_swapped" in name or "_before" in name for m in model.modules() for name in vars(m))
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(gradients(model)[0].logits, outputs.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_one_choice_per_token_stays_the_same(family: str) -> None:
    """With normalised weights, every gate weight is 1, so that only the balance loss trains the router. PhiMoE's router
    always chooses two."""
    model, choices = build(family, num_experts_per_tok=1), 2 if family == "phimoe" else 1
    outputs, right = gradients(model)
    found, grads = gradients(swap(model, OFF))
    assert close(found.logits, outputs.logits) and not different(grads, right)
    assert all(int(layer.stats.counts.sum()) == choices * (2 * LENGTH - 5) for layer in layers(model))
    assert all(layer.balancer.top_k == choices for layer in layers(model))
    unswap(model)
    _, grads = gradients(swap(model, BalanceConfig(coefficient=1.0)))
    routers = [name for name in right if name.endswith(("gate.weight", "router.weight")) and "shared" not in name]
    assert routers and set(routers) <= set(different(grads, right))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_and_saved_files_stay_the_same(family: str, tmp_path: Path) -> None:
    model = build(family)
    prompt = {"input_ids": batch()["input_ids"][:, :4], "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    model.eval()
    expected = model.generate(**prompt, **how)
    model.save_pretrained(tmp_path / "before")
    swap(model)
    assert torch.equal(model.generate(**prompt, **how), expected)
    model.save_pretrained(tmp_path / "after")
    files = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("before", "after")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    again = type(model).from_pretrained(tmp_path / "after").eval()
    assert torch.equal(again.generate(**prompt, **how), expected)
    assert torch.equal(swap(again).generate(**prompt, **how), expected)


AUXILIARY = [family for family in FAMILIES if not family.startswith("deepseek")]


@pytest.mark.parametrize("family", AUXILIARY)
def test_the_auxiliary_loss_of_the_model_is_switched_off(family: str) -> None:
    """Also if the recorder of router logits was installed before the swap. The value is still reported."""
    model = build(family, router_aux_loss_coef=0.5)
    plain, right = gradients(model)
    with_loss, _ = gradients(model, batch() | {"output_router_logits": True})
    assert not close(with_loss.loss, plain.loss)
    for before in (True, False):
        model = build(family, router_aux_loss_coef=0.5)
        if before:
            gradients(model, batch() | {"output_router_logits": True})
        swap(model, OFF)
        found, grads = gradients(model, batch() | {"output_router_logits": True})
        assert close(found.loss, plain.loss) and not different(grads, right)
        assert close(found.aux_loss, with_loss.aux_loss)
        for logits, expected in zip(found.router_logits, with_loss.router_logits, strict=True):
            assert close(logits, expected)
        assert unswap(model).router_aux_loss_coef == 0.5 and model.config.router_aux_loss_coef == 0.5


@pytest.mark.parametrize("configured", [True, False])
def test_the_balance_loss_of_a_head_that_is_not_swapped_is_refused(configured: bool) -> None:
    """It would be added to that of the swapped layers. A model without a head has none to add."""
    model = build("mixtral", router_aux_loss_coef=0.5, output_router_logits=configured)
    inputs = batch() | ({} if configured else {"output_router_logits": True})
    swap(model.model, OFF)
    with pytest.raises(
        ValueError, match="^output_router_logits=True: swap was called with MixtralModel and without its"
    ):
        model(**inputs)
    with torch.no_grad():
        model(**inputs)
    model(**batch() | {"output_router_logits": False})
    model.config.router_aux_loss_coef = 0.0
    assert len(model.model(inputs["input_ids"], output_router_logits=True).router_logits) == 2
    unswap(model)
    model(**inputs)


def test_unswap_between_a_forward_and_its_backward_is_refused() -> None:
    model = swap(build("mixtral"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(**batch()).loss
    with pytest.raises(
        ValueError, match="^unswap: the backward of a training forward has not run; call unswap after it"
    ):
        unswap(model)
    loss.backward()
    stats = layers(model)[0].stats
    unswap(model)
    optimizer.step()  # although statistics and the loss still refer to the layers
    assert int(stats.tokens) == 2 * LENGTH - 5
    swap(model)
    model(**batch())
    assert not layers(unswap(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_balance_loss_acts_on_the_router(family: str) -> None:
    model = build(family)
    _, right = gradients(model)
    _, grads = gradients(swap(model, BalanceConfig(coefficient=1.0)))
    changed = different(grads, right)
    assert {f"{name}.weight" for name, m in model.named_modules() if name.split(".")[-1] in ("gate", "router")} <= set(
        changed
    )
    last = layers(model)[-1]
    assert not [name for name in changed if "experts." in name and name.startswith("model.layers.1")], last


def test_a_copy_counts_for_itself() -> None:
    model = swap(build("mixtral"), OFF)
    twin = copy.deepcopy(model)
    _, right = gradients(model)
    _, grads = gradients(twin, batch() | {"attention_mask": torch.ones(2, LENGTH, dtype=torch.long)})
    assert [int(layer.stats.tokens) for layer in layers(twin)] == [2 * LENGTH] * 2
    assert [int(layer.stats.tokens) for layer in layers(model)] == [2 * LENGTH - 5] * 2
    assert not different(gradients(twin)[1], right) and different(grads, right)
    unswap(twin)
    assert isinstance(layers(model)[0], SwappedMoE) and not layers(twin)


def test_the_bias_of_deepseek_v3_moves_if_asked_and_keeps_its_place() -> None:
    for rate in (0.0, 0.25):
        model = build("deepseek v3")
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        bias, before = model.get_buffer(name), model.get_buffer(name).clone()
        swap(model, BalanceConfig(coefficient=0.0, bias_update_rate=rate))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        gradients(model)
        optimizer.step()
        counts = layers(model)[0].stats.counts
        assert model.get_buffer(name) is bias
        assert close(bias, before + rate * (counts.float().mean() - counts).sign())
        assert name in model.state_dict()
        model.half()
        assert model.get_buffer(name).dtype == torch.float32


@pytest.mark.filterwarnings("error:router.weight")
def test_the_router_computes_in_fp32_in_a_model_of_16_bits() -> None:
    model = build("qwen3").bfloat16()
    outputs, _ = gradients(model)
    found, _ = gradients(swap(model, OFF))
    assert found.logits.dtype == torch.bfloat16 and torch.allclose(found.loss, outputs.loss, rtol=0.05)
    recorded = model(**batch(), output_router_logits=True).router_logits
    assert recorded[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "setting", "attribute"),
    [
        ("mixtral", "router_jitter_noise", "jitter_noise"),
        ("phimoe", "input_jitter_noise", "input_jitter_noise"),
    ],
)
def test_noise_is_refused(family: str, setting: str, attribute: str) -> None:
    model = build(family, **{setting: 0.1})
    with pytest.raises(ValueError, match=rf"^model.layers.0.mlp.{attribute}=0.1: .* set it to 0 on every block$"):
        swap(model)
    for layer in model.model.layers:
        setattr(layer.mlp, attribute, 0.0)
    swap(model)
