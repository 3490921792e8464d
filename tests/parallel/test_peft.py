"""Adapters of PEFT in a decoder that is split over ranks: they are trained alike, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

peft = pytest.importorskip("peft", reason="needs PEFT, which `make engines` installs")

from equimoe.moe import BalanceConfig, MoEConfig  # noqa: E402
from equimoe.moe.engines import Batch, build_engine  # noqa: E402
from equimoe.moe.model import Decoder  # noqa: E402
from equimoe.moe.parallel import ParallelConfig, build_mesh, parallelize  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402

pytestmark = pytest.mark.engines

B, S, V, WORLD = 4, 8, 24, 2
ADAPTED: dict[str, dict[str, Any]] = {
    "experts": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "router": {"target_parameters": ["router.weight"]},
    "attention": {"target_modules": ["qkv_proj", "out_proj"]},
    "copies of experts": {"target_modules": ["out_proj"], "modules_to_save": ["experts"]},
    **{name: {"target_parameters": ["router.weight"], "modules_to_save": [name]} for name in ("mlp", "norm1", "head")},
}


def adapted(where: str) -> Decoder:
    torch.manual_seed(0)
    moe = MoEConfig(16, 8, 4, 2, balance=BalanceConfig(coefficient=0.5, estimator="exact"), init_std=0.3)
    sizes = {"vocab_size": V, "seq_len": S, "num_layers": 2, "num_heads": 2, "intermediate_size": 8}
    config = peft.LoraConfig(r=2, **({"target_modules": []} | ADAPTED[where]))
    model = peft.get_peft_model(Decoder(**sizes, moe=moe), config).base_model.model
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model


def trained(rank: int, world: int, where: str, degrees: dict[str, Any]) -> dict[str, Tensor]:
    """Return the adapters after two steps on the same batches."""
    mesh = build_mesh(ParallelConfig(**degrees)) if world > 1 else None
    how = {"micro_batches": 2, "shape": (B // 2, S)}
    engine = build_engine(adapted(where), mesh, lambda p: torch.optim.SGD(p.values(), lr=0.3), **how)
    draw = torch.Generator().manual_seed(1)
    for _ in range(2):
        ids = torch.randint(V, (B, S + 1), generator=draw)
        engine.step([Batch(part[:, :-1], part[:, 1:]) for part in ids.chunk(2)], lr=0.3)
    named = (pair for part in engine.parts for pair in part.named_parameters())
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


@pytest.mark.parametrize(
    ("where", "degrees"),
    [
        *((where, {"pp": 2}) for where in ADAPTED),
        *((where, {"tp": 2, "ep": 1}) for where in ("experts", "router", "mlp")),
        *((where, {"tp": 2, "ep": 2}) for where in ("router", "norm1")),
    ],
)
def test_adapters_are_trained_as_in_one_process(where: str, degrees: dict[str, Any]) -> None:
    (want,) = run_ranks(trained, 1, where, {})
    begun = {name: p for name, p in adapted(where).named_parameters() if p.requires_grad}
    ranks = run_ranks(trained, WORLD, where, degrees)
    found = {name: value for rank in ranks for name, value in rank.items()}
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
        assert not torch.equal(value, begun[name])


@pytest.mark.parametrize(
    ("where", "degrees", "message"),
    [
        ("experts", {"ep": 2}, "parallel.ep=2, parallel.etp=1: the experts have an adapter of PEFT, which cannot be "),
        ("experts", {"etp": 2, "tp": 2}, "parallel.ep=1, parallel.etp=2: the experts have an adapter of PEFT, which "),
        ("copies of experts", {"ep": 2}, "parallel.ep=2, parallel.etp=1: the experts have an adapter of PEFT, which "),
        ("head", {"tp": 2, "ep": 1}, "parallel.tp=2: head has an adapter of PEFT, which tensor parallelism cannot "),
        ("attention", {"tp": 2, "ep": 1}, "parallel.tp=2: blocks.0.attention.qkv_proj has an adapter of PEFT, which "),
    ],
)
def test_adapters_that_cannot_be_split_are_refused(where: str, degrees: dict[str, Any], message: str) -> None:
    def body(rank: int, world: int) -> str:
        with pytest.raises(ValueError) as error:
            parallelize(adapted(where), build_mesh(ParallelConfig(**degrees)), reduced=True)
        return str(error.value)

    for text in run_ranks(body, WORLD):
        assert text.startswith(message) and "\n" not in text
