"""Megatron-Core's optimizer gets the settings of the user's AdamW: its groups, with and without weight decay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("megatron.core", reason="needs Megatron-Core, which `make engines` installs")
pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("ignore")]  # of what it would use on a GPU

from equimoe.moe.engines import build_engine  # noqa: E402
from equimoe.moe.engines.megatron import build_megatron_engine  # noqa: E402
from tests.engines.test_megatron_engine import compare, mesh_of, model, refused, trajectory, whole_state  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.megatron_cpu import megatron_on_cpu  # noqa: E402

STEPS = 2
Named = dict[str, nn.Parameter]


def adamw(exempt: Callable[[str, nn.Parameter], bool], named: Named) -> torch.optim.AdamW:
    """AdamW with a group without weight decay, of the ``exempt`` weights."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in named.items():
        groups[exempt(name, p)].append(p)
    found = [{"params": params, "weight_decay": 0.0 if free else 0.5} for free, params in groups.items() if params]
    return torch.optim.AdamW(found, eps=1e-3)


#: by default, Megatron-Core exempts vectors and biases
EXEMPT: dict[str, Callable[[str, nn.Parameter], bool]] = {
    "routers, experts and the embedding": lambda name, p: any(n in name for n in ("router", "experts", "embedding")),
    "nothing, not even norms": lambda name, p: False,
    "everything": lambda name, p: True,
}


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("name", EXEMPT)
def test_weight_decay_spares_the_users_own_group(name: str, distributed: bool) -> None:
    optimizer = partial(adamw, EXEMPT[name])

    def rank_main(rank: int, world: int) -> Any:
        with megatron_on_cpu():
            mesh = mesh_of(ep=2)
            engine = build_megatron_engine(model(2), mesh, optimizer, distributed_optimizer=distributed)
            trajectory(engine, mesh, STEPS)
            return whole_state(engine)

    alone = build_engine(model(2), None, optimizer)
    trajectory(alone, None, STEPS)
    for state in run_ranks(rank_main, 2):
        compare(state, whole_state(alone))


def two_groups(named: Named, **second: Any) -> torch.optim.AdamW:
    weights = list(named.values())
    return torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:], **second}], lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize(
    ("message", "second"),
    [
        (r"optimizer: weight decays \[0.1, 0.2\]; .* can hold one, and zero", {"weight_decay": 0.2}),
        (r"optimizer: a group has lr=0.2, another 0.1; .* may only differ in weight decay", {"lr": 0.2}),
        (r"optimizer: a group has betas=\(0.5, 0.5\), another \(0.9, 0.999\)", {"betas": (0.5, 0.5)}),
        (r"optimizer: a group has amsgrad=True, another False", {"amsgrad": True}),
    ],
)
def test_groups_that_it_cannot_hold_are_refused(message: str, second: dict[str, Any]) -> None:
    refused(message, {}, optimizer=partial(two_groups, **second))
