"""Observes routers through forward hooks.  T tokens, D hidden, E experts, K top-k, B sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..layer import MoE
from ..routing import Router
from ..types import Routing

V = TypeVar("V")


@contextmanager
def watch_routers(layers: Iterable[MoE], see: Callable[..., V]) -> Iterator[list[list[V]]]:
    """Within the block, call ``see`` after every forward of the layers' routers, and collect its results.

    ``see`` gets the router, its hidden states [T, D], the routing, the codes [T] or None, and by name what else the
    router was given. Yields one list of results per layer. Every kind of forward is observed: training, evaluation,
    counting and recomputation.
    """
    handles, seen = [], []
    for layer in layers:
        found: list[V] = []

        def hook(router: Router, args: Any, given: Any, routing: Routing, found: list[V] = found) -> None:
            found.append(see(router, args[0], routing, *args[4:], **given))

        # run before FSDP's hook, which reshards the weight
        handles.append(layer.router.register_forward_hook(hook, prepend=True, with_kwargs=True))
        seen.append(found)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def chosen_probability(
    router: Router, x_TD: Tensor, routing: Routing, codes_T: Tensor | None = None, **given: Any
) -> Tensor:
    """Return fp64 [B]: the probability of the K chosen experts, summed over each sequence's valid tokens.

    Probabilities are those of the balance loss: scores of all experts, normalised to 1. Per token the result is K/E for
    uniform scores, and 1 if only chosen experts have a score above 0 ("topK score sum" of arXiv 2501.11873).
    """
    if routing.mixing is not None:  # every token uses all experts
        return routing.tokens_B.double()
    probabilities_TE = router.probabilities(x_TD, codes_T, **given)
    chosen_TK = probabilities_TE.gather(1, routing.ids_TK.clamp_min(0)).masked_fill(routing.ids_TK < 0, 0.0)
    chosen_T = chosen_TK.sum(1)
    sequences = len(routing.tokens_B)
    return chosen_T.double().view(sequences, len(chosen_T) // sequences).sum(1)


def training_score(
    router: Router, x_TD: Tensor, routing: Routing, codes_T: Tensor | None = None, **given: Any
) -> Tensor | None:
    """Return fp64 [2]: the sum of :func:`chosen_probability`, and valid tokens. None in recomputation or counting."""
    if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
        return None
    return torch.stack(
        (chosen_probability(router, x_TD, routing, codes_T, **given).sum(), routing.tokens_B.sum().double())
    )
