"""Compares one composition of parallelisms with one process that holds the whole batch."""

# G sequences of a step, S positions, V vocabulary.

from __future__ import annotations

import copy
import logging
import random
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from equimoe.moe import BalanceConfig, CapacityConfig, DispatchConfig, MoEConfig, RouterConfig, ZeroComputationConfig
from equimoe.moe.config import AttentionConfig, PlacementConfig, RecomputeConfig
from equimoe.moe.config.routing import BALANCED
from equimoe.moe.engines import Batch, build_engine
from equimoe.moe.model import Decoder
from equimoe.moe.model.documents import document_numbers
from equimoe.moe.parallel import IGNORED, Mesh, ParallelConfig, build_mesh
from equimoe.moe.placement import Owners, Replicas
from equimoe.moe.routing import noise
from tests.helpers import oracle
from tests.helpers.fork import run_ranks
from tests.helpers.recorded import Recorded

# torch warns that gathering a tensor sharded over two axes is slow; speed does not matter here
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

SEQUENCES, LENGTH, VOCABULARY, STEPS = 16, 16, 32, 3


@dataclass(frozen=True)
class Composition:
    """A mesh over ``world`` ranks, and the options of the model and step that run on it."""

    world: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batches: int = 2
    recompute: bool | RecomputeConfig = False
    #: number of valid positions per sequence: all; different numbers; none on the first rank
    tokens: str = "unequal"
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    capacity: CapacityConfig | None = None
    scope: str = "global"
    experts: int = 8
    dtype: str = "float32"
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe_every: int = 2
    #: whether embedding and head are one weight
    tied: bool = False
    #: whether sequences hold several documents, which attention keeps apart
    documents: bool = False
    #: which positions have a label: all; some; few: also none on the first rank, and none at all in the second step
    labels: str = "all"
    #: whether replicas of experts are freed between forward and backward
    rematerialize: bool = False
    #: whether replicas are added after routing
    calibrate: bool = False
    router: RouterConfig = field(default_factory=partial(RouterConfig, z_loss=0.01))
    top_k: int = 2
    counts: Literal["all", "first"] = "all"
    zero_computation: ZeroComputationConfig | None = None
    widths: str | None = None

    @property
    def limit(self) -> float:
        """The largest allowed relative error."""
        if self.dtype != "float32":
            return 2e-2
        # the gradient of a temperature is one number, a sum over all tokens that nearly cancels
        return 3e-5 if self.router.gate == "cosine" else 1e-5


def make(of: Composition, micro_batches: int) -> Decoder:
    """Build the whole model, the same on every rank."""
    torch.manual_seed(0)
    moe = MoEConfig(
        hidden_size=16,
        intermediate_size=8,
        num_experts=of.experts,
        top_k=of.top_k,
        router=of.router,
        balance=BalanceConfig(
            of.scope,
            0.1 if of.router.needs_balance else 0.0,
            estimator="exact",
            micro_batches=micro_batches,
            counts=of.counts,
        ),
        capacity=of.capacity,
        zero_computation=of.zero_computation,
        widths=of.widths,
        dispatch=of.dispatch,
        shared_intermediate_size=8,
        init_std=0.3,
    )
    model = Decoder(
        vocab_size=VOCABULARY,
        seq_len=LENGTH,
        num_layers=4,
        num_heads=4,
        intermediate_size=24,
        moe=moe,
        moe_every=of.moe_every,
        attention=of.attention,
        recompute_blocks=bool(of.recompute),
        recompute_how=of.recompute if isinstance(of.recompute, RecomputeConfig) else None,
        tie_embeddings=of.tied,
    )
    if of.dtype == "bfloat16":
        _choose_clearly(model)
    return model


@torch.no_grad()
def _choose_clearly(model: Decoder) -> None:
    """Make each token's own embedding choose its experts by a wide margin.

    If two experts are nearly equal, rounding to bf16 decides between them, and two orders of summation may disagree.
    """
    experts = model.moe_layers()[0].config.all_experts
    directions_ED = torch.linalg.qr(torch.randn(16, 16)).Q[:experts] * 4
    token_V = torch.arange(VOCABULARY)
    first_V, second_V = token_V % experts, (token_V + 1 + token_V // experts) % experts
    assert isinstance(model.embedding, torch.nn.Embedding)
    model.embedding.weight.add_(directions_ED[first_V] + 0.8 * directions_ED[second_V])
    for layer in model.moe_layers():
        layer.router.weight.mul_(0.1).add_(directions_ED / 4)
        if (residual := getattr(layer.router, "residual_weight", None)) is not None:
            residual.mul_(0.1)


def batch(step: int, of: Composition) -> dict[str, Tensor]:
    """Return inputs, labels and mask [G, S] of a step, documents if there are several, and tasks [G] if they are
    read."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    valid_G = torch.full((SEQUENCES,), LENGTH)
    if of.tokens != "equal":
        valid_G = torch.randint(1, LENGTH + 1, (SEQUENCES,), generator=generator)
    dp = of.parallel.resolve(of.world).dp
    first_rank = slice(0, SEQUENCES // (dp if dp > 1 else 4))
    if of.tokens == "zero":
        valid_G[first_rank] = 0
    inputs, labels, mask = ids[:, :-1], ids[:, 1:].clone(), torch.arange(LENGTH) < valid_G[:, None]
    if of.labels != "all":
        labels[inputs % 3 == 0] = IGNORED
    if of.labels == "few":
        labels[first_rank if step != 1 else slice(None)] = IGNORED
    found = {"inputs": inputs, "labels": labels, "mask": mask}
    if of.documents:  # ids 0 to 3 end a document
        found["documents"] = document_numbers(inputs // 4, 0)
    if of.router.tasks:
        found["tasks"] = torch.arange(SEQUENCES) % (of.router.tasks + 1) - 1  # -1: unknown
    return found


def _by_value(like: Tensor) -> Tensor:
    """Stand for the random numbers of routers: a function of each value, so that any rank draws the same."""
    return like.detach().mul(5).sin().add(1).div(2)


@patch.multiple(noise, uniform=_by_value, normal=_by_value)
def train(of: Composition, mesh: Mesh | None, micro_batches: int) -> dict[str, Any]:
    """Train three steps; return each step's loss and norm, the first's clipped gradients, and the final parameters."""
    dp, rank = (1, 0) if mesh is None else (mesh["dp"].size, mesh["dp"].rank)
    bf16 = of.dtype == "bfloat16"
    model, optimizer = make(of, micro_batches), Recorded(momentum=0.9)
    if mesh is None and bf16 and of.parallel.data_parallel == "fsdp":
        model.forward = partial(_in_bf16, copy.copy(model))

    engine = build_engine(
        model,
        mesh,
        optimizer,
        max_norm=1.0,
        micro_batches=micro_batches,
        shape=(SEQUENCES // dp // micro_batches, LENGTH),
        dtype=torch.bfloat16 if bf16 else None,
        precision=partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16),
        placement=PlacementConfig(
            overlap=4, memory_mb=1, rematerialize=of.rematerialize, calibrate=0 if of.calibrate else None
        ),
    )
    engine.experts.plan = partial(at_random, random.Random(0))
    result: dict[str, Any] = {"loss": [], "norm": []}
    for step in range(STEPS):
        whole = batch(step, of)
        parts = zip(*(t.chunk(dp)[rank].chunk(micro_batches) for t in whole.values()), strict=True)
        found = engine.step([Batch(**dict(zip(whole, part, strict=True))) for part in parts], lr=0.1)
        assert found.applied
        counted = int((whole["mask"] & (whole["labels"] != IGNORED)).sum())
        result["loss"].append(float(sum(n.double().sum() for n in found.losses)) / max(counted, 1))
        result["norm"].append(float(found.norm))
    return result | {"gradients": optimizer.gradients[0], "parameters": optimizer.parameters}


def at_random(draw: random.Random, loads_LE: Tensor | None, owners: list[Owners]) -> list[Replicas]:
    """Choose replicas that have nothing to do with the load."""
    return [
        Replicas(of, [[r for r in range(of.ranks) if r != own and draw.random() < 0.4] for own in of.rank_of_E])
        for of in owners
    ]


def _in_bf16(model: torch.nn.Module, *args: Any, **more: Any) -> Tensor:
    """Run the model as FSDP2's mixed precision does: with bf16 copies of all weights except the routers'."""
    weights = {n: p if ".router." in n else p.to(torch.bfloat16) for n, p in model.named_parameters()}
    return torch.func.functional_call(model, weights, args, more)


def on_ranks(of: Composition, timeout: float = 120.0) -> list[dict[str, Any]]:
    """Return the composition's result on every rank; losses are this rank's shares."""

    def script(rank: int, world: int) -> dict[str, Any]:
        mesh = build_mesh(of.parallel)
        result = train(of, mesh, of.micro_batches)
        mine = mesh["tp"].rank == 0
        return result | {"loss": [value if mine else 0.0 for value in result["loss"]]}

    return run_ranks(script, of.world, timeout=timeout)


def alone(of: Composition) -> dict[str, Any]:
    """Return the result of one process.

    It runs the whole batch at once, or the micro-batches one by one if anything is decided per micro-batch.
    """
    dp = of.parallel.resolve(of.world).dp
    together = of.scope == "global" and (of.capacity is None or of.capacity.scope == "global")
    together = together and of.router.select not in BALANCED
    # the numbers of sequences without tokens or labels depend on it
    ranks = dp if of.tokens == "zero" or of.labels == "few" else 1
    precise = of.dtype == "float32"  # else weights are rounded as FSDP2 does
    parallel = ParallelConfig(data_parallel="ddp" if precise else of.parallel.data_parallel)
    same = replace(of, world=ranks, parallel=parallel, micro_batches=1 if together else dp * of.micro_batches)
    return _reference(replace(same, recompute=False, rematerialize=False, calibrate=False, dispatch=DispatchConfig()))


@cache
def _reference(of: Composition) -> dict[str, Any]:
    """Train in one process, once for all compositions that should equal it."""
    return train(of, None, of.micro_batches)


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative error among named tensors, and its name."""
    return max((oracle.relative_error(got[name].view_as(want[name]), want[name]), name) for name in want)


def compare(of: Composition) -> dict[str, float]:
    """Return the largest relative errors of loss, norm, gradients and parameters over all ranks."""
    want, results = alone(of), on_ranks(of)
    losses = [sum(result["loss"][step] for result in results) for step in range(STEPS)]
    # a step without labels has a loss of zero
    errors = [abs(a / b - 1) if b else abs(a) for a, b in zip(losses, want["loss"], strict=True)]
    found = {"loss": max(errors), "norm": 0.0}
    names: dict[str, dict[str, Tensor]] = {"gradients": {}, "parameters": {}}
    for result in results:
        norms = (abs(a / b - 1) for a, b in zip(result["norm"], want["norm"], strict=True))
        found["norm"] = max(found["norm"], *norms)
        for kind, tensors in names.items():
            part = {name: want[kind][name] for name in result[kind]}
            found[kind] = max(found.get(kind, 0.0), worst(result[kind], part)[0])
            tensors.update(result[kind])
    for kind, tensors in names.items():
        assert tensors.keys() == want[kind].keys(), f"{kind} that no rank has: {want[kind].keys() - tensors.keys()}"
    return found
