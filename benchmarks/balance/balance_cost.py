"""What global-batch balance costs: step time beside the micro-batch loss, and bytes beside the closed formula.

    python benchmarks/balance_cost.py [--ranks 1,2,4] [--rounds 20] [--quick] [--out DIR]

The quickstart's model trains on forked gloo ranks, data-parallel, two micro-batches of four sequences on each; scopes
take turns, step by step, in the same processes, each round beginning with another one. The weights stand still (a
learning rate of 1e-12), so that all scopes route alike and what is timed is the balancing itself, not where it leads.
A step's time is that of its slowest rank. "micro again" is the control: what the clock cannot tell from 1.

A rank counts what it sends for a step beyond what the micro-batch loss sends. That has to be a sum of 8 (E + 1) L
bytes for each micro-batch, which a ring sends 2 (P - 1) / P times, and not a byte more: else the command exits with 1.
(Except that a counting pass sends rows to experts once more, where these are split over ranks.) It is counted again
with twice the tokens, and under other compositions of parallelisms, of a narrow model with as many layers and experts:
the formula knows no widths. There, ranks that hold parts of the same sequences sum counts for the micro-batch loss too.
"""

# E experts, L layers of MoE, P ranks.

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.shared.options import Parser
from benchmarks.shared.records import as_lines, facts, load_averages, spent, table, write
from benchmarks.shared.timing import Step, Timer, interleave, summary
from equimoe.launch.recipes.quickstart import quickstart
from equimoe.moe import BalanceConfig, ExtraLossConfig
from equimoe.moe.collectives import LOCAL, Traffic, record_traffic, sum_over, world_axis
from equimoe.moe.parallel import Mesh, build_mesh
from equimoe.moe.train.config import OptimConfig, ParallelConfig, TrainConfig
from equimoe.moe.train.data import Corpus, load_corpus, load_tokenizer
from equimoe.moe.train.loop import Trainer
from tests.helpers.fork import run_ranks

MICRO, AGAIN = "micro", "micro again"
SCOPES = {
    MICRO: BalanceConfig(scope="micro"),
    AGAIN: BalanceConfig(scope="micro"),
    "global, rolling": BalanceConfig(),
    "global, carry": BalanceConfig(estimator="carry"),
    "global, exact": BalanceConfig(estimator="exact"),
    "global + 1 % micro": BalanceConfig(extra=ExtraLossConfig(micro=1e-4)),
    # a rate that leaves the routing as it is
    "bias, global": BalanceConfig(coefficient=0.0, bias_update_rate=1e-9),
}
#: each rank's part of a step
MICRO_BATCHES, SEQUENCES = 2, 4
#: ranks, and how they share the work
MIXES: list[tuple[int, dict[str, Any]]] = [
    (2, {"ep": 2}),
    (2, {"data_parallel": "fsdp", "ep": 2}),
    (2, {"cp": 2}),
    (2, {"tp": 2}),
    (2, {"pp": 2}),
    (4, {"ep": 2}),
    (4, {"ep": 4}),
    (4, {"cp": 2, "ep": 2}),
    (4, {"tp": 2, "ep": 4}),
    (4, {"pp": 2, "ep": 2}),
]
TIMEOUT_S = 3600.0


def training(
    balance: BalanceConfig, data_ranks: int, narrow: bool, seq_len: int, parallel: dict[str, Any]
) -> TrainConfig:
    """The quickstart with its weights standing still, and equally much work on each data-parallel rank."""
    config = quickstart()
    model = replace(config.model, vocab_size=264)  # even, for tensor parallelism
    moe = replace(config.moe, balance=balance)
    if narrow:
        model, moe = (
            replace(model, num_heads=2, intermediate_size=32),
            replace(moe, hidden_size=24, intermediate_size=16),
        )
    data = {"seq_len": seq_len, "micro_batch": SEQUENCES, "global_batch": SEQUENCES * MICRO_BATCHES * data_ranks}
    return replace(
        config,
        model=model,
        moe=moe,
        data=replace(config.data, **data, builtin_bytes_per_domain=200_000),  # type: ignore[arg-type]
        optim=OptimConfig(lr=1e-12, warmup_steps=0),
        parallel=ParallelConfig(timeout_s=TIMEOUT_S, **parallel),
    )


def trainers(names: list[str], corpus: Corpus, mesh: Mesh | None, *how: Any) -> dict[str, Trainer]:
    """One for each scope, with the same weights and data. ``how``: narrow, tokens of a sequence, parallelism."""
    data = LOCAL if mesh is None else mesh["dp"]
    configs = {name: training(SCOPES[name], data.size, *how) for name in names}
    return {name: Trainer(config, corpus, mesh, torch.device("cpu")) for name, config in configs.items()}


class Sent(NamedTuple):
    """Bytes that a rank sent in one step."""

    counts: int
    #: by any other verb: rows of tokens to experts, above all
    rest: int
    #: sums of counts
    collectives: int

    @staticmethod
    def of(record: list[Traffic]) -> Sent:
        # what pipeline stages sum is the gradient's norm
        counts = [entry.sent for entry in record if entry.verb == "sum_over" and entry.axis != "pp"]
        return Sent(sum(counts), sum(entry.sent for entry in record) - sum(counts), len(counts))


def ring(nbytes: int, ranks: int) -> int:
    """Bytes that a rank sends when a ring of them sums ``nbytes``."""
    return 2 * nbytes * (ranks - 1) // ranks


def formula(name: str, experts: int, layers: int, ranks: int, sequence_ranks: int) -> int:
    """Bytes that a rank sends for the counts of one micro-batch: of a scope, among ``ranks`` with other tokens, of
    which ``sequence_ranks`` hold parts of the same sequences."""
    balance, counts = SCOPES[name], 8 * (experts + 1) * layers
    over_all = balance.scope == "global" or balance.bias_update_rate > 0
    of_own = balance.scope == "micro" or balance.extra.micro > 0
    return over_all * ring(counts, ranks) + of_own * ring(counts, sequence_ranks)


def count_bytes(
    rank: int, world: int, corpus: Corpus, seq_len: int, parallel: dict[str, Any], narrow: bool = True
) -> dict[str, tuple[Sent, int]]:
    """What this rank sends in a step of each scope, and what the formula says of it for one micro-batch."""
    names = [name for name in SCOPES if name != AGAIN]
    mesh = build_mesh(ParallelConfig(timeout_s=TIMEOUT_S, **parallel)) if world > 1 else None
    made = trainers(names, corpus, mesh, narrow, seq_len, parallel)
    return {name: counted(name, trainer) for name, trainer in made.items()}


def counted(name: str, trainer: Trainer) -> tuple[Sent, int]:
    """Bytes of one step, after one that has shown how many layers there are; and the formula for a micro-batch."""
    trainer.train_step(observed=False)
    with record_traffic() as record:
        trainer.train_step(observed=False)
    of_tokens, of_sequence = (1, 1) if trainer.mesh is None else (trainer.mesh[a].size for a in ("stage", "sequence"))
    experts, layers = trainer.config.moe.num_experts, len(trainer.layers)
    return Sent.of(record), formula(name, experts, layers, of_tokens, of_sequence)


def byte_rows(case: str, found: list[dict[str, tuple[Sent, int]]]) -> list[dict[str, Any]]:
    """A row per scope, of the rank that sends most; ``equal`` if every rank sends what the formula says."""
    rows = []
    for name in found[0]:
        sent, want = max(rank[name] for rank in found)
        base, base_want = max(rank[MICRO] for rank in found)
        equal = all(each.counts == MICRO_BATCHES * formula for each, formula in (rank[name] for rank in found))
        beyond, expected = sent.counts - base.counts, MICRO_BATCHES * (want - base_want)
        row = {"case": case, "scope": name, "counted": beyond, "formula": expected, "all_counts": sent.counts}
        rows.append({**row, "rest": sent.rest - base.rest, "collectives": sent.collectives, "equal": equal})
    return rows


def time_steps(
    rank: int, world: int, corpus: Corpus, rounds: int, narrow: bool, seq_len: int
) -> tuple[dict[str, list[float]], dict[str, tuple[Sent, int]], int]:
    """Seconds of each scope's steps on this rank, what they send, and the number of parameters."""
    mesh = build_mesh(ParallelConfig(timeout_s=TIMEOUT_S)) if world > 1 else None
    made = trainers(list(SCOPES), corpus, mesh, narrow, seq_len, {})

    def step(trainer: Trainer) -> Step:
        def run(mark: Any) -> None:
            sum_over(torch.zeros(1), world_axis()).get()  # begin together
            mark()
            trainer.train_step(observed=False)
            mark()

        return run

    steps = {name: step(trainer) for name, trainer in made.items()}
    parts, _ = interleave(Timer(torch.device("cpu")), steps, rounds, 0.0, list(SCOPES))
    seconds = {name: [sum(run) for run in runs] for name, runs in parts.items()}
    return seconds, {name: counted(name, made[name]) for name in SCOPES}, made[MICRO].parameters


def ranks_of(world: int | str) -> str:
    return "1 rank" if int(world) == 1 else f"{world} ranks"


def figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Of each scope: the steps' median and spread, and the median and quartiles of its rounds' ratios to micro."""
    rows = {}
    for name, runs in seconds.items():
        ratios = [run / base for run, base in zip(runs, seconds[MICRO], strict=True)]
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        rows[name] = {**summary(runs), "ratio": median(ratios), "ratio_low": low, "ratio_high": high}
    return rows


def measure_time(world: int, corpus: Corpus, args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Times on ``world`` ranks, and the bytes of the same runs."""
    before = load_averages()
    found = run_ranks(time_steps, world, corpus, args.rounds, args.quick, args.seq_len, timeout=TIMEOUT_S)
    slowest = {name: [max(runs) for runs in zip(*(one[0][name] for one in found), strict=True)] for name in SCOPES}
    gradients = ring(4 * found[0][2], world)
    times = {"scopes": figures(slowest), "seconds": slowest, "gradient_bytes": gradients, "rounds": args.rounds}
    times |= {"load_before": before, "load_after": load_averages()}
    return times, byte_rows(ranks_of(world), [one[1] for one in found])


def measure_bytes(corpus: Corpus, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes with twice the tokens, and of the compositions."""
    rows = []
    for world in args.ranks:
        found = run_ranks(count_bytes, world, corpus, 2 * args.seq_len, {}, timeout=TIMEOUT_S)
        rows += byte_rows(f"{ranks_of(world)}, twice the tokens", found)
    for world, parallel in MIXES:
        if world in args.ranks:
            found = run_ranks(count_bytes, world, corpus, args.seq_len, parallel, timeout=TIMEOUT_S)
            rows += byte_rows(f"{ranks_of(world)}, " + ", ".join(f"{k} {v}" for k, v in parallel.items()), found)
    return rows


def wrong(result: dict[str, Any]) -> list[str]:
    """What differs from the formula, or changes with the tokens."""
    rows = {(row["case"], row["scope"]): row for row in result["bytes"]}
    found = []
    for (case, scope), row in rows.items():
        if not row["equal"] or row["counted"] != row["formula"]:
            found.append(f"{case}, {scope}: not the formula")
        if row["rest"] and SCOPES[scope].estimator != "exact":
            found.append(f"{case}, {scope}: {row['rest']} bytes of something else")
        twice = rows.get((f"{case}, twice the tokens", scope))
        if twice is not None and twice["counted"] != row["counted"]:
            found.append(f"{case}, {scope}: not the same bytes with twice the tokens")
    return found


def byte_table(rows: list[dict[str, Any]]) -> str:
    """A row per case, a column per scope."""
    scopes = [name for name in SCOPES if name not in (MICRO, AGAIN)]
    found = {(row["case"], row["scope"]): row for row in rows}
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        here = [found[case, scope] for scope in scopes]
        cells = [f"{r['counted']}" + f", NOT {r['formula']}" * (not r["equal"]) for r in here]
        lines.append([case, str(here[0]["formula"]), *cells, str(max(r["rest"] for r in here))])
    return table(["ranks", "formula", *scopes, "rows again, exact"], lines)


def markdown(result: dict[str, Any]) -> str:
    """The whole result as text."""
    lines = [f"# Cost of global-batch balance, {result['facts']['cpu']}", "", *as_lines(result), "", "## Step time", ""]
    lines += ["Steps in turns, on each rank's own thread; ratio to micro, round by round: median and quartiles.", ""]
    rows = []
    for world, times in result["times"].items():
        for name, row in times["scopes"].items():
            ratio = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} - {row['ratio_high']:.3f})"
            cells = [f"{row['median_us'] / 1e3:.1f}", f"{row['iqr_us'] / 1e3:.1f}", ratio, str(row["runs"])]
            rows.append([world, name, *cells])
    lines += [table(["ranks", "scope", "median ms", "IQR", "over micro", "rounds"], rows), ""]
    for world, times in result["times"].items():
        loads = f"load average before: {times['load_before']}, after: {times['load_after']}"
        lines.append(
            f"{ranks_of(world)}: {loads}; gradients of a step, by formula: {times['gradient_bytes']:,} bytes a rank  "
        )
    lines += ["", "## Bytes of a step that a rank sends beyond the micro-batch loss's", ""]
    lines += [f"{MICRO_BATCHES} micro-batches. Counted is what the layers send; gradients, which no scope changes, are"]
    lines += ["not. Counts, the formula being that of the first scope; and rows of tokens, which the counting pass of"]
    lines += ["`exact` sends once more where experts are split over ranks.", "", byte_table(result["bytes"]), ""]
    bad = result["wrong"]
    lines.append("; ".join(bad) if bad else "Every figure equals its formula; twice the tokens, no byte more.")
    return "\n".join(lines) + "\n"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--ranks", default="1,2,4", help="(default %(default)s)")
    parser.add_argument("--rounds", type=int, help="of all scopes (default 20; quick 2)")
    parser.add_argument("--quick", action="store_true", help="a narrow model: bytes are right, times say nothing")
    parser.add_out()
    args = parser.parse_args(argv)
    args.ranks = [int(text) for text in args.ranks.split(",")]
    args.rounds = args.rounds or (2 if args.quick else 20)
    args.seq_len = 32 if args.quick else quickstart().data.seq_len
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(1)
    begin, before = time.perf_counter(), load_averages()
    config = training(SCOPES[MICRO], 1, args.quick, args.seq_len, {})
    corpus = load_corpus(config.data, load_tokenizer(config.data.tokenizer))
    command = "python benchmarks/balance_cost.py " + " ".join(sys.argv[1:] if argv is None else argv)
    moe = asdict(config.moe)
    sizes = moe | asdict(config.model) | {"moe_intermediate_size": moe["intermediate_size"]}
    settings = {key: value for key, value in sizes.items() if isinstance(value, int) and value}
    settings |= {"micro_batches": MICRO_BATCHES, "micro_batch": SEQUENCES, "seq_len": args.seq_len}
    result: dict[str, Any] = {
        "facts": facts("numpy"),
        "command": command.strip(),
        "settings": settings,
        "times": {},
        "bytes": [],
    }
    for world in args.ranks:
        result["times"][str(world)], rows = measure_time(world, corpus, args)
        result["bytes"] += rows
        print(f"{ranks_of(world)} timed", file=sys.stderr, flush=True)
    result["bytes"] += measure_bytes(corpus, args)
    result["wrong"] = wrong(result)
    result |= spent(begin, before)
    text = markdown(result)
    print(text)
    print("written:", *write(result, text, args.out, "balance_cost" + "-quick" * args.quick))
    return min(len(result["wrong"]), 1)


if __name__ == "__main__":
    sys.exit(main())
