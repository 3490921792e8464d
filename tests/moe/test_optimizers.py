"""LAMB and Muon against their definitions, weight by weight and expert by expert, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equimoe.moe import BalanceConfig, MoEConfig, ZeroComputationConfig
from equimoe.moe.engines.optimizers import Lamb, Muon, orthogonalized
from equimoe.moe.model import Decoder, mix_lora
from equimoe.moe.train.config import OptimConfig, TrainConfig
from equimoe.moe.train.optim import OPTIMIZERS, build_optimizer

SHAPES = {"vector": (5,), "matrix": (4, 6), "tall": (9, 2), "experts": (3, 4, 2), "split experts": (3, 2, 4, 2)}
Weights = dict[str, nn.Parameter]


def weights(dtype: torch.dtype = torch.float64) -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for name, shape in SHAPES.items()}


def gradients(step: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return {name: torch.randn(shape, dtype=dtype, generator=generator) for name, shape in SHAPES.items()}


def give(parameters: Weights, step: int, factor: float = 1.0) -> None:
    for name, gradient in gradients(step, next(iter(parameters.values())).dtype).items():
        parameters[name].grad = gradient * factor


def lamb_by_hand(weight: Tensor, grads: list[Tensor], lr: float, decay: float, eps: float) -> Tensor:
    """LAMB for one weight, as in the paper's algorithm 2 with the identity as its scaling function."""
    mean = square = torch.zeros_like(weight)
    for step, grad in enumerate(grads, 1):
        mean, square = 0.9 * mean + 0.1 * grad, 0.95 * square + 0.05 * grad**2
        direction = mean / (1 - 0.9**step) / ((square / (1 - 0.95**step)) ** 0.5 + eps) + decay * weight
        ratio = weight.norm() / direction.norm() if weight.norm() > 0 and direction.norm() > 0 else 1.0
        weight = weight - lr * ratio * direction
    return weight


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lamb_is_its_definition_for_each_weight_and_each_expert(decay: float) -> None:
    own = weights()
    with torch.no_grad():
        own["experts"][1] = 0.0  # a weight of norm 0 takes the step as it is
    start = {name: p.detach().clone() for name, p in own.items()}
    optimizer = Lamb(own.values(), lr=0.1, betas=(0.9, 0.95), eps=1e-3, weight_decay=decay)
    for step in range(3):
        give(own, step)
        optimizer.step()
    for name, p in own.items():
        grads = [gradients(step)[name] for step in range(3)]
        if p.dim() > 2:
            want = torch.stack(
                [lamb_by_hand(start[name][e], [g[e] for g in grads], 0.1, decay, 1e-3) for e in range(len(p))]
            )
        else:
            want = lamb_by_hand(start[name], grads, 0.1, decay, 1e-3)
        torch.testing.assert_close(p.detach(), want, rtol=1e-12, atol=1e-12)


def test_lambs_step_does_not_depend_on_the_scale_of_a_gradient() -> None:
    """Nor does the scale of one expert's gradient matter to another. Without weight decay and eps."""
    ends = []
    for factor in (1.0, 1e-6, 3e4):
        own = weights()
        optimizer = Lamb(own.values(), lr=0.1, eps=0.0, weight_decay=0.0)
        for step in range(3):
            give(own, step)
            own["matrix"].grad *= factor
            own["experts"].grad[2] *= factor
            optimizer.step()
        ends.append(own)
    for other in ends[1:]:
        for name, p in ends[0].items():
            torch.testing.assert_close(other[name], p, rtol=1e-10, atol=1e-12)


def test_lambs_step_is_as_long_as_a_fraction_of_the_weight() -> None:
    own = weights()
    before = {name: p.detach().clone() for name, p in own.items()}
    give(own, 0)
    Lamb(own.values(), lr=0.01, weight_decay=0.2).step()
    after = {name: p.detach() for name, p in own.items()}
    pairs = [(after[name], before[name]) for name in ("vector", "matrix")]
    for new, old in [*pairs, *zip(after["experts"], before["experts"], strict=True)]:
        assert float((new - old).norm() / old.norm()) == pytest.approx(0.01)


def muon(parameters: Weights, **how: Any) -> Muon:
    groups = [
        {"params": [p for p in parameters.values() if (p.dim() > 1) == orthogonal], "orthogonal": orthogonal}
        for orthogonal in (True, False)
    ]
    return Muon(groups, **how)


def test_muon_is_torchs_for_matrices_and_each_expert_and_adamw_for_the_rest() -> None:
    own, lone = weights(torch.float32), weights(torch.float32)
    optimizer = muon(own, lr=0.1, weight_decay=0.3, momentum=0.9, betas=(0.8, 0.9), eps=1e-4)
    matrices = {
        "matrix": [lone["matrix"]],
        "tall": [lone["tall"]],
        "experts": [nn.Parameter(expert.detach().clone()) for expert in lone["experts"]],
        "split experts": [nn.Parameter(expert.detach().clone().flatten(0, 1)) for expert in lone["split experts"]],
    }
    theirs = torch.optim.Muon(
        [p for of in matrices.values() for p in of],
        lr=0.1,
        weight_decay=0.3,
        momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW([lone["vector"]], lr=0.1, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-4)
    for step in range(3):
        give(own, step)
        given = gradients(step, torch.float32)
        lone["vector"].grad = given["vector"]
        for name, of in matrices.items():
            for p, grad in zip(of, given[name] if len(of) > 1 else [given[name]], strict=True):
                p.grad = grad.view_as(p).clone()
        for each in (optimizer, theirs, adamw):
            each.step()
    torch.testing.assert_close(own["vector"], lone["vector"])
    for name, of in matrices.items():
        want = torch.stack([p.detach() for p in of]) if len(of) > 1 else of[0].detach()
        torch.testing.assert_close(own[name].detach(), want.view_as(own[name]), rtol=0.02, atol=0.01)  # both in bf16


@pytest.mark.parametrize("shape", [(6, 6), (2, 9), (9, 2), (1, 7)])
def test_muons_steps_are_those_of_the_singular_values(shape: tuple[int, int]) -> None:
    """In fp64, with the momentum of the paper, which is 1 / (1 - mu) times ours: only directions matter."""
    own = nn.Parameter(torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    wanted, sums, (lr, decay, mu) = own.detach().clone(), torch.zeros_like(own), (0.1, 0.2, 0.9)
    optimizer = Muon([{"params": [own], "orthogonal": True}], lr=lr, weight_decay=decay, momentum=mu)
    for step in range(3):
        own.grad = torch.randn(own.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1 + step))
        optimizer.step()
        for weight, sum_, grad in zip(wanted, sums, own.grad, strict=True):
            sum_.mul_(mu).add_(grad)
            u, values, vt = torch.linalg.svd(grad + mu * sum_, full_matrices=False)
            values = values / values.square().sum().sqrt()
            for _ in range(5):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            weight.mul_(1 - lr * decay).sub_(lr * 0.2 * max(shape) ** 0.5 * (u * values) @ vt)
    torch.testing.assert_close(own.detach(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5), (3, 4, 8), (2, 3, 7, 4)])
def test_an_orthogonalized_matrix_keeps_its_singular_vectors(shape: tuple[int, ...]) -> None:
    given = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(given, full_matrices=False)
    values = u.mT @ orthogonalized(given) @ vt.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(values, torch.diag_embed(diagonal), atol=1e-10, rtol=0)
    assert float(diagonal.min()) > 0.6 and float(diagonal.max()) < 1.3
    assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape, dtype=torch.bfloat16))


def decoder() -> Decoder:
    shared: dict[str, Any] = {"shared_intermediate_size": 4, "shared_gate": True}
    moe = MoEConfig(8, 4, 4, 2, balance=BalanceConfig(), zero_computation=ZeroComputationConfig(), **shared)
    return Decoder(vocab_size=16, seq_len=8, num_layers=2, num_heads=2, intermediate_size=8, moe=moe, dense_layers=1)


def test_muon_updates_the_matrices_between_hidden_states() -> None:
    named = dict(decoder().named_parameters())
    optimizer = build_optimizer(named, OptimConfig(name="muon"))
    inner = {p for group in optimizer.param_groups if group["orthogonal"] for p in group["params"]}
    kept = ("embedding.weight", "head.weight", "router.weight", "shared.gate.weight", "local.mixing", "local.vectors")
    assert inner == {p for name, p in named.items() if p.dim() > 1 and not name.endswith(kept)}
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(named.values())


def test_muon_leaves_pools_of_shards_to_adamw() -> None:
    """A pool is a stack of parts of vectors, and no matrix."""
    moe = MoEConfig(8, 8, 4, 2)
    sizes: dict[str, Any] = {"vocab_size": 16, "seq_len": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}
    model = mix_lora(Decoder(**sizes, moe=moe, moe_every=0), moe, rank=4, experts="shards")
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig(name="muon"))
    inner = {p for group in optimizer.param_groups if group["orthogonal"] for p in group["params"]}
    assert inner == set(model.blocks["0"].mlp.experts.parameters(recurse=False))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_matrices_decay(name: str) -> None:
    optimizer = build_optimizer(dict(decoder().named_parameters()), OptimConfig(name=name))  # type: ignore[arg-type]
    for group in optimizer.param_groups:
        assert all((p.dim() > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="optim.name='muon': engine='deepspeed' runs AdamW; use engine='torch'"):
        TrainConfig(engine="deepspeed", optim=OptimConfig(name="muon"))
    with pytest.raises(ValueError, match=r"a weight of shape \(5,\) is no matrix"):
        Muon([{"params": [nn.Parameter(torch.ones(5))], "orthogonal": True}])
