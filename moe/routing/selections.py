"""Ways to choose experts, by name: functions in training and in evaluation.  T tokens, E experts, K top-k."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ..config import RouterConfig
from .assign import balanced, sinkhorn
from .expert_choice import expert_choice
from .select import each_group, in_turn, top_p

#: (logits [T, E], scores plus expert bias [T, E], valid tokens [T] or None, number of sequences) -> ids of the chosen
#: experts [T, K]
Select = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]


class Selection(NamedTuple):
    """The functions that choose experts in training and in evaluation. None: the router's op chooses the best."""

    training: Select | None = None
    evaluation: Select | None = None


def _always(select: Select) -> Selection:
    return Selection(select, select)


#: name -> function from the configuration and K to the selection
SELECTIONS: dict[str, Callable[[RouterConfig, int], Selection]] = {
    "top_k": lambda config, k: Selection(),
    "top_p": lambda config, k: _always(partial(top_p, k=k, p=config.top_p)),
    "sinkhorn": lambda config, k: Selection(training=partial(sinkhorn, k=k)),
    "base": lambda config, k: Selection(training=balanced),
    "expert_choice": lambda config, k: _always(partial(expert_choice, k=k, cap=config.cap)),
    "expert_choice_by_position": lambda config, k: _always(
        partial(expert_choice, k=k, cap=config.cap, by_position=True)
    ),
    "even": lambda config, k: _always(partial(in_turn, k=k)),
    "each_group": lambda config, k: _always(partial(each_group, k=k, groups=config.groups)),
}
