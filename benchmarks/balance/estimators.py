"""Measures how close each estimator of a step's load comes to the exact gradient, on real routers during training.

    python benchmarks/balance/estimators.py [--quick] [--out DIR]

A small model is trained on the text that comes with Python, balanced over whole steps. At four stages of training, the
layers' own balancers compute the gradient of the balance loss alone, micro-batch by micro-batch, and it is compared
with a single pass over the whole step. Everything is in fp64, so that only the estimate differs. ``carry`` and
``adaptive`` get the counts of the steps before, each routed with the weights of its own step.

The step is divided into M micro-batches in three orders:
    shuffled    the order of the training data
    by domain   sorted by domain, in every step alike, so that most micro-batches have one domain
    drifting    shuffled, but half of each step is from one domain, which changes with every step
"""

# L layers, M micro-batches, B sequences, S tokens of each, E experts, D hidden, N values.

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch
from torch import Tensor

from benchmarks.shared.options import Parser
from benchmarks.shared.records import as_lines, facts, load_averages, spent, table, write
from equimoe.launch.env import command
from equimoe.moe import BalanceConfig, MoEConfig, counting_pass
from equimoe.moe.balance import Balancer
from equimoe.moe.model import Decoder
from equimoe.moe.observe import estimate_quality
from equimoe.moe.train.config import DataConfig, ModelConfig, TrainConfig
from equimoe.moe.train.data import Batches, Corpus, load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from equimoe.moe.types import load_summary

ESTIMATORS = ("rolling", "carry", "adaptive", "exact")
#: steps before the measured one that ``adaptive`` has seen, if there are so many
HISTORY = 12
ORDERS = ("shuffled", "by domain", "drifting")

#: every step is one micro-batch, so all estimators would train the same model
CONFIG = TrainConfig(
    steps=150,
    model=ModelConfig(num_layers=4, num_heads=4, intermediate_size=192),
    moe=MoEConfig(96, 96, num_experts=8, top_k=2, balance=BalanceConfig(scope="global", coefficient=0.01)),
    data=DataConfig(seq_len=64, global_batch=96, micro_batch=96, builtin_bytes_per_domain=1_000_000),
)
QUICK = replace(
    CONFIG,
    steps=12,
    model=replace(CONFIG.model, num_layers=2, num_heads=2),
    moe=replace(CONFIG.moe, hidden_size=32, intermediate_size=32),
    data=replace(CONFIG.data, seq_len=32, global_batch=32, micro_batch=32, builtin_bytes_per_domain=50_000),
)


@dataclass(frozen=True)
class Plan:
    """The model to train, and the measurements to take."""

    config: TrainConfig
    #: name -> number of steps trained before it
    stages: dict[str, int]
    micro_batches: tuple[int, ...]
    #: number of steps of data measured at each stage; ``exact`` is measured on the first only
    trials: int


FULL = Plan(CONFIG, {"start": 1, "warm-up": 10, "middle": 75, "end": 150}, (2, 4, 8, 16, 32), 2)
SHORT = Plan(QUICK, {"start": 1, "end": 12}, (2, 4, 8), 1)


@dataclass(frozen=True)
class Pass:
    """Results of one pass over a step, per layer."""

    #: of the routers, [E, D]
    gradients: list[Tensor]
    #: ``estimator_error`` and ``gradient_error`` of :func:`estimate_quality`
    estimator_error: list[float]
    gradient_error: list[float]
    #: fp64 [E]: each expert's share of the step's tokens
    load: list[Tensor]


def frozen(model: Decoder, dtype: torch.dtype = torch.float64) -> Decoder:
    """Return a copy of the model without its head, in which only the routers have gradients."""
    copy = deepcopy(model).to(dtype).train().requires_grad_(False)
    copy.head = None
    for layer in copy.moe_layers():
        layer.router.weight.requires_grad_(True)
    return copy


def balancers(
    model: Decoder, estimator: str, micro_batches: int, before: Sequence[Sequence[Tensor]] = ()
) -> list[Balancer]:
    """Give each layer a new balancer with coefficient 1.

    ``before`` has, for each earlier step and layer, the counts and tokens of its parts, int64 [parts, E + 1].
    """
    config = BalanceConfig(coefficient=1.0, estimator=estimator, micro_batches=micro_batches)  # type: ignore[arg-type]
    layers = model.moe_layers()
    for i, layer in enumerate(layers):
        layer.balancer = Balancer(config, layer.config.num_experts, layer.config.top_k)
        for step in before:
            layer.balancer.observe(step[i].unflatten(0, (micro_batches, -1)).sum(1))
    return [layer.balancer for layer in layers]


def count(model: Decoder, inputs_BS: Tensor, parts: int) -> list[Tensor]:
    """Route a step without training on it; return each layer's counts and tokens of its parts, int64 [parts, E + 1]."""
    found = []
    for part in inputs_BS.chunk(parts):
        made = balancers(model, "rolling", 1)
        with counting_pass():
            model(part)
        for balancer in made:
            balancer.step.end(applied=False)
        found.append([balancer.previous_step.total_X for balancer in made if balancer.previous_step is not None])
    return [torch.stack(of_layer) for of_layer in zip(*found, strict=True)]


def gradients(
    model: Decoder, inputs_BS: Tensor, micro_batches: int, estimator: str, before: Sequence[Sequence[Tensor]] = ()
) -> Pass:
    """Compute the routers' gradients of the balance loss, through all layers, of a step in several micro-batches.

    The model's output is multiplied by zero, so that only the attached balance losses have a gradient.
    """
    made, weights = balancers(model, estimator, micro_batches, before), []
    for layer in model.moe_layers():
        layer.router.weight.grad = None
        weights.append(layer.router.weight)
    parts = inputs_BS.chunk(micro_batches)
    if len(parts) != micro_batches or len({len(part) for part in parts}) > 1:
        raise ValueError(f"micro_batches={micro_batches}: must divide the step's {len(inputs_BS)} sequences")
    if estimator == "exact":
        with counting_pass():
            for part in parts:
                model(part)
    for part in parts:
        (model(part) * 0).sum().backward()
    for balancer in made:
        balancer.step.end(applied=False)
    steps = [balancer.previous_step for balancer in made if balancer.previous_step is not None]
    quality = [estimate_quality(step) for step in steps]
    return Pass(
        gradients=[weight.grad.clone() for weight in weights if weight.grad is not None],
        estimator_error=[one["estimator_error"] for one in quality],
        gradient_error=[one["gradient_error"] for one in quality],
        load=[step.local_counts_ME.sum(0).double() / step.local_tokens_M.sum() for step in steps],
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


def cosine(got: Tensor, want: Tensor) -> float:
    got, want = got.double().flatten(), want.double().flatten()
    return float(got @ want / (got.norm() * want.norm()).clamp_min(1e-300))


class Steps:
    """Provides a step of data and its predecessor in each order, as inputs [B, S]."""

    def __init__(self, corpus: Corpus, config: TrainConfig) -> None:
        self.batch = config.data.global_batch
        size = config.data.seq_len, self.batch, config.seed
        self.all = Batches(corpus.train, *size)
        self.alone = [Batches({name: stream}, *size) for name, stream in corpus.train.items() if len(stream)]

    def _read(self, batches: Batches, step: int) -> tuple[Tensor, Tensor]:
        inputs_BS, _, domain_B = batches.sample(step, 0, 1, 1, self.batch)[0]
        return inputs_BS, domain_B

    def _drifting(self, step: int) -> Tensor:
        inputs_BS, _ = self._read(self.all, step)
        own_BS, _ = self._read(self.alone[step % len(self.alone)], step)
        half = self.batch // 2
        order_B = torch.randperm(self.batch, generator=torch.Generator().manual_seed(step))
        return torch.cat((inputs_BS[:half], own_BS[half:]))[order_B]

    def inputs(self, order: str, step: int) -> Tensor:
        """Return the inputs of a step."""
        if order == "drifting":
            return self._drifting(step)
        inputs_BS, domain_B = self._read(self.all, step)
        return inputs_BS[domain_B.argsort(stable=True)] if order == "by domain" else inputs_BS


def measure(plan: Plan, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Train the model, and take all measurements on the way."""
    corpus = load_corpus(plan.config.data, load_tokenizer(plan.config.data.tokenizer))
    trainer = Trainer(plan.config, corpus, None, torch.device("cpu"))
    steps = Steps(corpus, plan.config)
    result: dict[str, Any] = {"domains": corpus.domains, "points": [], "moved": [], "rounding": [], "training": {}}
    for stage, step in plan.stages.items():
        begin = time.perf_counter()
        earlier = []
        while trainer.step < step:
            earlier += [frozen(trainer.model)] if trainer.step >= step - HISTORY else []
            trainer.train_step()
        result["training"][stage] = state = {"step": step, **training_state(trainer)}
        measure_stage(result, plan, stage, steps, earlier, trainer.model)
        say(f"{stage}: step {step}, loss {state['loss']:.3f}, {time.perf_counter() - begin:.0f} s")
    return result


def training_state(trainer: Trainer) -> dict[str, float]:
    """Return the learning rate, the loss since the previous stage, and the worst layer's load in the last step."""
    nats, tokens = trainer.losses.sums_N2.sum(0).tolist()
    trainer.losses.sums_N2.zero_()
    last = [layer.balancer.previous_step for layer in trainer.model.moe_layers()]
    worst = max(load_summary(of.counts_E)["max_over_mean"] for of in last if of)
    return {"lr": trainer.rate, "loss": nats / tokens, "max_over_mean": worst}


def measure_stage(
    result: dict[str, Any], plan: Plan, stage: str, steps: Steps, earlier: list[Decoder], model: Decoder
) -> None:
    """Add the measurements of one stage; ``earlier`` have the weights of the steps before."""
    now, step = frozen(model), plan.stages[stage]
    for order in ORDERS:
        for trial in range(plan.trials):
            inputs_BS, first = steps.inputs(order, step + trial), step + trial - len(earlier)
            before = [count(of, steps.inputs(order, first + i), plan.micro_batches[-1]) for i, of in enumerate(earlier)]
            exact = gradients(now, inputs_BS, 1, "rolling")
            last = [parts.sum(0) for parts in before[-1]]
            moved = fmean(relative_error(b[:-1] / b[-1], load) for b, load in zip(last, exact.load, strict=True))
            result["moved"].append({"stage": stage, "order": order, "trial": trial, "moved": moved})
            for micro_batches in plan.micro_batches:
                place = {"stage": stage, "order": order, "trial": trial, "micro_batches": micro_batches}
                for estimator in ESTIMATORS[: None if trial == 0 else -1]:
                    found = gradients(now, inputs_BS, micro_batches, estimator, before)
                    result["points"] += points(found, exact, {**place, "estimator": estimator})
    inputs_BS = steps.inputs("shuffled", step)
    exact, single = gradients(now, inputs_BS, 1, "rolling"), frozen(model, torch.float32)
    for micro_batches in (1, plan.micro_batches[-1]):
        found = gradients(single, inputs_BS, micro_batches, "exact")
        error = max(relative_error(g, w) for g, w in zip(found.gradients, exact.gradients, strict=True))
        result["rounding"].append({"stage": stage, "micro_batches": micro_batches, "error": error})


def points(found: Pass, exact: Pass, place: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one record per layer that compares a pass with the exact gradient."""
    records = []
    for layer, (got, want) in enumerate(zip(found.gradients, exact.gradients, strict=True)):
        record = {**place, "layer": layer, "cosine": cosine(got, want), "error": relative_error(got, want)}
        record |= {"estimator_error": found.estimator_error[layer], "gradient_error": found.gradient_error[layer]}
        records.append(record)
    return records


# ---- tables


def gradient_table(found: list[dict[str, Any]], by: Sequence[str]) -> str:
    """Return a table with a row for each combination of the fields ``by``."""
    columns = ["cosine", "worst cosine", "error", "worst error", "estimator_error"]
    header = [field.replace("_", "-") for field in by]
    header += [f"{name} {column}" for name in ESTIMATORS[:-1] for column in columns] + ["exact error, worst"]
    rows = []
    for key in dict.fromkeys(tuple(point[field] for field in by) for point in found):
        here = [p for p in found if tuple(p[field] for field in by) == key]
        row = [str(value) for value in key]
        for name in ESTIMATORS[:-1]:
            row += _cells([p for p in here if p["estimator"] == name])
        rows.append([*row, f"{max(p['error'] for p in here if p['estimator'] == 'exact'):.0e}"])
    return table(header, rows)


def _cells(of: list[dict[str, Any]]) -> list[str]:
    """Return the mean and the worst layer of cosine and error, and the mean of ``estimator_error``."""
    by_layer = [list(group) for _, group in groupby(sorted(of, key=lambda p: p["layer"]), key=lambda p: p["layer"])]
    cosines, errors = ([fmean(p[key] for p in layer) for layer in by_layer] for key in ("cosine", "error"))
    figures = [f"{fmean(cosines):.3f}", f"{min(cosines):.3f}", f"{fmean(errors):.3f}", f"{max(errors):.3f}"]
    return [*figures, f"{fmean(p['estimator_error'] for p in of):.3f}"]


def ratios(found: list[dict[str, Any]], name: str, others: Sequence[str]) -> dict[tuple[str, str], list[float]]:
    """Return by order and stage: the mean error of an estimator over the least of the others, for each M."""
    errors: dict[tuple, list[float]] = {}
    for point in found:
        key = point["order"], point["stage"], point["micro_batches"], point["estimator"]
        errors.setdefault(key, []).append(point["error"])
    of: dict[tuple[str, str], list[float]] = {}
    for (order, stage, many, estimator), values in errors.items():
        if estimator == name:
            least = min(fmean(errors[order, stage, many, other]) for other in others)
            of.setdefault((order, stage), []).append(fmean(values) / least)
    return of


def ratio_table(of: dict[tuple[str, str], list[float]], moved: list[dict[str, Any]]) -> str:
    """Return :func:`ratios` (median, least, most over M), and how far the load moved since the last step."""
    stages = list(dict.fromkeys(stage for _, stage in of))
    rows = []
    for order in dict.fromkeys(order for order, _ in of):
        row = [order]
        for stage in stages:
            here = of[order, stage]
            by = fmean(m["moved"] for m in moved if (m["order"], m["stage"]) == (order, stage))
            row.append(f"{median(here):.2f} ({min(here):.2f} - {max(here):.2f}), {by:.3f}")
        rows.append(row)
    return table(["order", *stages], rows)


def rank_correlation(one: Sequence[float], two: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equal values share their mean rank."""

    def centred_ranks(values: Sequence[float]) -> Tensor:
        values_N = torch.tensor(values, dtype=torch.float64)
        below_N, equal_N = (values_N < values_N[:, None]).sum(1), (values_N == values_N[:, None]).sum(1)
        ranks_N = below_N + (equal_N - 1) / 2
        return ranks_N - ranks_N.mean()

    return cosine(centred_ranks(one), centred_ranks(two))


def prediction_table(found: list[dict[str, Any]]) -> str:
    """Compare the error measures that a balancer reports with the true error of the gradient."""
    rows = []
    for order in (*ORDERS, "all"):
        of = [p for p in found if p["estimator"] != "exact" and order in ("all", p["order"])]
        row = [order, str(len(of))]
        for key in ("estimator_error", "gradient_error"):
            ratio = median(p["error"] / max(p[key], 1e-300) for p in of)
            row += [f"{rank_correlation([p[key] for p in of], [p['error'] for p in of]):.2f}", f"{ratio:.2f}"]
        rows.append(row)
    names = ("estimator_error", "gradient_error")
    header = [f"{name}: {what}" for name in names for what in ("rank correlation", "true error / it")]
    return table(["order", "points", *header], rows)


def markdown(result: dict[str, Any]) -> str:
    """Return the whole result as Markdown."""
    found = result["points"]
    carried, mixed = ratios(found, "carry", ["rolling"]), ratios(found, "adaptive", ["rolling", "carry"])
    of_carry, of_mixed = ([ratio for row in of.values() for ratio in row] for of in (carried, mixed))
    worse = f"{sum(ratio > 1 for ratio in of_carry)} of {len(of_carry)}"
    near = f"{sum(ratio <= 1.05 for ratio in of_mixed)} of {len(of_mixed)}"
    rounding = [[r["stage"], str(r["micro_batches"]), f"{r['error']:.0e}"] for r in result["rounding"]]
    lines = [f"# Estimators of the step's load, {result['facts']['cpu']}", "", *as_lines(result)]
    for stage, at in result["training"].items():
        lines.append(f"{stage}: " + ", ".join(f"{key} {value:.4g}" for key, value in at.items()) + "  ")
    lines += ["", "The gradient of the balance loss alone, of each router, compared with one pass over the whole step:"]
    lines += ["cosine and relative error, mean over layers and worst layer; `estimator_error` as layers report it."]
    sections = {
        "Over all stages": ("", gradient_table(found, ("order", "micro_batches"))),
        "Stage by stage": ("", gradient_table(found, ("order", "stage", "micro_batches"))),
        "Error of `carry` divided by error of `rolling`": (
            f"Median over M, least and most. Above 1, `carry` is worse: {worse} rows. The last number is the relative\n"
            "distance of this step's load from the previous step's.\n\n",
            ratio_table(carried, result["moved"]),
        ),
        "Error of `adaptive` divided by the smaller of the two": (
            f"As above. At most 1.05 in {near} rows; mean {fmean(of_mixed):.2f}.\n\n",
            ratio_table(mixed, result["moved"]),
        ),
        "How well a layer can predict the error": (
            "One point per layer, M, stage and step of data, of all but `exact`.\n\n",
            prediction_table(found),
        ),
        "Error of `exact` in fp32": ("", table(["stage", "micro-batches", "worst layer"], rounding)),
    }
    for title, (text, rows) in sections.items():
        lines += ["", f"## {title}", "", text + rows]
    return "\n".join(lines) + "\n"


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer steps, M up to 8: half a minute")
    parser.add_out()
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    plan, begin, before = SHORT if args.quick else FULL, time.perf_counter(), load_averages()
    moe, data = plan.config.moe, plan.config.data
    result: dict[str, Any] = {
        "facts": facts("numpy"),
        "command": "python benchmarks/balance/estimators.py" + " --quick" * args.quick,
        "settings": {
            **{key: getattr(moe, key) for key in ("hidden_size", "intermediate_size", "num_experts", "top_k")},
            **{key: getattr(data, key) for key in ("global_batch", "seq_len", "builtin_bytes_per_domain")},
            **{"num_layers": plan.config.model.num_layers, "steps": plan.config.steps, "seed": plan.config.seed},
            "coefficient": moe.balance.coefficient,
        },
        **measure(plan, lambda line: print(line, file=sys.stderr, flush=True)),
        **spent(begin, before),
    }
    text = markdown(result)
    print(text, "written: ", *write(result, text, args.out, "estimators" + "-quick" * args.quick), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
