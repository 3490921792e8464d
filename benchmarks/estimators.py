"""How near the estimators of the step's load come to its exact gradient, on real routers while they are trained.

    python benchmarks/estimators.py [--quick] [--out DIR]

A small model is trained on the text that comes with Python, with the load of the whole step. At some of its steps the
gradient of the balance loss alone is taken on the weights as they are, by the layers' own balancers, micro-batch after
micro-batch, and compared with that of one process which has the whole step at once. All of it in fp64, so that what
differs is the estimate and not the rounding. ``carry`` knows the step before as the weights of that step routed it.

The same step is cut into M micro-batches whose sequences are
    shuffled    in the order of the training data,
    by domain   sorted, so that most micro-batches are of one domain, in the same order in every step,
    drifting    shuffled, but half of the step is of one domain, and half of the step before of another.
Writes JSON and the tables (.md), and prints these.
"""

# L layers, M micro-batches, B sequences, S tokens of each, E experts, D hidden, N values.

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import permutations
from statistics import fmean
from typing import Any

import checkout  # noqa: F401  (first: it decides which equimoe is imported)
import torch
from checkout import ROOT
from estimator_tables import ESTIMATORS, ORDERS, cosine, markdown, prediction
from options import Parser, folder
from records import facts, load_averages, spent, write
from torch import Tensor

from equimoe.moe import BalanceConfig, MoEConfig, counting_pass
from equimoe.moe.balance import Balancer, loss_value
from equimoe.moe.balance.estimators import rolling
from equimoe.moe.balance.losses import loads
from equimoe.moe.model import Decoder
from equimoe.moe.observe import estimate_quality
from equimoe.moe.train.config import DataConfig, ModelConfig, TrainConfig
from equimoe.moe.train.data import Batches, Corpus, load_corpus, load_tokenizer
from equimoe.moe.train.loop import Trainer
from equimoe.moe.types import load_summary

#: orders of micro-batches over which a mean is taken, where there are more
DRAWN = 400

#: one process has the whole step in one micro-batch: what it trains on is exact, whatever the estimator
CONFIG = TrainConfig(
    steps=150,
    model=ModelConfig(num_layers=4, num_heads=4, intermediate_size=192),
    moe=MoEConfig(
        hidden_size=96,
        intermediate_size=96,
        num_experts=8,
        top_k=2,
        balance=BalanceConfig(scope="global", coefficient=0.01),
    ),
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
    """What is trained, and what is measured in it."""

    config: TrainConfig
    #: name -> steps that have been made
    stages: dict[str, int]
    micro_batches: tuple[int, ...]
    #: steps of data that are measured at each stage; ``exact`` on the first of them alone
    trials: int


FULL = Plan(CONFIG, {"start": 1, "warm-up": 10, "middle": 75, "end": 150}, (2, 4, 8, 16, 32), 2)
SHORT = Plan(QUICK, {"start": 1, "end": 12}, (2, 4, 8), 1)


@dataclass(frozen=True)
class Found:
    """One pass over a step: what each layer's router got, and what its balancer says of it."""

    #: [E, D] each
    gradients: list[Tensor]
    #: ``estimator_error`` and ``gradient_error`` of :func:`estimate_quality`
    reported: list[float]
    of_imbalance: list[float]
    #: int64 [M, E + 1] and fp64 [M, E] of each layer: counts and tokens, and sums of probabilities
    counts: list[Tensor]
    prob_sums: list[Tensor]
    #: the loss of the step as the backward passes had it, of each layer
    losses: list[float]


def still(model: Decoder, dtype: torch.dtype = torch.float64) -> Decoder:
    """A copy of a model in training whose routers alone have gradients; without a head, whose loss is not wanted."""
    copy = deepcopy(model).to(dtype).train().requires_grad_(False)
    copy.head = None
    for layer in copy.moe_layers():
        layer.router.weight.requires_grad_(True)
    return copy


def balancers(model: Decoder, estimator: str, micro_batches: int, before: Sequence[Tensor] | None) -> list[Balancer]:
    """New ones in the model's layers, with coefficient 1 and nothing beside it. ``before`` is int64 [E + 1] of each."""
    config = BalanceConfig(coefficient=1.0, estimator=estimator, micro_batches=micro_batches)  # type: ignore[arg-type]
    layers = model.moe_layers()
    for layer in layers:
        layer.balancer = Balancer(config, layer.config.num_experts, layer.config.top_k)
    for layer, previous_X in zip(layers, before, strict=True) if before else ():
        # the step before was cut as this one is
        layer.balancer.previous_X = torch.cat((previous_X, previous_X.new_tensor([micro_batches])))
    return [layer.balancer for layer in layers]


def count(model: Decoder, inputs_BS: Tensor) -> list[Tensor]:
    """int64 [E + 1] of each layer: counts and tokens of a step that the model routes and is not trained on."""
    made = balancers(model, "rolling", 1, None)
    with counting_pass():
        model(inputs_BS)
    for balancer in made:
        balancer.step.end(applied=False)
    return [balancer.previous_X[:-1] for balancer in made if balancer.previous_X is not None]


def gradients(
    model: Decoder, inputs_BS: Tensor, micro_batches: int, estimator: str, before: Sequence[Tensor] | None = None
) -> Found:
    """The balance loss's gradient of each router, through all layers, of a step cut into micro-batches.

    The model's own loss is multiplied by zero; what is left is what the layers hang on it.
    """
    made, weights = balancers(model, estimator, micro_batches, before), []
    for layer in model.moe_layers():
        layer.router.weight.grad = None
        weights.append(layer.router.weight)
    shares = inputs_BS.chunk(micro_batches)
    if len(shares) != micro_batches or len({len(share) for share in shares}) > 1:
        raise ValueError(f"micro_batches={micro_batches}: must divide the step's {len(inputs_BS)} sequences")
    if estimator == "exact":
        with counting_pass():
            for share in shares:
                model(share)
    for share in shares:
        (model(share) * 0).sum().backward()
    for balancer in made:
        balancer.step.end(applied=False)
    steps = [balancer.previous_step for balancer in made if balancer.previous_step is not None]
    reported = [estimate_quality(step) for step in steps]
    return Found(
        gradients=[weight.grad.clone() for weight in weights if weight.grad is not None],
        reported=[quality["estimator_error"] for quality in reported],
        of_imbalance=[quality["gradient_error"] for quality in reported],
        counts=[torch.cat((step.local_counts_ME, step.local_tokens_M[:, None]), dim=1) for step in steps],
        prob_sums=[step.local_prob_sums_ME.double() for step in steps],
        losses=[float(sum(term.value for term in step.terms)) for step in steps],
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


class Steps:
    """Steps of data in each order: [B, S] inputs, of the step before and of the step."""

    def __init__(self, corpus: Corpus, config: TrainConfig) -> None:
        self.batch = config.data.global_batch
        size = config.data.seq_len, self.batch, config.seed
        self.all = Batches(corpus.train, *size)
        self.alone = [Batches({name: stream}, *size) for name, stream in corpus.train.items() if len(stream)]

    def _read(self, batches: Batches, step: int) -> tuple[Tensor, Tensor]:
        inputs_BS, _, domain_B = batches.sample(step, 0, 1, 1, self.batch)[0]
        return inputs_BS, domain_B

    def _leaning(self, step: int) -> Tensor:
        """Half of the sequences are of one domain, the next one in every step."""
        inputs_BS, _ = self._read(self.all, step)
        own_BS, _ = self._read(self.alone[step % len(self.alone)], step)
        half = self.batch // 2
        order_B = torch.randperm(self.batch, generator=torch.Generator().manual_seed(step))
        return torch.cat((inputs_BS[:half], own_BS[half:]))[order_B]

    def pair(self, order: str, step: int) -> tuple[Tensor, Tensor]:
        """The inputs of the step before ``step``, and its own."""
        if order == "drifting":
            return self._leaning(step - 1), self._leaning(step)
        before_BS, _ = self._read(self.all, step - 1)
        inputs_BS, domain_B = self._read(self.all, step)
        return before_BS, inputs_BS[domain_B.argsort(stable=True)] if order == "by domain" else inputs_BS


def measure(plan: Plan, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Train, and take the figures of every stage on the way."""
    corpus = load_corpus(plan.config.data, load_tokenizer(plan.config.data.tokenizer))
    trainer = Trainer(plan.config, corpus, None, torch.device("cpu"))
    steps = Steps(corpus, plan.config)
    result: dict[str, Any] = {
        "domains": corpus.domains,
        "points": [],
        "moved": [],
        "orders_mean": [],
        "rounding": [],
        "training": {},
    }
    for stage, step in plan.stages.items():
        begin = time.perf_counter()
        previous = trainer.model
        while trainer.step < step:
            previous = still(trainer.model) if trainer.step == step - 1 else previous
            trainer.train_step()
        result["training"][stage] = state = {"step": step, **training_state(trainer)}
        trained = time.perf_counter() - begin
        of_stage(result, plan, stage, step, steps, previous, trainer.model)
        seconds = time.perf_counter() - begin - trained
        say(f"{stage}: step {step}, loss {state['loss']:.3f}, trained in {trained:.0f} s, measured in {seconds:.0f} s")
    return result


def training_state(trainer: Trainer) -> dict[str, float]:
    """The last step's rate, nats per token since the stage before, and the last step's load in the worst layer."""
    nats, tokens = trainer.losses.sums_N2.sum(0).tolist()
    trainer.losses.sums_N2.zero_()
    last = [layer.balancer.previous_step for layer in trainer.model.moe_layers()]
    worst = max(load_summary(of.counts_E)["max_over_mean"] for of in last if of)
    return {"lr": trainer.rate, "loss": nats / tokens, "max_over_mean": worst}


def of_stage(
    result: dict[str, Any], plan: Plan, stage: str, step: int, steps: Steps, previous: Decoder, model: Decoder
) -> None:
    """Add what is found on the weights of one stage; ``previous`` are those of the step before."""
    now = still(model)
    for order in ORDERS:
        for trial in range(plan.trials):
            before_BS, inputs_BS = steps.pair(order, step + trial)
            before, want = count(previous, before_BS), gradients(now, inputs_BS, 1, "rolling")
            moved = fmean(
                relative_error(b[:-1] / b[-1], w[0, :-1] / w[0, -1]) for b, w in zip(before, want.counts, strict=True)
            )
            result["moved"].append({"stage": stage, "order": order, "trial": trial, "moved": moved})
            for micro_batches in plan.micro_batches:
                place = {"stage": stage, "order": order, "trial": trial, "micro_batches": micro_batches}
                for estimator in ESTIMATORS[: None if trial == 0 else 2]:
                    found = gradients(now, inputs_BS, micro_batches, estimator, before)
                    result["points"] += points(found, want, {**place, "estimator": estimator})
                    if estimator == "rolling" and trial == 0 and order != "drifting":
                        result["orders_mean"].append({**place, **mean_over_orders(found, now)})
    _, inputs_BS = steps.pair("shuffled", step)
    want, single = gradients(now, inputs_BS, 1, "rolling"), still(model, torch.float32)
    for name, cut in (("one micro-batch", 1), (f"exact, M={plan.micro_batches[-1]}", plan.micro_batches[-1])):
        got = gradients(single, inputs_BS, cut, "exact")
        errors = [relative_error(g, w) for g, w in zip(got.gradients, want.gradients, strict=True)]
        result["rounding"].append({"stage": stage, "what": name, "error": max(errors)})


def points(found: Found, want: Found, place: dict[str, Any]) -> list[dict[str, Any]]:
    """One record per layer: how a pass compares with the whole step at once."""
    records = []
    for layer, (got, exact) in enumerate(zip(found.gradients, want.gradients, strict=True)):
        records.append(
            {
                **place,
                "layer": layer,
                "cosine": cosine(got, exact),
                "error": relative_error(got, exact),
                "reported": found.reported[layer],
                "of_imbalance": found.of_imbalance[layer],
            }
        )
    return records


def rolling_loss(counts_MX: Tensor, prob_sums_ME: Tensor, top_k: int) -> float:
    """The loss of a step whose micro-batches come in this order, each with the load so far."""
    many, loss = len(counts_MX), 0.0
    for n, known_X in enumerate(counts_MX.cumsum(0), start=1):
        step = rolling(known_X, n, many, None)
        loss += float((loads(step.counts_E, step.tokens, top_k) * prob_sums_ME[n - 1]).sum() / step.step_tokens)
    return loss


def mean_over_orders(found: Found, model: Decoder) -> dict[str, float]:
    """The rolling loss over orders of the micro-batches, all or :data:`DRAWN`, beside its closed expectation.

    Means over the layers, with the standard error of the drawn orders' mean.
    """
    rows = []
    many = len(found.counts[0])
    generator = torch.Generator().manual_seed(many)
    drawn = math.factorial(many) > DRAWN
    orders = [torch.randperm(many, generator=generator) for _ in range(DRAWN)] if drawn else []
    orders = orders or [torch.tensor(order) for order in permutations(range(many))]
    share = sum(1 / n for n in range(1, many + 1)) / many
    for counts_MX, prob_sums_ME, layer in zip(found.counts, found.prob_sums, model.moe_layers(), strict=True):
        counts_ME, tokens_M, k = counts_MX[:, :-1], counts_MX[:, -1], layer.config.top_k
        micro = float(loss_value(counts_ME, tokens_M, prob_sums_ME, tokens_M, k).mean())
        tokens = tokens_M.sum()
        whole = float(loss_value(counts_ME.sum(0), tokens, prob_sums_ME.sum(0), tokens, k))
        seen_N = torch.tensor([rolling_loss(counts_MX[o], prob_sums_ME[o], k) for o in orders], dtype=torch.float64)
        closed = share * micro + (1 - share) * (many * whole - micro) / (many - 1)
        spread = float(seen_N.std() / math.sqrt(len(orders))) if drawn else 0.0
        rows.append((micro, whole, closed, float(seen_N.mean()), spread))
    micro, whole, closed, mean, spread = (fmean(column) for column in zip(*rows, strict=True))
    return {
        "orders": len(orders),
        "share": share,
        "micro": micro,
        "global": whole,
        "closed": closed,
        "mean": mean,
        "standard_error": spread,
    }


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer steps, M up to 8; half a minute")
    parser.add_argument("--out", type=folder, default=str(ROOT / "benchmarks/results"), help="(default %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    plan, begin, before = SHORT if args.quick else FULL, time.perf_counter(), load_averages()
    result = {"facts": facts(), "command": "python benchmarks/estimators.py" + " --quick" * args.quick}
    moe = vars(plan.config.moe)
    both = moe | vars(plan.config.model) | {"moe_intermediate_size": moe["intermediate_size"]}
    sizes = {key: value for key, value in both.items() if isinstance(value, int)}
    result["settings"] = {
        **{key: sizes[key] for key in ("hidden_size", "num_layers", "num_experts", "top_k", "moe_intermediate_size")},
        **{key: getattr(plan.config.data, key) for key in ("global_batch", "seq_len", "builtin_bytes_per_domain")},
        **{"steps": plan.config.steps, "coefficient": plan.config.moe.balance.coefficient, "seed": plan.config.seed},
    }
    result |= measure(plan, lambda line: print(line, file=sys.stderr, flush=True))
    result["prediction"] = prediction(result["points"])
    result |= spent(begin, before)
    text = markdown(result)
    name = "estimators" + "-quick" * args.quick
    print(text, "written: ", *write(result, text, args.out, name), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
