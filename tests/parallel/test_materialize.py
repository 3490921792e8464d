"""Checks that a model that is built on the meta device, and split there, gets the weights of the whole model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from equimoe.moe import MoEConfig
from equimoe.moe.engines import Batch, build_engine
from equimoe.moe.engines.torch import TorchEngine
from equimoe.moe.model import Decoder
from equimoe.moe.parallel import ParallelConfig, build_mesh
from equimoe.moe.parallel.grad_norm import local_part
from equimoe.moe.parallel.tied import materialize
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but

ROOT = Path(__file__).resolve().parents[2]


def decoder(tied: bool = False) -> Decoder:
    # the vocabulary does not divide evenly, and the widths are such that some blocks of rows are split
    moe = MoEConfig(hidden_size=16, intermediate_size=24, num_experts=4, top_k=2, shared_intermediate_size=12)
    sizes = {"vocab_size": 33, "seq_len": 16, "num_layers": 4, "num_heads": 4, "intermediate_size": 20}
    return Decoder(**sizes, moe=moe, dense_layers=1, tie_embeddings=tied)


def engine(model: nn.Module, degrees: dict) -> TorchEngine:
    mesh = build_mesh(ParallelConfig(**degrees))
    optimizer = lambda named: torch.optim.AdamW(named.values())  # noqa: E731
    sizes = {"micro_batches": 4, "shape": (1, 16), "device": torch.device("cpu")}
    return build_engine(model, mesh, optimizer, **sizes)


def tensors(of: TorchEngine) -> dict[str, Tensor]:
    buffers = {f"{i}.{name}": b for i, part in enumerate(of.parts) for name, b in part.named_buffers()}
    return {name: local_part(t).detach().clone() for name, t in (of.parameters | buffers).items()}


DEGREES: list[dict] = [
    {"ep": 2, "tp": 2},
    {"ep": 4, "data_parallel": "fsdp"},
    {"ep": 1, "data_parallel": "fsdp"},
    {"tp": 2, "ep": 2, "data_parallel": "fsdp"},
    {"ep": 2, "etp": 2, "data_parallel": "fsdp"},
    {"cp": 2, "ep": 2},
    {"pp": 2, "ep": 2},
    {"pp": 2, "ep": 2, "data_parallel": "fsdp", "schedule": "interleaved_1f1b", "stages_per_rank": 2},
    {"dp_replicate": 2, "ep": 2, "data_parallel": "fsdp"},
]


@pytest.mark.parametrize(
    ("block", "kinds"),
    [
        pytest.param(1 << 20, DEGREES, marks=pytest.mark.slow, id="whole"),
        pytest.param(40, DEGREES[2:5], id="three rows"),
    ],
)
def test_each_rank_gets_its_part_of_the_whole_models_weights(
    block: int, kinds: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``block`` is the number of elements that share a generator: whole weights, or less than three of their rows."""
    monkeypatch.setattr("equimoe.moe.collectives.initial.BLOCK", block)

    def body(rank: int, world: int) -> None:
        for degrees in kinds:
            torch.manual_seed(3)
            want = tensors(engine(decoder(), degrees))
            with torch.device("meta"):
                model = decoder()
            torch.manual_seed(3)
            found = tensors(engine(model, degrees))
            torch.testing.assert_close(found, want, rtol=0, atol=0, msg=lambda text: f"{degrees}: {text}")  # noqa: B023

    run_ranks(body, 4)


@pytest.mark.parametrize(
    "degrees",
    slow_but([{"ep": 2, "data_parallel": "fsdp"}], [{"ep": 2, "data_parallel": "fsdp"}, {"ep": 2, "tp": 2}]),
    ids=["fsdp", "tp"],
)
def test_tied_embeddings_train_as_those_of_a_whole_model(degrees: dict) -> None:
    def body(rank: int, world: int) -> None:
        ids_BS = torch.arange(16).view(1, 16) + (rank if "data_parallel" in degrees else 0)
        trained = []
        for device in ("cpu", "meta"):
            with torch.device(device):
                torch.manual_seed(3)
                model = decoder(tied=True)
            torch.manual_seed(3)
            one = engine(model, degrees)
            for _ in range(2):
                one.step([Batch(ids_BS, ids_BS.roll(-1, 1))] * 4, lr=0.01)
            trained.append(tensors(one))
        assert "head.weight" not in trained[0]
        torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=0)

    run_ranks(body, 2)


def test_blocks_and_weights_have_different_values() -> None:
    torch.manual_seed(3)
    model = decoder()
    values = torch.cat([p.flatten()[:8] for name, p in model.named_parameters() if "norm" not in name])
    assert values.unique().numel() == values.numel()
    large = torch.empty(1 << 12, 1 << 9)
    from equimoe.moe.collectives import fill_normal

    fill_normal(large, 1.0)
    assert large.unique(dim=0).shape == large.shape
    assert abs(large.mean()) < 3e-3 and abs(large.std() - 1) < 3e-3


class Tied(nn.Module):
    """Uses one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight

    def reset_parameters(self) -> None:
        nn.init.normal_(self.one.weight)


def test_tied_weights_stay_tied() -> None:
    with torch.device("meta"):
        model = Tied()
    torch.manual_seed(3)
    materialize([model], torch.device("cpu"))
    assert model.two.weight is model.one.weight
    torch.manual_seed(3)
    assert torch.equal(model.one.weight, torch.empty(3, 3).normal_())


def test_a_model_that_cannot_fill_its_weights_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: Sequential is on the meta device and has no method reset_parameters"):
        build_engine(model, None, lambda named: torch.optim.SGD(named.values(), 0.1), device=torch.device("cpu"))


RANK_OF_MANY = """
import resource, sys
import torch
from equimoe.launch.recipes.deepseek import deepseek_v3
from equimoe.moe.parallel import build_mesh
from equimoe.moe.parallel.grad_norm import local_part
from equimoe.moe.plan.dry_run import pretended
from equimoe.moe.train.build import build_model, engine_of

config, world = deepseek_v3(), 1024
with pretended(int(sys.argv[1]), world, 8):
    mesh = build_mesh(config.degrees(world), "cpu", warm_up=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with torch.device("meta"):
        model = build_model(config, config.model.vocab_size)
    engine = engine_of(config, model, mesh, torch.device("cpu"), config.micro_batches(mesh["dp"].size))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    share = sum(local_part(p).nbytes for p in engine.parameters.values())
    assert all(local_part(p).isfinite().all() for p in engine.parameters.values())
    print(share, peak)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_of_deepseek_v3_needs_little_more_memory_than_its_share() -> None:
    """Rank 70 of 1,024 holds four MoE blocks; the whole model has 2.4 TiB."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK_OF_MANY, "70"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    share, peak = map(int, done.stdout.split())
    assert 2.5 * 2**30 < share < 3 * 2**30 and peak < 1.1 * share, (share, peak)
