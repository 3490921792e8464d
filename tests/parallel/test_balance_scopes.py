"""Checks scopes over all ranks, expert placement, scale conventions, and the expert bias, on several ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as checkpoint_of

from equimoe.moe import (
    BalanceConfig,
    ExtraLossConfig,
    MoE,
    MoEConfig,
    RouterConfig,
    checkpoint,
    counting_pass,
    recompute,
)
from equimoe.moe.parallel import ParallelConfig, build_mesh
from equimoe.moe.parallel.expert import apply_expert_parallel
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import oracle, small
from tests.helpers.fork import run_ranks
from tests.helpers.placed import reduce_by

# G micro-batches, W ranks, E experts
E, K, RATE = 8, 2, 0.01
CONFIG = MoEConfig(8, 8, E, K, balance=BalanceConfig(coefficient=0.7, micro_batches=2), init_std=0.6)


def make(**balance: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(replace(CONFIG, balance=replace(CONFIG.balance, **balance))).double()


def tokens(rank: int, micro_batch: int = 0) -> tuple[Tensor, Tensor]:
    """Return tokens of a different domain, and with a different number of valid ones, on each rank."""
    generator = torch.Generator().manual_seed(100 * micro_batch + rank)
    centre = torch.randn(8, dtype=torch.float64, generator=generator)
    x = torch.randn(12, 8, dtype=torch.float64, generator=generator) + centre
    return x, torch.arange(12) < (12, 5, 0, 9)[(rank + micro_batch) % 4]


def whole(world: int, micro_batch: int = 0) -> tuple[Tensor, Tensor]:
    parts = [tokens(rank, micro_batch) for rank in range(world)]
    return torch.cat([x for x, _ in parts]), torch.cat([mask for _, mask in parts])


def in_ddp(layer: MoE, rank: int, world: int, micro_batches: int = 2) -> Tensor:
    model: Any = DistributedDataParallel(layer) if world > 1 else layer
    for m in range(micro_batches):
        (model(*tokens(rank, m)) * 0).sum().backward()
    return layer.router.weight.grad


@pytest.mark.parametrize("world", [1, 2, 4])
def test_data_parallel_scope_is_one_micro_batch_over_all_ranks(world: int) -> None:
    def script(rank: int, world: int) -> Tensor:
        return in_ddp(make(scope="data_parallel"), rank, world)

    layer = make()
    sum(0.35 * oracle.balance_loss(layer, *whole(world, m)) for m in range(2)).backward()
    for grad in run_ranks(script, world):
        assert oracle.relative_error(grad, layer.router.weight.grad) < 1e-10


@pytest.mark.parametrize("estimator", ["rolling", "carry"])
def test_estimators_do_not_see_how_a_micro_batch_is_spread_over_ranks(estimator: str) -> None:
    """Two steps of two micro-batches on 1, 2 and 4 ranks with the same tokens must give the same gradient."""

    def script(rank: int, world: int) -> list[Tensor]:
        layer = make(estimator=estimator)
        model: Any = DistributedDataParallel(layer) if world > 1 else layer
        optimizer, found = torch.optim.SGD(layer.parameters(), lr=0.0), []
        for step in range(2):
            for m in range(2):
                x, mask = (part.tensor_split(world)[rank] for part in whole(4, 2 * step + m))
                (model(x, mask) * 0).sum().backward()
            found.append(layer.router.weight.grad.clone())
            optimizer.step()
            optimizer.zero_grad()
        return found

    alone = run_ranks(script, 1)[0]
    assert oracle.relative_error(alone[1], alone[0]) > 1e-2
    for world in (2, 4):
        for result in run_ranks(script, world):
            for got, want in zip(result, alone, strict=True):
                assert oracle.relative_error(got, want) < 1e-12


@pytest.mark.parametrize("scope", ["device", "communication"])
def test_losses_of_expert_parallel_ranks_follow_the_placement(scope: str) -> None:
    """With ep=2 on 4 ranks, ep ranks own experts 0-3 and 4-7, and the counts are those of all ranks' tokens."""

    def script(rank: int, world: int) -> tuple[Tensor, int]:
        layer = make(scope=scope)
        apply_expert_parallel(layer, build_mesh(ParallelConfig(ep=2)))
        for m in range(2):
            (layer(*tokens(rank, m)) * 0).sum().backward()
        return layer.router.weight.grad, layer.experts.gate_up_proj.to_local().shape[0]

    layer, loss = make(), torch.zeros(())
    for m in range(2):
        x, mask = whole(4, m)
        _, probs_TE, ids_TK, _ = oracle.route(layer, x[mask])
        side_TK = ids_TK // (E // 2)
        for d in range(2):
            if scope == "device":  # mean of f_i = E/(K T) * choices over the rank's experts
                f = 2 / (K * len(ids_TK)) * int((side_TK == d).sum())
            else:
                f = 2 / (2 * len(ids_TK)) * int((side_TK == d).any(1).sum())
            loss = loss + 0.35 * f * probs_TE[:, d * E // 2 : (d + 1) * E // 2].sum(1).mean()
    loss.backward()
    results = run_ranks(script, 4)
    assert {held for _, held in results} == {E // 2}
    assert oracle.relative_error(sum(grad for grad, _ in results), layer.router.weight.grad) < 1e-10


def test_reach_follows_the_groups() -> None:
    def script(rank: int, world: int, groups: int, kept: int) -> tuple[int, int]:
        layer = MoE(replace(CONFIG, top_k=4, router=RouterConfig(groups=groups, kept_groups=kept)))
        apply_expert_parallel(layer, build_mesh(ParallelConfig(ep=4)))
        layer(tokens(rank)[0].float()).sum().backward()
        view = layer.balancer.view(layer.balancer.visits[0])
        return view.owners.ranks, view.reach

    assert run_ranks(script, 4, 1, 1) == [(4, 4)] * 4
    assert run_ranks(script, 4, 4, 2) == [(4, 2)] * 4
    assert run_ranks(script, 4, 2, 1) == [(4, 2)] * 4  # a group of four experts is on two ranks


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["plain", "reentrant", "non-reentrant", "recompute"])
def test_exact_in_a_troubled_step(kind: str, reduction: str) -> None:
    """The step follows a skipped one, and has evaluations, recomputation and different numbers of tokens per rank."""
    run: dict[str, Any] = {
        "plain": lambda layer, x, mask: layer(x, mask),
        "reentrant": lambda layer, x, mask: checkpoint_of(layer, x.requires_grad_(), mask, use_reentrant=True),
        "non-reentrant": lambda layer, x, mask: checkpoint_of(layer, x, mask, use_reentrant=False),
        "recompute": recompute,
    }

    def script(rank: int, world: int) -> tuple[Tensor, list[int]]:
        layer = make(estimator="exact")
        reduce_by(layer, reduction)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

        def evaluate() -> None:
            layer.eval()
            layer(*tokens(rank, 7))
            layer.train()
            with torch.no_grad():
                layer(*tokens(rank, 8))

        def backward(first: int) -> None:
            with counting_pass():
                for m in range(2):
                    layer(*tokens(rank, first + m))
            for m in range(2):
                evaluate()
                y = run[kind](layer, *tokens(rank, first + m))
                evaluate()
                (y * 0).sum().backward()

        backward(first=4)
        optimizer.zero_grad()  # skipped, as a gradient scaler does
        backward(first=0)
        layer.balancer.step.end(applied=False)
        last = layer.balancer.previous_step
        return layer.router.weight.grad, [*last.counts_E.tolist(), int(last.tokens)]

    layer = make()
    both = [torch.cat(parts) for parts in zip(whole(4, 0), whole(4, 1), strict=True)]
    (0.7 * oracle.balance_loss(layer, *both)).backward()
    results = run_ranks(script, 4)
    joined = torch.stack([grad for grad, _ in results])
    joined = joined.mean(0) if reduction == "mean" else joined.sum(0)
    assert oracle.relative_error(joined, layer.router.weight.grad) < 1e-10
    assert all(total == results[0][1] and total[-1] == 52 for _, total in results)


# ---- the scale in the number of ranks -----------------------------------------------------------------------------


def slope(values: dict[int, float]) -> float:
    """Return the least-squares slope of log(value) over log(ranks)."""
    x = torch.tensor(list(values), dtype=torch.float64).log()
    y = torch.tensor(list(values.values()), dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("convention", "expected"), [("exact", 0.0), ("megatron", -1.0)])
def test_slope_of_the_gradients_scale(convention: str, expected: float, reduction: str) -> None:
    """All ranks hold the same data, so the gradient of a well-defined loss must not depend on the number of ranks."""

    def script(rank: int, world: int) -> float:
        layer = make(scale_convention=convention, extra=ExtraLossConfig(), micro_batches=1)
        reduce_by(layer, reduction)
        if reduction == "mean" and world > 1:
            (DistributedDataParallel(layer)(tokens(0)[0]) * 0).sum().backward()
            return float(layer.router.weight.grad.norm())
        (layer(tokens(0)[0]) * 0).sum().backward()
        return world * float(layer.router.weight.grad.norm())

    found = {world: run_ranks(script, world)[0] for world in (1, 2, 4)}
    assert found[1] > 1e-3
    assert slope(found) == pytest.approx(expected, abs=1e-9)


def test_megatrons_convention_is_of_the_global_loss_alone() -> None:
    def script(rank: int, world: int, scope: str, convention: str) -> Tensor:
        return in_ddp(make(scope=scope, scale_convention=convention), rank, world)

    for scope, factor in (("global", 0.5), ("data_parallel", 1.0), ("micro", 1.0), ("sequence", 1.0)):
        exact, theirs = (run_ranks(script, 2, scope, convention)[0] for convention in ("exact", "megatron"))
        assert oracle.relative_error(theirs, factor * exact) < 1e-12, scope


def test_megatrons_convention_counts_data_parallel_ranks_and_not_those_of_a_sequence() -> None:
    def script(rank: int, world: int, convention: str) -> Tensor:
        layer = make(scale_convention=convention)
        apply_expert_parallel(layer, build_mesh(ParallelConfig(cp=2)))
        for m in range(2):
            (layer(*tokens(rank, m)) * 0).sum().backward()
        return layer.router.weight.grad

    exact, theirs = (sum(run_ranks(script, 4, convention)) for convention in ("exact", "megatron"))
    assert oracle.relative_error(theirs, exact / 2) < 1e-12


# ---- the bias -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "none"])
@pytest.mark.parametrize("world", [2, 4])
def test_bias_moves_alike_on_all_ranks_by_the_load_of_all(wrapper: str, world: int) -> None:
    """A script without our engine runs two micro-batches per step; ranks have different numbers of tokens."""

    def script(rank: int, world: int) -> list[Tensor]:
        layer = make(bias_update_rate=RATE, scope="micro", coefficient=0.0)
        model: Any = layer
        if wrapper == "ddp":
            model = DistributedDataParallel(layer)
        elif wrapper == "fsdp":
            fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, foreach=False)
        found = []
        for _ in range(2):
            for m in range(2):
                model(*tokens(rank, m)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(layer.router.bias_E.clone())
        return found

    layer, counts_E = make(), torch.zeros(E, dtype=torch.int64)
    for m in range(2):
        x, mask = whole(world, m)
        counts_E += torch.bincount(oracle.route(layer, x[mask])[2].flatten(), minlength=E)
    want_E = RATE * (counts_E.double().mean() - counts_E).sign()
    results = run_ranks(script, world)
    for first_E, second_E in results:
        assert first_E.dtype == torch.float32 and torch.equal(first_E, want_E.float())
        moved_E = (second_E - first_E).double() / RATE
        assert torch.allclose(moved_E, moved_E.round(), atol=1e-5) and float(moved_E.abs().max()) <= 1 + 1e-5
        assert torch.equal(second_E, results[0][1])


@pytest.mark.parametrize("parallel", [{}, {"ep": 2, "data_parallel": "fsdp"}, {"pp": 2}], ids=str)
def test_a_resumed_run_goes_on_alike(parallel: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint must hold bias, carried counts and their worth; without them the next steps would differ."""
    texts = small.write_texts(tmp_path / "texts")
    balance = BalanceConfig(coefficient=0.05, estimator="adaptive", bias_update_rate=0.01)
    config = small.on(texts, balance=balance)
    config = replace(config, parallel=replace(config.parallel, **parallel))

    def script(rank: int, world: int) -> tuple[list[Any], list[Any], dict[str, Tensor]]:
        corpus, device = load_corpus(config.data, load_tokenizer("bytes")), torch.device("cpu")

        def trainer() -> Trainer:
            return Trainer(config, corpus, build_mesh(config.parallel), device)

        def go_on(run: Trainer) -> list[Any]:
            records = [run.record(run.train_step()) for _ in range(2)]
            biases = [layer.router.bias_E.tolist() for layer in run.layers.values()]
            return [[(r["loss"], r["grad_norm"]) for r in records], biases]

        first = trainer()
        for _ in range(3):
            first.record(first.train_step())
        path = first.save(tmp_path / "checkpoints")
        second = trainer()
        assert not any(layer.router.bias_E.any() for layer in second.layers.values())
        second.resume(path, checkpoint.read_manifest(path))
        kept = ("bias_E", "step_before", "agreement")
        state = {name: value for name, value in second.state().items() if name.endswith(kept)}
        return go_on(first), go_on(second), {name: value.clone() for name, value in state.items()}

    names: set[str] = set()
    for uninterrupted, resumed, state in run_ranks(script, 2):
        assert resumed == uninterrupted
        assert all(bool(value.any()) for value in state.values())
        names |= state.keys()
    assert names == {f"model.blocks.{i}.mlp.router.bias_E" for i in range(2)} | {
        f"balance.{i}.{name}" for i in range(2) for name in ("step_before", "agreement")
    }
