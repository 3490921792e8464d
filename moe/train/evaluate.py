"""Evaluation: held-out loss and routing by domain.

N domains, L MoE layers, E experts, B sequences of a batch, X sequences of all batches, P ranks that read other ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..collectives import LOCAL, sum_over, world_axis
from ..engines import Batch, Engine
from ..layer import MoE
from ..observe import chosen_probability, domain_record, watch_routers
from ..parallel import IGNORED, Mesh
from ..routing import Router
from ..transfer import Reading, to_device
from ..types import Routing
from .build import documents_of
from .config import TrainConfig
from .data import Corpus, heldout_batches


def _seen(router: Router, x_TD: Tensor, routing: Routing, codes_T: Tensor | None = None, **given: Any) -> Tensor:
    """Return fp64 [B, E + 2] per sequence: choices of each expert, tokens, probability of the chosen experts."""
    chosen_B = chosen_probability(router, x_TD, routing, codes_T, **given)
    return torch.cat((routing.counts_BE.double(), routing.tokens_B[:, None], chosen_B[:, None]), dim=1)


@torch.no_grad()
def evaluate(
    engine: Engine,
    layers: Mapping[int, MoE],
    numbers: Sequence[int],
    corpus: Corpus,
    config: TrainConfig,
    mesh: Mesh | None,
    device: torch.device,
) -> dict[str, Any]:
    """Measure the held-out loss in nats per token, and how tokens are routed, overall and by domain.

    ``layers`` maps block numbers to this rank's MoE layers; ``numbers`` are the block numbers of all MoE layers of the
    model. Every rank must call this function, and all get the same result: the fields of an ``eval`` record, see
    :mod:`equimoe.moe.observe.metrics`. Padding is masked. Positions without a label have no loss; they are routed.

    With a capacity, each sequence is evaluated alone with a capacity of its own, so the result does not depend on how
    sequences are batched. Under ``capacity.pad`` each rank's part of a sequence still has its own capacity.
    """
    cp, tp = (LOCAL, LOCAL) if mesh is None else (mesh["cp"], mesh["tp"])
    readers = LOCAL if mesh is None else mesh["dp"]
    place = {domain: i for i, domain in enumerate(corpus.domains)}
    #: by domain and batch: fp64 [P readers, B, 2], sum of the loss in nats and tokens of each sequence
    sums_PB2: list[tuple[int, Tensor]] = []
    width = config.moe.all_experts + 2
    seen_NLX = torch.zeros(len(place), len(numbers), width, dtype=torch.float64, device=device)
    rows = config.data.micro_batch if config.moe.capacity is None else 1
    batches = heldout_batches(corpus, config.data.seq_len, config.log.eval_sequences, rows, readers.rank, readers.size)
    while several := list(islice(batches, config.micro_batches(readers.size))):
        with watch_routers(layers.values(), _seen) as routings, _capacity_of_each_sequence(layers.values(), mesh):
            found = engine.evaluate(
                [
                    Batch(x, y, m, documents_of(x, config, corpus), torch.full((len(x),), place[domain]))
                    for domain, x, y, m in several
                ]
            )
        for i, (domain, _, labels_BS, mask_BS) in enumerate(several):
            own_PB2 = torch.zeros(readers.size, rows, 2, dtype=torch.float64, device=device)
            if tp.rank == 0 and i < len(found):  # equal on a tensor-parallel group, none before the last stage
                own_PB2[readers.rank, :, 0] = found[i].double().sum(1)
                counted_B = (mask_BS & (labels_BS != IGNORED)).sum(1) * (cp.rank == 0)
                own_PB2[readers.rank, :, 1] = to_device(counted_B, device)
            sums_PB2.append((place[domain], own_PB2))
        for number, of_layer in zip(layers, routings, strict=True):
            for (domain, *_), seen_BX in zip(several, of_layer, strict=False):
                seen_NLX[place[domain], numbers.index(number)] += seen_BX.sum(0)
    parts, size = [sums.flatten() for _, sums in sums_PB2], seen_NLX.numel()
    read = Reading(sum_over(torch.cat([*parts, seen_NLX.flatten()]), world_axis()).get()).get()  # the only wait
    sums_X2, seen_NLX = read[: len(read) - size].view(-1, 2), read[len(read) - size :].view(seen_NLX.shape)
    domain_X = torch.tensor([i for i, _ in sums_PB2]).repeat_interleave(readers.size * rows)
    seen_X = sums_X2[:, 1] > 0
    return _summary(corpus.domains, sums_X2[seen_X], domain_X[seen_X], seen_NLX)


@contextmanager
def _capacity_of_each_sequence(layers: Iterable[MoE], mesh: Mesh | None) -> Iterator[None]:
    """Within the block, give every sequence its own capacity, over all ranks that hold parts of it."""
    axis = LOCAL if mesh is None else mesh["sequence"]
    with ExitStack() as stack:
        for layer in layers:
            if layer.capacity is not None and not layer.capacity.pads:
                stack.enter_context(layer.capacity.of_sequences(axis))
        yield


def _loss(sums_X2: Tensor) -> dict[str, Any]:
    """Return the loss of these sequences, its standard deviation if there are several, and their tokens.

    The deviation is that of a ratio of sums over sequences which are drawn independently of each other.
    """
    total, tokens = sums_X2.sum(0).tolist()
    found = {"loss": total / max(tokens, 1.0), "tokens": int(tokens)}
    if (size := len(sums_X2)) > 1:
        apart_X = sums_X2[:, 0] - found["loss"] * sums_X2[:, 1]
        found["loss_std"] = float((apart_X.square().sum() * size / (size - 1)).sqrt()) / tokens
    return found


def _summary(domains: tuple[str, ...], sums_X2: Tensor, domain_X: Tensor, seen_NLX: Tensor) -> dict[str, Any]:
    counts_NLE, tokens_NL, chosen_NL = seen_NLX[..., :-2], seen_NLX[..., -2], seen_NLX[..., -1]
    frequency_NLE = counts_NLE / counts_NLE.sum(-1, keepdim=True).clamp_min(1)
    evaluated = {domain: i for i, domain in enumerate(domains) if (domain_X == i).any()}
    routed = {domain: i for domain, i in evaluated.items() if tokens_NL[i].sum()}
    routing = {domain: frequency_NLE[i].tolist() for domain, i in evaluated.items()}
    return {
        **_loss(sums_X2),
        "domains": {d: _loss(sums_X2[domain_X == i]) for d, i in evaluated.items()},
        "routing": routing,
        "score_sum": {d: (chosen_NL[i] / tokens_NL[i]).tolist() for d, i in routed.items()},
        **domain_record({domain: routing[domain] for domain in routed}),
    }
