"""Measures the cost of global-batch balance: step time compared with micro-batch balance, and bytes sent.

    python benchmarks/balance/balance_cost.py [--ranks 1,2,4] [--rounds 20] [--quick] [--out DIR]

Time: the quickstart model trains on forked gloo ranks, data-parallel, with two micro-batches of four sequences per
rank. Scopes take turns step by step in the same processes, and each round starts with another one. The learning rate is
1e-12, so that all scopes route alike and only the balancing differs. The time of a step is that of its slowest rank.
"micro again" repeats the baseline, to show the measurement noise.

Bytes: each rank counts what it sends in a step beyond micro-batch balance. This must be exactly one sum of 8 (E + 1) L
bytes per micro-batch, of which a ring sends 2 (P - 1) / P times, otherwise the command exits with 1. (`exact` also
sends token rows a second time under expert parallelism.) The count is repeated with twice the tokens, and under other
parallelisms with a narrow model, since the formula does not depend on widths. Under context and tensor parallelism,
micro-batch balance sums counts too, over the ranks that hold parts of the same sequences.
"""

# E experts, L MoE layers, P ranks.

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch

from benchmarks.shared.options import Parser, positive
from benchmarks.shared.records import as_lines, facts, load_averages, spent, table, write
from benchmarks.shared.timing import Step, Timer, interleave, summary
from equimoe.launch.env import command
from equimoe.launch.recipes.quickstart import quickstart
from equimoe.launch.text import counted
from equimoe.moe import BalanceConfig, ExtraLossConfig
from equimoe.moe.collectives import LOCAL, record_traffic, sum_over, world_axis
from equimoe.moe.parallel import Mesh, build_mesh
from equimoe.moe.train.config import OptimConfig, ParallelConfig, TrainConfig
from equimoe.moe.train.data import Corpus, load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers.fork import run_ranks

MICRO, AGAIN = "micro", "micro again"
SCOPES = {
    MICRO: BalanceConfig(scope="micro"),
    AGAIN: BalanceConfig(scope="micro"),
    "global, rolling": BalanceConfig(),
    "global, carry": BalanceConfig(estimator="carry"),
    "global, exact": BalanceConfig(estimator="exact"),
    "global + 1 % micro": BalanceConfig(extra=ExtraLossConfig(micro=1e-4)),
    # a rate that does not change the routing
    "bias, global": BalanceConfig(coefficient=0.0, bias_update_rate=1e-9),
}
#: per rank and step
MICRO_BATCHES, SEQUENCES = 2, 4
#: number of ranks, and their parallelism
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
    """Return the quickstart with constant weights and the same amount of work on each data-parallel rank."""
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
    """Build a trainer per scope, with the same weights and data. ``how``: narrow, sequence length, parallelism."""
    data = LOCAL if mesh is None else mesh["dp"]
    configs = {name: training(SCOPES[name], data.size, *how) for name in names}
    return {name: Trainer(config, corpus, mesh, torch.device("cpu")) for name, config in configs.items()}


class Sent(NamedTuple):
    """Bytes that a rank sent in one step."""

    counts: int
    #: everything else, mainly token rows for experts
    rest: int
    #: what ``counts`` should be
    formula: int


def ring(nbytes: int, ranks: int) -> int:
    """Return the bytes that each rank sends when a ring of ranks sums ``nbytes``."""
    return 2 * nbytes * (ranks - 1) // ranks


def formula(name: str, experts: int, layers: int, ranks: int, sequence_ranks: int) -> int:
    """Return the bytes that a rank sends for the counts of one micro-batch.

    ``ranks`` hold different tokens; groups of ``sequence_ranks`` among them hold parts of the same sequences.
    """
    balance, counts = SCOPES[name], 8 * (experts + 1) * layers
    over_all = balance.scope == "global" or balance.bias_update_rate > 0
    of_own = balance.scope == "micro" or balance.extra.micro > 0
    return over_all * ring(counts, ranks) + of_own * ring(counts, sequence_ranks)


def count_bytes(rank: int, world: int, corpus: Corpus, seq_len: int, parallel: dict[str, Any]) -> dict[str, Sent]:
    """Return what this rank sends in a step of each scope, with a narrow model."""
    names = [name for name in SCOPES if name != AGAIN]
    mesh = build_mesh(ParallelConfig(timeout_s=TIMEOUT_S, **parallel)) if world > 1 else None
    made = trainers(names, corpus, mesh, True, seq_len, parallel)
    return {name: sent(name, trainer) for name, trainer in made.items()}


def sent(name: str, trainer: Trainer) -> Sent:
    """Count the bytes of the second step."""
    trainer.train_step(observed=False)
    with record_traffic() as record:
        trainer.train_step(observed=False)
    of_tokens, of_sequence = (1, 1) if trainer.mesh is None else (trainer.mesh[a].size for a in ("stage", "sequence"))
    # sums over pipeline stages are for the gradient norm, those over all ranks for the check of the step's numbers
    counts = sum(entry.sent for entry in record if entry.verb == "sum_over" and entry.axis not in ("pp", "world"))
    want = formula(name, trainer.config.moe.num_experts, len(trainer.layers), of_tokens, of_sequence)
    return Sent(counts, sum(entry.sent for entry in record) - counts, MICRO_BATCHES * want)


def byte_rows(case: str, found: list[dict[str, Sent]]) -> list[dict[str, Any]]:
    """Return a row per scope: what the rank that sends most sends beyond micro-batch balance."""
    rows = []
    for name in found[0]:
        most, base = (max(rank[scope] for rank in found) for scope in (name, MICRO))
        counted, expected, rest = most.counts - base.counts, most.formula - base.formula, most.rest - base.rest
        equal = all(rank[name].counts == rank[name].formula for rank in found)
        rows.append(
            {"case": case, "scope": name, "counted": counted, "formula": expected, "rest": rest, "equal": equal}
        )
    return rows


def time_steps(
    rank: int, world: int, corpus: Corpus, rounds: int, narrow: bool, seq_len: int
) -> tuple[dict[str, list[float]], dict[str, Sent], int]:
    """Return the seconds of each scope's steps on this rank, what they send, and the number of parameters."""
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
    return seconds, {name: sent(name, made[name]) for name in SCOPES}, made[MICRO].parameters


def figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Summarise each scope: median and spread of its steps, median and quartiles of the ratios to micro per round."""
    rows = {}
    for name, runs in seconds.items():
        ratios = [run / base for run, base in zip(runs, seconds[MICRO], strict=True)]
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        rows[name] = {**summary(runs), "ratio": median(ratios), "ratio_low": low, "ratio_high": high}
    return rows


def measure_time(world: int, corpus: Corpus, args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure times on ``world`` ranks, and the bytes of the same runs."""
    before = load_averages()
    found = run_ranks(time_steps, world, corpus, args.rounds, args.quick, args.seq_len, timeout=TIMEOUT_S)
    slowest = {name: [max(runs) for runs in zip(*(one[0][name] for one in found), strict=True)] for name in SCOPES}
    gradients = ring(4 * found[0][2], world)
    times = {"scopes": figures(slowest), "seconds": slowest, "gradient_bytes": gradients, "rounds": args.rounds}
    times |= {"load_before": before, "load_after": load_averages()}
    return times, byte_rows(counted(world, "rank"), [one[1] for one in found])


def measure_bytes(corpus: Corpus, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Count bytes with twice the tokens, and under other parallelisms."""
    rows = []
    for world in args.ranks:
        found = run_ranks(count_bytes, world, corpus, 2 * args.seq_len, {}, timeout=TIMEOUT_S)
        rows += byte_rows(f"{counted(world, 'rank')}, twice the tokens", found)
    for world, parallel in MIXES:
        if world in args.ranks:
            found = run_ranks(count_bytes, world, corpus, args.seq_len, parallel, timeout=TIMEOUT_S)
            rows += byte_rows(f"{counted(world, 'rank')}, " + ", ".join(f"{k} {v}" for k, v in parallel.items()), found)
    return rows


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """Return every deviation from the formula."""
    found = []
    for row in rows:
        where = f"{row['case']}, {row['scope']}"
        found += [f"{where}: differs from the formula"] * (not row["equal"])
        if row["rest"] and SCOPES[row["scope"]].estimator != "exact":
            found.append(f"{where}: {row['rest']} other bytes")
    return found


def byte_table(rows: list[dict[str, Any]]) -> str:
    """Return a table with a row per case and a column per scope."""
    scopes = [name for name in SCOPES if name not in (MICRO, AGAIN)]
    found = {(row["case"], row["scope"]): row for row in rows}
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        here = [found[case, scope] for scope in scopes]
        cells = [f"{r['counted']}" + f", NOT {r['formula']}" * (not r["equal"]) for r in here]
        lines.append([case, str(here[0]["formula"]), *cells, str(max(r["rest"] for r in here))])
    return table(["ranks", "formula", *scopes, "token rows, exact"], lines)


def markdown(result: dict[str, Any]) -> str:
    """Return the whole result as Markdown."""
    lines = [f"# Cost of global-batch balance, {result['facts']['cpu']}", "", *as_lines(result), "", "## Step time", ""]
    lines += ["One thread per rank. Ratio to micro per round: median and quartiles.", ""]
    rows = []
    for world, times in result["times"].items():
        for name, row in times["scopes"].items():
            ratio = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} - {row['ratio_high']:.3f})"
            cells = [f"{row['median_us'] / 1e3:.1f}", f"{row['iqr_us'] / 1e3:.1f}", ratio, str(row["runs"])]
            rows.append([world, name, *cells])
    lines += [table(["ranks", "scope", "median ms", "IQR", "over micro", "rounds"], rows), ""]
    for world, times in result["times"].items():
        loads = f"load average before: {times['load_before']}, after: {times['load_after']}"
        gradients = f"for comparison, gradients of a step: {times['gradient_bytes']:,} bytes per rank"
        lines.append(f"{counted(int(world), 'rank')}: {loads}; {gradients}  ")
    lines += ["", "## Bytes per step and rank beyond micro-batch balance", ""]
    lines += [f"{MICRO_BATCHES} micro-batches. Only what layers send is counted, not gradients. The formula is that of"]
    lines += ["the first scope. Last column: token rows that the counting pass of `exact` sends a second time.", ""]
    lines += [byte_table(result["bytes"]), "", "; ".join(result["wrong"]) or "All numbers equal their formulas."]
    return "\n".join(lines) + "\n"


def numbers(text: str) -> list[int]:
    """Parse a comma-separated list of positive numbers."""
    return [positive(one) for one in text.split(",")]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--ranks", type=numbers, default="1,2,4", help="(default %(default)s)")
    parser.add_argument("--rounds", type=positive, help="steps of each scope (default 20; quick 2)")
    parser.add_argument("--quick", action="store_true", help="a narrow model: right bytes, meaningless times")
    parser.add_out()
    args = parser.parse_args(argv)

    args.rounds = args.rounds or (2 if args.quick else 20)
    args.seq_len = 32 if args.quick else quickstart().data.seq_len
    return args


@command
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    begin, before = time.perf_counter(), load_averages()
    config = training(SCOPES[MICRO], 1, args.quick, args.seq_len, {})
    corpus = load_corpus(config.data, load_tokenizer(config.data.tokenizer))
    command = "python benchmarks/balance/balance_cost.py " + " ".join(sys.argv[1:] if argv is None else argv)
    sizes = {f"moe.{key}": value for key, value in asdict(config.moe).items()} | asdict(config.model)
    settings = {key: value for key, value in sizes.items() if isinstance(value, int) and value}
    settings |= {"micro_batches": MICRO_BATCHES, "micro_batch": SEQUENCES, "seq_len": args.seq_len}
    result: dict[str, Any] = {"facts": facts("numpy"), "command": command.strip(), "settings": settings}
    result |= {"times": {}, "bytes": []}
    for world in args.ranks:
        result["times"][str(world)], rows = measure_time(world, corpus, args)
        result["bytes"] += rows
        print(f"{counted(world, 'rank')} timed", file=sys.stderr, flush=True)
    result["bytes"] += measure_bytes(corpus, args)
    result["wrong"] = wrong(result["bytes"])
    result |= spent(begin, before)
    text = markdown(result)
    print(text)
    print("written:", *write(result, text, args.out, "balance_cost" + "-quick" * args.quick))
    return min(len(result["wrong"]), 1)


if __name__ == "__main__":
    sys.exit(main())
