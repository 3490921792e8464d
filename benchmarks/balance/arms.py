"""The arms of ``global_balance.py``: what each run balances over, and what is measured.

One process simulates many ranks, each with micro-batches of ``RANK`` sequences. Its MoE layers see the sequences of a
group of ranks that add up their counts as one long sequence, so that scope "sequence" is their loss. Attention and
everything else see single sequences. (Tests in tests/parallel show that real ranks have the same gradients.)
"""

# N sequences, B sequences of a batch, S tokens of each, D hidden, L MoE layers, E experts, K top-k.

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from equimoe.moe import MoEConfig, Owners
from equimoe.moe.balance import StepTotals
from equimoe.moe.balance.bias import BiasRule, sign
from equimoe.moe.config import BalanceConfig, ExtraLossConfig, RouterConfig
from equimoe.moe.layer import MoE
from equimoe.moe.observe import (
    chosen_probability,
    divergences,
    mean_divergence,
    possible_degrees,
    straggler,
    watch_routers,
)
from equimoe.moe.train.config import DataConfig, LogConfig, ModelConfig, OptimConfig, TrainConfig
from equimoe.moe.train.data import Corpus, heldout_batches
from equimoe.moe.train.trainer import Trainer

#: number of sequences in one rank's micro-batch
RANK = 4
#: number of sequences in an optimizer step
BATCH = 512
#: larger than the paper's 0.008, which has 60,000 steps to balance the experts, not a few hundred
COEFFICIENT = 0.05
#: larger than DeepSeek-V3's 0.001, which has a hundred times as many steps
BIAS_RATE = 0.01


@dataclass(frozen=True)
class Size:
    """Size of the model and of the training run."""

    steps: int
    seq_len: int = 32
    hidden: int = 96
    layers: int = 2
    experts: int = 32
    top_k: int = 2
    lr: float = 5e-3
    init_std: float = 0.1
    #: number of held-out sequences per domain
    heldout: int = 768
    bytes_per_domain: int = 1_600_000


@dataclass(frozen=True)
class Arm:
    """One way to balance."""

    #: its name in tables
    label: str
    #: number of sequences over which the load is counted
    sequences: int
    #: number of sequences in a forward pass, over all simulated ranks
    micro_batch: int
    balance: dict[str, Any] = field(default_factory=dict)
    #: number of sequences that the layers see as one; None: they see single sequences
    together: int | None = None
    #: whether the tokens of a batch are permuted before they are joined
    mixed: bool = False
    router: dict[str, Any] = field(default_factory=dict)
    #: value of ``together`` in the second half of the run, if it changes
    then: int | None = None
    #: whether the expert bias uses the loads of single micro-batches instead of the step's load
    bias_by_micro_batch: bool = False


def synchronised(sequences: int, coefficient: float = COEFFICIENT, label: str = "") -> Arm:
    """Balance over ``sequences / RANK`` ranks, which add up their counts in each micro-batch."""
    ranks = "one rank's micro-batch" if sequences == RANK else f"{sequences // RANK} ranks"
    label = label or (f"global, {ranks}" if sequences == BATCH else ranks)
    if sequences == BATCH:
        return Arm(label, BATCH, BATCH, {"scope": "global", "coefficient": coefficient})
    balance = {"scope": "sequence", "coefficient": coefficient}
    return Arm(label, sequences, max(sequences, 64), balance, together=sequences)


def estimated(estimator: str) -> Arm:
    """Balance over 8 ranks, which add up their counts, with an estimator over their 16 micro-batches."""
    balance = {"scope": "global", "coefficient": COEFFICIENT, "estimator": estimator}
    return Arm(f"8 ranks, 16 micro-batches, {estimator}", BATCH, 8 * RANK, balance)


def loss_free(sequences: int) -> Arm:
    """Balance by a bias without a loss, with sigmoid scores, like the paper's baseline."""
    balance = {"coefficient": 0.0, "bias_update_rate": BIAS_RATE}
    label, whole = f"loss-free bias, counts of {sequences}", sequences == BATCH
    micro_batch, router = 64 if whole else sequences, {"score": "sigmoid"}
    return Arm(label, sequences, micro_batch, balance, router=router, bias_by_micro_batch=not whole)


def switched(first: int, then: int) -> Arm:
    balance = {"scope": "sequence", "coefficient": COEFFICIENT}
    return Arm(f"{first}, then {then}", first, BATCH, balance, together=first, then=then)


_WITH_MICRO = {"scope": "global", "coefficient": COEFFICIENT, "extra": ExtraLossConfig(sequence=COEFFICIENT / 100)}

#: in the order of their runs
ARMS: dict[str, Arm] = {
    "sync-4": synchronised(4),
    "sync-512": synchronised(512),
    "sync-32": synchronised(32),
    "sync-128": synchronised(128),
    "shuffled": Arm("shuffled batch", RANK, BATCH, {"scope": "sequence", "coefficient": COEFFICIENT}, RANK, mixed=True),
    "rolling": estimated("rolling"),
    "bias-global": loss_free(BATCH),
    "with-micro": Arm("global + 1 % micro-batch", BATCH, BATCH, _WITH_MICRO, together=RANK),
    "sync-16": synchronised(16),
    "carry": estimated("carry"),
    "micro-half": synchronised(RANK, COEFFICIENT / 2, "micro-batch, half the coefficient"),
    "micro-eighth": synchronised(RANK, COEFFICIENT / 8, "micro-batch, an eighth of it"),
    "bias-micro": loss_free(RANK),
    "global-eighth": synchronised(BATCH, COEFFICIENT / 8, "global, 128 ranks, an eighth of it"),
    "exact": estimated("exact"),
    "sigmoid": replace(synchronised(BATCH, label="global, 128 ranks, sigmoid scores"), router={"score": "sigmoid"}),
    "none": Arm("no balancing", 0, 64, {"coefficient": 0.0}),
    "to-global": switched(RANK, BATCH),
    "to-micro": switched(BATCH, RANK),
}


def configure(arm: Arm, size: Size, seed: int) -> TrainConfig:
    """Return the configuration of an arm's training run."""
    return TrainConfig(
        steps=size.steps,
        seed=seed,
        model=ModelConfig(num_layers=size.layers, num_heads=4),
        moe=MoEConfig(
            hidden_size=size.hidden,
            intermediate_size=size.hidden,
            num_experts=size.experts,
            top_k=size.top_k,
            init_std=size.init_std,
            router=RouterConfig(**arm.router),
            balance=BalanceConfig(**arm.balance),
        ),
        data=DataConfig(
            seq_len=size.seq_len,
            global_batch=BATCH,
            micro_batch=arm.micro_batch,
            builtin_bytes_per_domain=size.bytes_per_domain,
        ),
        optim=OptimConfig(lr=size.lr, warmup_steps=max(size.steps // 20, 5)),
        log=LogConfig(eval_sequences=size.heldout, trackers=None),
    )


class MicroBatchBias(BiasRule):
    """Moves the bias by the mean of the directions of all micro-batches of a process."""

    def direction(self, totals: StepTotals) -> Tensor:
        return torch.stack([sign(counts_E) for counts_E in totals.local_counts_ME]).double().mean(0)


class Ranks:
    """Simulates ranks: in training, each MoE layer gets every ``together`` sequences joined into one long sequence."""

    def __init__(self, layers: list[MoE], together: int | None, mixed: bool, seed: int) -> None:
        self.together = together
        self._mixed, self._seed = mixed, seed
        self._passes = 0
        self._order: Tensor | None = None
        self._shape: Any = None
        for layer in layers:
            layer.register_forward_pre_hook(self._join)
            layer.register_forward_hook(self._part)

    def _join(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not layer.training or self.together is None:
            return None
        x_BSD, *rest = args
        self._shape, x_TD = x_BSD.shape, x_BSD.flatten(0, 1)
        if self._mixed:
            generator = torch.Generator().manual_seed(1_000_003 * self._seed + self._passes)
            self._passes += 1
            self._order = torch.randperm(len(x_TD), generator=generator)
            x_TD = x_TD[self._order]
        return x_TD.view(len(x_BSD) // self.together, -1, x_TD.shape[-1]), *rest

    def _part(self, layer: nn.Module, args: tuple[Any, ...], y_GTD: Tensor) -> Tensor | None:
        if not layer.training or self.together is None:
            return None
        y_TD = y_GTD.flatten(0, 1)
        if self._order is not None:
            y_TD = torch.empty_like(y_TD).index_copy(0, self._order, y_TD)
        return y_TD.view(self._shape)


# ---- measurements


@dataclass
class Heldout:
    """Routing and loss of the held-out sequences, one row each."""

    domains: tuple[str, ...]
    domain_N: Tensor
    #: fp64: mean loss of a sequence's tokens
    nats_N: Tensor
    #: fp64: number of choices
    counts_NLE: Tensor
    #: fp64: sums of the normalised scores over tokens
    probs_NLE: Tensor
    #: fp64: sum of the chosen experts' scores, mean over tokens
    chosen_NL: Tensor
    seq_len: int
    top_k: int


@torch.no_grad()
def observe(trainer: Trainer, size: Size) -> Heldout:
    """Run the model on the held-out sequences, without the shorter ones at the end of a stream."""
    corpus, model, layers = trainer.corpus, trainer.model.eval(), trainer.model.moe_layers()
    rows: list[tuple[int, Tensor, list[Tensor], list[Tensor], list[Tensor]]] = []
    for domain, inputs_BS, labels_BS, mask_BS in heldout_batches(corpus, size.seq_len, size.heldout, 64):
        keep_B = mask_BS.all(1)
        with watch_routers(layers, lambda router, x_TD, of, _: (of, chosen_probability(router, x_TD, of))) as seen:
            logits_BSV = model(inputs_BS)
        nats_BS = nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none")
        routings, chosen = zip(*(one for (one,) in seen), strict=True)
        sums = [routing.prob_sums_BE[keep_B] for routing in routings]
        counts = [routing.counts_BE[keep_B] for routing in routings]
        scores = [sums_B[keep_B] / size.seq_len for sums_B in chosen]
        nats_B = nats_BS.view_as(labels_BS).double().mean(1)[keep_B]
        rows.append((corpus.domains.index(domain), nats_B, counts, sums, scores))
    model.train()
    joined = [torch.cat([torch.stack(row[i], 1) for row in rows]).double() for i in (2, 3, 4)]
    domain_N = torch.cat([torch.full((len(row[1]),), row[0]) for row in rows])
    return Heldout(corpus.domains, domain_N, torch.cat([row[1] for row in rows]), *joined, size.seq_len, size.top_k)


def measure(seen: Heldout) -> dict[str, Any]:
    """Compute the values of one evaluation.

    loss: nats per token, mean over domains.
    balance: the balance loss by the number of (randomly ordered) sequences that it counts, mean over layers.
    straggler: rows of the busiest of D expert-parallel ranks with ``RANK`` sequences each, divided by the mean, by D.
    cv: coefficient of variation of the experts' loads in ``RANK`` sequences.
    routing: each expert's share of a domain's choices, [L][E] by domain.
    """
    domains = range(len(seen.domains))
    loss = {seen.domains[d]: float(seen.nats_N[seen.domain_N == d].mean()) for d in domains}
    counts_XLE = torch.stack([seen.counts_NLE[seen.domain_N == d].sum(0) for d in domains])
    frequency_XLE = counts_XLE / counts_XLE.sum(-1, keepdim=True)
    routing = {seen.domains[d]: frequency_XLE[d].tolist() for d in domains}
    order_N = torch.randperm(len(seen.domain_N), generator=torch.Generator().manual_seed(0))[
        : len(seen.domain_N) // BATCH * BATCH
    ]
    counts_NLE, probs_NLE = seen.counts_NLE[order_N], seen.probs_NLE[order_N]
    layers, experts = counts_NLE.shape[1:]

    def groups(values_NLE: Tensor, sequences: int) -> Tensor:
        return values_NLE.view(-1, sequences, layers, experts).sum(1)

    def balance(sequences: int) -> float:
        load_GLE = groups(counts_NLE, sequences) * experts / (sequences * seen.seq_len * seen.top_k)
        return float((load_GLE * groups(probs_NLE, sequences) / (sequences * seen.seq_len)).sum(-1).mean())

    local_GLE = groups(counts_NLE, RANK)
    return {
        "loss": sum(loss.values()) / len(loss),
        "domain_loss": loss,
        "divergence": float(mean_divergence(divergences(routing)).mean()),
        "max_frequency": float(frequency_XLE.amax(-1).mean()),
        "score_sum": float(seen.chosen_NL.mean()),
        "domain_score_sum": {seen.domains[d]: float(seen.chosen_NL[seen.domain_N == d].mean()) for d in domains},
        "balance": {str(b): balance(b) for b in (RANK, 16, 32, 128, BATCH)},
        "max_over_mean": float(straggler(counts_NLE.sum(0), Owners.consecutive(experts, experts)).mean()),
        "straggler": {
            str(d): float(straggler(groups(counts_NLE, RANK * d), Owners.consecutive(experts, d)).mean())
            for d in possible_degrees(experts)
        },
        "cv": float((local_GLE.std(-1, correction=0) / local_GLE.mean(-1)).mean()),
        "routing": routing,
    }


def build(arm: Arm, size: Size, seed: int, corpus: Corpus) -> tuple[Trainer, Ranks]:
    trainer = Trainer(configure(arm, size, seed), corpus, None, torch.device("cpu"))
    if arm.bias_by_micro_batch:
        for layer in trainer.model.moe_layers():
            layer.balancer.bias = MicroBatchBias(BIAS_RATE, "sign")
    return trainer, Ranks(trainer.model.moe_layers(), arm.together, arm.mixed, seed)
