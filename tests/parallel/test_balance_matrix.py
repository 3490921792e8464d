"""Checks the balance gradient, in fp64, for every mapping, number of micro-batches and kind of recomputation.

Under every scope and estimator it must equal that of one process that holds the whole batch; the bias must move the
same way.
"""

# B sequences of a micro-batch, S positions, D hidden, V vocabulary.

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.moe import BalanceConfig, ExtraLossConfig, MoEConfig, RouterConfig
from equimoe.moe.engines import Batch, build_engine
from equimoe.moe.model import Decoder
from equimoe.moe.parallel import Mesh, build_mesh, token_losses
from equimoe.moe.parallel import ParallelConfig as P
from equimoe.moe.parallel.stages import SCHEDULES
from tests.helpers import oracle
from tests.helpers.compositions import runs
from tests.helpers.fork import run_ranks
from tests.helpers.placed import spread_experts
from tests.helpers.recorded import Recorded
from tests.helpers.slow import slow_but

SEQUENCES, LENGTH, VOCABULARY, WIDTH = 16, 8, 16, 8
#: divisor of the language model's loss, so large that only the balance loss matters
MANY = 1e30
#: weights of all scopes that do not draw at random; used together
WEIGHTS = {"global": 1.0, "micro": 0.7, "sequence": 0.5, "data_parallel": 0.3, "device": 0.9, "communication": 0.6}

MAPPINGS: dict[str, tuple[int, P]] = {
    "dp 1": (1, P()),
    "dp 2": (2, P()),
    "dp 4": (4, P()),
    "dp 4, ep 2": (4, P(ep=2)),
    "fsdp 2": (2, P(data_parallel="fsdp")),
    "hsdp 2 x 2, ep 4": (4, P(dp_replicate=2, data_parallel="fsdp", ep=4)),
    "cp 2": (2, P(cp=2)),
    "cp 4": (4, P(cp=4)),
    "cp 2, dp 2, ep 4": (4, P(cp=2, ep=4)),
    "tp 2": (2, P(tp=2)),
    "tp 4": (4, P(tp=4)),
    "tp 2, dp 2": (4, P(tp=2)),
    "tp 2, dp 2, ep 4": (4, P(tp=2, ep=4)),
    "tp 2 without sequence parallelism, dp 2": (4, P(tp=2, sequence_parallel=False)),
    "cp 2, tp 2": (4, P(cp=2, tp=2)),
    **{f"pp 2, {schedule}": (2, P(pp=2, schedule=schedule)) for schedule in SCHEDULES},  # type: ignore[arg-type]
    "pp 2, dp 2, ep 2": (4, P(pp=2, ep=2)),
    "pp 2, interleaved_1f1b, cp 2": (4, P(pp=2, cp=2, schedule="interleaved_1f1b")),
    "pp 2, zbv, tp 2": (4, P(pp=2, tp=2, schedule="zbv")),
    "pp 4": (4, P(pp=4)),
}


def make(layers: int, micro_batches: int, recompute: bool = False, **balance: Any) -> Decoder:
    """Build a decoder whose weights are the same on every rank."""
    torch.manual_seed(0)
    z_loss = 0.01 if "extra" in balance or balance.get("scope", "global") == "global" else 0.0
    fields = {"coefficient": 1.0, "estimator": "exact", "micro_batches": micro_batches, "bias_update_rate": 0.5}
    config = BalanceConfig(**(fields | balance))
    moe = MoEConfig(WIDTH, 4, 8, 2, router=RouterConfig(z_loss=z_loss), balance=config, init_std=0.4)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "seq_len": LENGTH, "num_layers": layers, "num_heads": 4}
    return Decoder(**sizes, intermediate_size=8, moe=moe, recompute_blocks=recompute).double()


def batch(step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return sequences of different domains and different numbers of valid tokens; two sequences have none."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, torch.arange(SEQUENCES)[:, None])
    valid = torch.randint(1, LENGTH + 1, (SEQUENCES, 1), generator=generator)
    valid[3:5] = 0
    return ids[:, :-1], ids[:, 1:], torch.arange(LENGTH) < valid


def own(mesh: Mesh | None, micro_batches: int, dp: int = 1, step: int = 0) -> list[Batch]:
    """Return this rank's micro-batches of a step; without a mesh, each joins those of all ``dp`` ranks."""
    ranks = range(dp) if mesh is None else [mesh["dp"].rank]
    of_ranks = [
        [t.chunk(dp if mesh is None else mesh["dp"].size)[r].chunk(micro_batches) for r in ranks] for t in batch(step)
    ]
    return [Batch(*(torch.cat([of_rank[m] for of_rank in t]) for t in of_ranks)) for m in range(micro_batches)]


def train(model: Decoder, mesh: Mesh | None, steps: list[list[Batch]]) -> dict[str, Tensor]:
    """Return the last step's gradients on this rank, and the router biases after it, by names in the whole model.

    The learning rate is zero, so weights do not change.
    """
    optimizer = Recorded()
    micro_batches, shape = len(steps[0]), tuple(steps[0][0].inputs.shape)
    engine = build_engine(
        model,
        mesh,
        optimizer,
        loss=lambda logits_BSV, labels_BS: token_losses(logits_BSV, labels_BS) / MANY,
        micro_batches=micro_batches,
        shape=shape,
    )
    for batches in steps:
        assert engine.step(batches, lr=0.0).applied
    found = optimizer.gradients[-1]
    return found | {n: b for part in engine.parts for n, b in part.named_buffers() if n.endswith("bias_E")}


def gradients(model: Decoder, mesh: Mesh | None, batches: list[Batch]) -> dict[str, Tensor]:
    return train(model, mesh, [batches])


def cases(parallel: P, pp: int) -> Iterator[tuple[int, bool]]:
    for micro_batches in (1, 2, 4):
        for recompute in (False, True):
            schedule = SCHEDULES[parallel.schedule]
            if pp > 1 and ((schedule.split_backward and recompute) or (micro_batches < pp and schedule.fills_stages)):
                continue
            if pp > 1 and schedule.rounds and micro_batches < pp:
                continue
            yield micro_batches, recompute


@lru_cache
def alone(layers: int, scope: str, micro_batches: int, dp: int, ep: int) -> dict[str, Tensor]:
    """Return one scope's gradient in one process, whose micro-batches are the token sets of that scope."""
    model = make(layers, micro_batches, scope=scope)
    for layer in model.moe_layers():
        spread_experts(layer, ep)
    return gradients(model, None, own(None, micro_batches, dp))


def together(layers: int, micro_batches: int, dp: int, ep: int) -> dict[str, Tensor]:
    """Return the weighted sum of all scopes' gradients; a scope's micro-batch is that of one rank or of all ranks."""
    spread = {"global": (1, 1), "sequence": (1, 1), "micro": (micro_batches * dp, 1)}
    found = [(w, alone(layers, s, *spread.get(s, (micro_batches, dp)), ep)) for s, w in WEIGHTS.items()]
    biases = {name: value for name, value in found[0][1].items() if name.endswith("bias_E")}
    return {name: sum(w * of_scope[name] for w, of_scope in found) for name in found[0][1]} | biases


#: the fewest mappings in which every scope has several ranks
FAST = ("dp 4, ep 2", "tp 2", "pp 2, 1f1b")


@pytest.mark.parametrize("name", slow_but(FAST, [name for name, (_, parallel) in MAPPINGS.items() if runs(parallel)]))
def test_equals_one_process(name: str) -> None:
    assert worst_error(*MAPPINGS[name]) < 1e-6


def worst_error(world: int, parallel: P) -> float:
    """Return the largest relative error of a gradient against one process, over all cases of a mapping.

    Raises AssertionError if a bias differs in a bit, or a gradient is missing.
    """
    pp, errors = parallel.pp, []
    layers = 2 if pp == 1 else pp * parallel.stages_of_rank

    extra = ExtraLossConfig(**{scope: weight for scope, weight in WEIGHTS.items() if scope != "global"})

    def script(rank: int, world: int) -> list[dict[str, Tensor]]:
        mesh = build_mesh(parallel) if world > 1 else None
        return [gradients(make(layers, m, again, extra=extra), mesh, own(mesh, m)) for m, again in cases(parallel, pp)]

    degrees = parallel.resolve(world)
    results = run_ranks(script, world)
    for i, case in enumerate(cases(parallel, pp)):
        want = together(layers, case[0], degrees.dp, degrees.ep)
        assert len([n for n in want if n.endswith("router.weight")]) == layers
        assert all(bool(value.any()) for n, value in want.items() if n.endswith("bias_E"))
        assert all(float(value.norm()) > 1e-6 for n, value in want.items() if n.endswith("router.weight"))
        found = {n: value for result in results for n, value in result[i].items()}
        assert found.keys() >= {n for n in want if ".router." in n}
        errors += [oracle.relative_error(value, want[n]) for result in results for n, value in result[i].items()]
        assert all(torch.equal(value, want[n]) for n, value in found.items() if n.endswith("bias_E")), case
    return max(errors)


@pytest.mark.parametrize("name", slow_but(["fsdp 2"], ["fsdp 2", "cp 2, dp 2, ep 4", "tp 2, dp 2, ep 4", "tp 4"]))
def test_estimators_equal_one_process_in_the_same_order(name: str) -> None:
    """The counts that a backward sees must be those of micro-batches over all ranks, whatever the mapping."""
    world, parallel = MAPPINGS[name]
    estimators, dp = ("rolling", "carry", "adaptive"), parallel.resolve(world).dp

    def script(rank: int, world: int) -> list[dict[str, Tensor]]:
        mesh = build_mesh(parallel) if world > 1 else None
        steps = [own(mesh, 4, dp, step) for step in range(3)]
        return [train(make(2, 4, e == "carry", estimator=e), mesh, steps) for e in estimators]

    want = script(0, 1)
    router = "blocks.0.mlp.router.weight"
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert oracle.relative_error(want[one][router], want[other][router]) > 1e-3
    for result in run_ranks(script, world):
        for i, found in enumerate(result):
            worst = max((oracle.relative_error(value, want[i][n]), n) for n, value in found.items())
            assert worst[0] < 1e-6, (estimators[i], worst)
