"""The runs that ``global_balance.py`` compares: what each one balances over, and what is measured of it.

A rank has micro-batches of ``RANK`` sequences. One process plays many ranks: its MoE layers are shown the sequences of
each group of ranks that synchronise as one long sequence, so that scope "sequence" is their loss. Attention and
everything else see single sequences. (That ranks and the micro-batches of one process give the same gradients is proven
in tests/parallel; no result here depends on how many processes there are.)
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
from equimoe.moe.train.loop import Trainer

#: sequences of one rank's micro-batch
RANK = 4
#: sequences of an optimizer step
BATCH = 512
#: of the balance loss. The paper's 0.008 has 60,000 steps to balance the experts, a run here has some hundred
COEFFICIENT = 0.05
#: how far the loss-free bias moves in a step; DeepSeek-V3's 0.001 is for a hundred times as many steps
BIAS_RATE = 0.01


@dataclass(frozen=True)
class Size:
    """Model and length of the runs."""

    steps: int
    seq_len: int = 32
    hidden: int = 96
    layers: int = 2
    experts: int = 32
    top_k: int = 2
    lr: float = 5e-3
    init_std: float = 0.1
    #: held-out sequences of each domain
    heldout: int = 768
    bytes_per_domain: int = 1_600_000


@dataclass(frozen=True)
class Arm:
    """One way to balance."""

    #: what the tables call it
    label: str
    #: sequences over which the load is counted
    sequences: int
    #: sequences of a forward pass, over all ranks that are played
    micro_batch: int
    balance: dict[str, Any] = field(default_factory=dict)
    #: sequences that the layers are shown as one; None: as they are
    together: int | None = None
    #: the tokens of a batch change places before they are put together
    mixed: bool = False
    router: dict[str, Any] = field(default_factory=dict)
    #: sequences that are shown as one in the second half of the run, when that is another number
    then: int | None = None
    #: the expert bias moves by the loads of single micro-batches, not by the load of the step
    bias_by_micro_batch: bool = False


def synchronised(sequences: int, coefficient: float = COEFFICIENT, label: str = "") -> Arm:
    """The loss of ``sequences / RANK`` ranks that add up their counts in each micro-batch."""
    ranks = "one rank's micro-batch" if sequences == RANK else f"{sequences // RANK} ranks"
    label = label or (f"global, {ranks}" if sequences == BATCH else ranks)
    if sequences == BATCH:
        return Arm(label, BATCH, BATCH, {"scope": "global", "coefficient": coefficient})
    balance = {"scope": "sequence", "coefficient": coefficient}
    return Arm(label, sequences, max(sequences, 64), balance, together=sequences)


def estimated(estimator: str) -> Arm:
    """8 ranks add up their counts, and 16 micro-batches of theirs are joined by an estimator."""
    balance = {"scope": "global", "coefficient": COEFFICIENT, "estimator": estimator}
    return Arm(f"8 ranks, 16 micro-batches, {estimator}", BATCH, 8 * RANK, balance)


def loss_free(sequences: int) -> Arm:
    """No loss, but a bias; sigmoid scores, as the paper's baseline has them."""
    balance = {"coefficient": 0.0, "bias_update_rate": BIAS_RATE}
    label, whole = f"loss-free bias, counts of {sequences}", sequences == BATCH
    micro_batch, router = 64 if whole else sequences, {"score": "sigmoid"}
    return Arm(label, sequences, micro_batch, balance, router=router, bias_by_micro_batch=not whole)


def switched(first: int, then: int) -> Arm:
    balance = {"scope": "sequence", "coefficient": COEFFICIENT}
    return Arm(f"{first}, then {then}", first, BATCH, balance, together=first, then=then)


_WITH_MICRO = {"scope": "global", "coefficient": COEFFICIENT, "extra": ExtraLossConfig(sequence=COEFFICIENT / 100)}

#: in the order in which they are run
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
    """The training run of an arm."""
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
        log=LogConfig(eval_sequences=size.heldout, tensorboard=False),
    )


class MicroBatchBias(BiasRule):
    """Moves the bias by the mean of the directions of all micro-batches of a process."""

    def direction(self, totals: StepTotals) -> Tensor:
        return torch.stack([sign(counts_E) for counts_E in totals.local_counts_ME]).double().mean(0)


class Ranks:
    """Shows MoE layers, while they train, ``together`` sequences as one."""

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


# ---- what is measured


@dataclass
class Heldout:
    """What the held-out sequences did, one row each."""

    domains: tuple[str, ...]
    domain_N: Tensor
    #: fp64, loss of a sequence over its tokens
    nats_N: Tensor
    #: fp64 [N, L, E]: choices, and sums over tokens of the normalised scores
    counts_NLE: Tensor
    probs_NLE: Tensor
    #: fp64 [N, L], mean over tokens of the chosen experts' scores together
    chosen_NL: Tensor
    seq_len: int
    top_k: int


@torch.no_grad()
def observe(trainer: Trainer, size: Size) -> Heldout:
    """Run the model on the held-out sequences. Those at a stream's end that are shorter are left out."""
    corpus, model, layers = trainer.corpus, trainer.model.eval(), trainer.model.moe_layers()
    rows: list[tuple[int, Tensor, list[Tensor], list[Tensor], list[Tensor]]] = []
    for domain, inputs_BS, labels_BS, mask_BS in heldout_batches(corpus, size.seq_len, size.heldout, 64):
        keep_B = mask_BS.all(1)
        with watch_routers(layers, lambda router, x_TD, of: (of, chosen_probability(router, x_TD, of))) as seen:
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
    """The figures of one evaluation.

    ``loss`` in nats per token is the mean over domains. ``balance``: the balance loss by the number of sequences over
    which the load is counted, in random order, mean over layers. ``straggler``: rows of the busiest of D
    expert-parallel ranks over the mean, each of the ranks having ``RANK`` sequences, by D. ``cv``: of the experts'
    loads in ``RANK`` sequences. ``routing`` is [L][E] by domain.
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
