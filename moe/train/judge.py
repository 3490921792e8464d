"""Decides, alike on all ranks, whether a step may update the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..collectives import Axis, sum_over
from ..engines import Computed
from ..health import LossWindow
from ..health.finite import finite_here
from ..transfer import Reading
from .config import HealthConfig

#: steps over which ``health.max_skipped`` counts
SPAN = 100


class NonFiniteError(RuntimeError):
    """Raised, on every rank, if a loss or gradient may not update the weights. The step was not taken."""


@dataclass(frozen=True)
class Fault:
    """Why a step was not taken."""

    #: "nonfinite" or "spike", a field of :class:`HealthConfig`
    kind: str
    #: what was wrong and on which ranks, in words
    what: str
    #: mean over all ranks
    loss: float
    norm: float


class Judge:
    """Accepts or refuses a step's update, by the losses and gradient norms of all ranks of ``axis``.

    It is an :data:`equimoe.moe.engines.Accept`: every rank calls it once per step. ``counts`` says whether this rank's
    losses count; of ranks that compute the same losses, one does.
    """

    def __init__(self, config: HealthConfig, axis: Axis, counts: bool) -> None:
        self.config, self._axis, self._counts = config, axis, counts
        self.window = LossWindow()
        #: updates skipped since the start of the run, and the last optimizer steps (from 0) in whose place
        self.skips, self._recent = 0, list[int]()
        #: why the last step was refused; None if it was not
        self.fault: Fault | None = None

    def __call__(self, computed: Computed) -> bool:
        here = finite_here(computed.losses, computed.norm)
        losses = computed.losses if self._counts else []
        facts = torch.stack([here.double(), _sum(losses, here), computed.tokens.to(here.device).double()])
        sums = sum_over(facts, self._axis).get()
        # the only values of a step that the host waits for
        sound, total, tokens, norm = Reading(torch.cat((sums, computed.norm.to(sums).reshape(1)))).get().tolist()
        tokens /= self._axis.size  # every rank knows those of all
        loss = total / max(tokens, 1.0)
        self.fault = None
        if sound < self._axis.size:
            self.fault = Fault("nonfinite", self._name_ranks(computed, here), loss, norm)
        elif self.config.spike != "ignore" and self.window.is_spike(loss, self.config.spike_sigmas):
            self.fault = Fault("spike", f"loss={loss:.4f}: is far above the losses of the last steps", loss, norm)
        elif tokens:  # a step without labels has no loss
            self.window.add(loss)
        return self.fault is None

    def _name_ranks(self, computed: Computed, here: Tensor) -> str:
        """Say what is not finite on the lowest rank that has it, and on which ranks. Every rank must call this."""
        facts_P3 = torch.zeros(self._axis.size, 3, dtype=torch.float64, device=here.device)
        mine = (~here, _sum(computed.losses, here), computed.norm)
        facts_P3[self._axis.rank] = torch.stack([x.double().reshape(()) for x in mine])
        table = sum_over(facts_P3, self._axis).get().tolist()
        ranks = [rank for rank, (failed, _, _) in enumerate(table) if failed]
        _, loss, norm = table[ranks[0]]
        what = f"grad_norm={norm}" if math.isfinite(loss) else f"loss={loss}, grad_norm={norm}"
        where = "" if len(ranks) == self._axis.size else f" on ranks {ranks}"
        return f"{what}: is not finite{where}"

    def stop(self, step: int) -> str | None:
        """Return why the run must end after the refused optimizer step ``step``; None to go on without its update."""
        assert self.fault is not None
        remedy = "lower optim.lr, or resume from an earlier checkpoint"
        if getattr(self.config, self.fault.kind) == "stop":
            return f"{self.fault.what}; {remedy}"
        self.skips += 1
        self._recent = [s for s in self._recent if s > step - SPAN] + [step]
        if len(self._recent) > self.config.max_skipped:
            limit = f"health.max_skipped={self.config.max_skipped}"
            return f"{self.fault.what}; {limit} steps have been skipped within {SPAN} steps; {remedy}"
        return None

    @property
    def revisits(self) -> bool:
        """Whether the batch of the refused step is to be read once more."""
        return self.fault is not None and getattr(self.config, self.fault.kind) == "revisit"

    def state(self) -> dict[str, Any]:
        """Return what it remembers, as JSON."""
        return {"losses": self.window.losses, "skips": self.skips, "recent": self._recent}

    def restore(self, state: dict[str, Any]) -> None:
        """Remember what :meth:`state` described."""
        self.window = LossWindow(map(float, state["losses"]))
        self.skips, self._recent = int(state["skips"]), [int(step) for step in state["recent"]]


def _sum(losses: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the sum of all losses, an fp64 scalar on the device of ``like``."""
    zero = torch.zeros_like(like, dtype=torch.float64)
    return sum((losses_BS.sum(dtype=torch.float64).to(like.device) for losses_BS in losses), zero)
