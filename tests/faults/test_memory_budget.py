"""Checks that a layer under a memory budget computes the same in parts, or stops alike on all ranks."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.launch import env
from equimoe.launch.options import to_yaml
from equimoe.moe import BalanceConfig, DispatchConfig, MoE, MoEConfig, recompute
from equimoe.moe.collectives import record_traffic
from equimoe.moe.dispatch import BudgetedDispatcher, OverBudgetError
from equimoe.moe.dispatch.budgeted import Budget, Load
from equimoe.moe.placement import Placement
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.command import launch
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but
from tests.parallel.test_dispatchers import CASES, CONFIG, axes, backward, batch, make, shard

LIMITED = replace(CONFIG, dispatch=DispatchConfig(memory_mb=1))
Wrap = Callable[..., Tensor]


def tighten(layer: MoE, fits: int) -> None:
    """Let the budget be ``fits`` rows, far less than the MiB that a configuration can express."""
    assert isinstance(layer.dispatcher, BudgetedDispatcher)
    budget = replace(layer.dispatcher.budget, values=((1 << 20) // fits - 24) // 8)
    layer.dispatcher.budget = budget
    assert (1 << 20) // budget.bytes_of(1, 8) == fits


def train(rank: int, fits: int | None, ep: int, etp: int, case: str, wrap: Wrap | None = None) -> dict[str, Any]:
    """Return output and gradients of a layer on this rank, and the exchanges of rows that they took."""
    lengths, prepare, masked = CASES[case]
    layer = make(CONFIG if fits is None else LIMITED, prepare)
    ep_axis, etp_axis = axes(ep, etp)
    shard(layer, ep_axis, etp_axis)
    layer.place(Placement(ep=ep_axis, etp=etp_axis))
    if fits is not None:
        tighten(layer, fits)
    if wrap is not None:
        layer.forward = partial(wrap, layer.forward)  # type: ignore[method-assign]
    with record_traffic() as traffic:
        found: dict[str, Any] = backward(layer, *batch(rank, lengths, masked))
    return found | {"exchanges": sum(one.verb == "exchange_rows" for one in traffic)}


def compare(plain: dict[str, Any], parts: dict[str, Any]) -> float:
    """Check that outputs and gradients are equal up to rounding; return the largest difference."""
    worst = 0.0
    for name in plain.keys() - {"exchanges"}:
        torch.testing.assert_close(parts[name], plain[name], rtol=1e-11, atol=1e-12)
        worst = max(worst, float((parts[name] - plain[name]).abs().max()) if plain[name].numel() else 0.0)
    return worst


@pytest.mark.parametrize(
    ("ep", "etp", "case"),
    slow_but(
        [(2, 1, "one rank's experts"), (2, 2, "unequal"), (2, 1, "zero")],
        [(ep, etp, case) for ep, etp in ((2, 1), (4, 1), (2, 2)) for case in CASES],
    ),
)
def test_parts_give_the_same_outputs_and_gradients(ep: int, etp: int, case: str) -> None:
    """The budget is one row more than the runs, so that there are as many parts as possible."""

    def body(rank: int, world: int) -> list[dict[str, Any]]:
        return [train(rank, fits, ep, etp, case) for fits in (None, 8 * etp + 1)]

    found = run_ranks(body, ep * etp)
    worst = max(compare(plain, parts) for plain, parts in found)
    more = [parts["exchanges"] - plain["exchanges"] for plain, parts in found]
    assert len(set(more)) == 1 and (more[0] > 0) == (case != "nothing")
    report("34", "equal in parts", case=case, ep=ep, etp=etp, error=worst)


@pytest.mark.parametrize("keep", [False, True])
def test_recomputation_of_a_layer_in_parts(keep: bool) -> None:
    def body(rank: int, world: int) -> list[dict[str, Any]]:
        wrap = partial(recompute, keep_exchanges=keep)
        return [train(rank, fits, 2, 1, "one rank's experts", wrap) for fits in (None, 9)]

    assert max(compare(*found) for found in run_ranks(body, 2)) < 1e-12


def test_a_budget_that_suffices_changes_no_bit() -> None:
    def body(rank: int, world: int) -> list[dict[str, Any]]:
        return [train(rank, fits, 2, 1, "unequal") for fits in (None, 500)]

    for plain, parts in run_ranks(body, 2):
        assert compare(plain, parts) == 0.0 and parts["exchanges"] == plain["exchanges"]


@pytest.mark.parametrize(("fits", "stops"), [(6, False), (20, True)])
def test_all_ranks_stop_alike(fits: int, stops: bool) -> None:
    """If no parts fit, or if the user wants to stop, all ranks do, before any row is sent."""

    def body(rank: int, world: int) -> tuple[str, int]:
        lengths, prepare, masked = CASES["one rank's experts"]
        layer = make(LIMITED, prepare)
        ep, etp = axes(2, 1)
        shard(layer, ep, etp)
        layer.place(Placement(ep=ep, etp=etp))
        tighten(layer, fits)
        dispatcher: Any = layer.dispatcher
        dispatcher.budget = replace(dispatcher.budget, stops=stops)
        with record_traffic() as traffic, pytest.raises(OverBudgetError) as stopped:
            backward(layer, *batch(rank, lengths, masked))
        return str(stopped.value), sum(one.verb == "exchange_rows" for one in traffic)

    first, second = run_ranks(body, 2)
    assert first == second and first[1] == 0
    assert "expert-parallel rank 0 would receive" in first[0] and "for expert 0; moe.dispatch.memory_mb=1 " in first[0]
    assert ("allows no such imbalance" if stops else "too little even in parts") in first[0]


def test_the_number_of_parts() -> None:
    budget = Budget(limit=1, values=(1 << 20) // 100 // 4 - 6, stops=False)
    assert (1 << 20) // budget.bytes_of(1, 4) == 100
    for rows, runs in ((0, 0), (100, 100), (101, 8), (1000, 8), (10_000, 99), (150, 10)):
        parts = budget.parts([Load(rows, runs, 0, rows), Load(5, 2, 0, 5)], 4)
        largest = (rows - runs) / parts + runs
        assert largest <= 100 and (parts == 1 or (rows - runs) / (parts - 1) + runs > 100)
    assert budget.parts([Load(101, 100, 0, 1)], 4) == 0
    assert replace(budget, stops=True).parts([Load(101, 8, 0, 1)], 4) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_mb": 0}, "dispatch.memory_mb=0: must be at least 1"),
        ({"memory_mb": 5, "name": "all_gather"}, "needs dispatch.name='all_to_all'"),
        ({"over_memory": "ignore"}, "dispatch.over_memory='ignore': use one of chunk, stop"),
    ],
)
def test_wrong_budgets(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DispatchConfig(**options)


# ---- peak memory


@dataclass(frozen=True)
class Size:
    """A layer whose router has collapsed, and its budget in MiB."""

    hidden: int
    width: int
    #: on each of two ranks
    tokens: int
    budget: int


SMALL, LARGE = Size(64, 128, 6000, 12), Size(256, 512, 6000, 64)


def peak_mib(work: Callable[[], Any]) -> float:
    """Return by how many MiB the process grows at most while ``work`` runs."""

    def read(name: str) -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = read("VmRSS:")
    work()
    return (read("VmHWM:") - before) / 1024


def collapsed(rank: int, size: Size, memory_mb: int | None) -> tuple[dict[str, Tensor], float]:
    """Train a step in which all tokens of both ranks choose the two experts of rank 0; return also the peak memory."""
    torch.manual_seed(0)
    none, dispatch = BalanceConfig(coefficient=0.0), DispatchConfig(memory_mb=memory_mb)
    layer = MoE(MoEConfig(size.hidden, size.width, 4, 2, balance=none, dispatch=dispatch, backend="torch"))
    with torch.no_grad():
        layer.router.weight.copy_(-torch.arange(4.0)[:, None].expand(4, size.hidden))
    ep, etp = axes(2, 1)
    experts = layer.experts
    for name, weight in list(experts.named_parameters()):
        setattr(experts, name, torch.nn.Parameter(weight.detach().chunk(2)[rank].clone()))
    layer.place(Placement(ep=ep, etp=etp))
    x_TD = torch.rand(size.tokens, size.hidden, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    kept: dict[str, Tensor] = {}

    def step() -> None:
        y_TD = layer(x_TD)
        y_TD.square().mean().backward()
        kept["y"] = y_TD.detach()

    peak = peak_mib(step)
    return kept | {"x": x_TD.grad} | {n: p.grad for n, p in layer.named_parameters()}, peak


@pytest.mark.parametrize("size", [SMALL, pytest.param(LARGE, marks=pytest.mark.faults)], ids=["small", "large"])
def test_a_collapsed_router_stays_within_its_budget(size: Size) -> None:
    """Rank 0 receives all rows of both ranks, three to five times what its budget allows."""

    def body(rank: int, world: int, memory_mb: int | None) -> tuple[dict[str, Tensor], float]:
        collapsed(rank, replace(size, tokens=10), None)  # what the process needs anyway
        return collapsed(rank, size, memory_mb)

    # each in processes of its own, because the second one would use what the first has freed
    at_once, in_parts = (run_ranks(body, 2, memory_mb) for memory_mb in (None, size.budget))
    worst = max(
        float((parts[n] - v).abs().max() / v.abs().max().clamp_min(1e-30))
        for (whole, _), (parts, _) in zip(at_once, in_parts, strict=True)
        for n, v in whole.items()
    )
    (_, whole), (_, peak) = at_once[0], in_parts[0]
    report("34", "within the budget", mib_at_once=round(whole), mib_in_parts=round(peak), error=worst)
    assert worst < 1e-5
    rows = 4 * size.tokens
    saved = Budget(size.budget, 2 * size.hidden + 3 * size.width, False).bytes_of(rows, 4) / (1 << 20) - size.budget
    assert 0 < peak < whole - 0.7 * saved, (whole, peak, saved)


# ---- the training command


def command(folder: Path, world: int, within: Any = None, **dispatch: Any) -> Any:
    config = small.on(small.write_texts(folder / "texts"), ep=world, steps=2, dispatch=DispatchConfig(**dispatch))
    (folder / "small.yaml").write_text(to_yaml(config))
    more = {} if within is None else {"within": within}
    return launch(["--config", str(folder / "small.yaml"), "--run-dir", str(folder / "run")], world, **more)


@contextmanager
def one_row() -> Iterator[None]:
    """Let no more than ten rows fit, in every layer."""
    Budget.bytes_of = lambda self, rows, item: rows * 100_000  # type: ignore[method-assign]
    yield


def test_the_command_stops_all_ranks_and_names_layer_and_expert(tmp_path: Path) -> None:
    ended = command(tmp_path, 2, one_row, memory_mb=1, over_memory="stop")
    assert ended.codes == [env.MEMORY] * 2 and len(ended.errors) == 1, ended
    line = ended.errors[0]
    assert ", step 1, phase first step: out of memory: MoE layer of block 0: expert-parallel rank " in line
    assert "times the mean" in line and "for expert " in line
    report("34", "exit 77 on all ranks", seconds=round(ended.seconds, 2))


def test_running_out_of_memory_names_the_layer(tmp_path: Path) -> None:
    """RLIMIT_AS makes the allocator fail in the second step, in the second block."""

    @contextmanager
    def within() -> Iterator[None]:
        real, rounds = MoE.forward, []

        def forward(self: MoE, *args: Any) -> Tensor:
            rounds.append(self)
            if len(rounds) == 4 * 2 + 2:  # four micro-batches of two layers, and then the second layer
                now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 20), now + (1 << 20)))
                args = (args[0][:, :1].expand(-1, 1 << 20, -1), None)  # more tokens than fit
            return real(self, *args)

        MoE.forward = forward  # type: ignore[method-assign]
        yield

    ended = command(tmp_path, 1, within)
    assert ended.codes == [env.MEMORY] and len(ended.errors) == 1, ended
    line = ended.errors[0]
    assert line.startswith("error: rank 0, step 2, phase step: out of memory: MoE layer of block 1: ")
    assert "can't allocate memory" in line
    report("34", "exit 77, layer named", limit="RLIMIT_AS")
