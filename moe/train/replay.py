"""Computes a step twice, to find hardware that calculates wrongly without an error."""

from __future__ import annotations

import torch
from torch import Tensor

from ..balance import random_state_kept
from ..collectives import Axis, sum_over
from ..engines import Accept, Batch, Computed, Engine
from ..parallel.alike import content_hash
from ..transfer import Reading


class DisagreementError(RuntimeError):
    """Raised, on every rank, if numbers that must be equal are not."""


def replayed(engine: Engine, batches: list[Batch], lr: float, axis: Axis, accept: Accept) -> Accept:
    """Compute the step of ``batches`` without its update, and return the ``accept`` with which to run it.

    The step then raises DisagreementError on every rank of ``axis`` if the bits of its losses or gradients are not the
    same. Every rank must call this. Leaves nothing behind, and costs as much as a step.
    """
    first: list[Tensor] = []

    def record(computed: Computed) -> bool:
        first.append(_hashes(computed))
        return False

    with random_state_kept():
        engine.step(batches, lr, record)

    def compare(computed: Computed) -> bool:
        again, losses = _hashes(computed), len(computed.losses)
        different_P2 = torch.zeros(axis.size, 2, dtype=torch.int64, device=computed.norm.device)
        parts = zip((first[0][:losses], first[0]), (again[:losses], again), strict=True)
        different_P2[axis.rank] = torch.tensor([not torch.equal(one, two) for one, two in parts]).to(different_P2)
        of_losses, of_any = sum_over(different_P2, axis).get().T.tolist()
        if any(of_any):
            # a gradient is reduced over ranks, so a wrong one is soon on all of them; a loss is a rank's own
            what, who = ("losses", of_losses) if any(of_losses) else ("gradients", of_any)
            ranks = [rank for rank, count in enumerate(who) if count]
            raise DisagreementError(
                f"computing the step twice gave different {what} on ranks {ranks}; if its kernels are deterministic, "
                "hardware is at fault: leave it out, and resume"
            )
        return accept(computed)

    return compare


def _hashes(computed: Computed) -> Tensor:
    found = [content_hash(part) for part in (*computed.losses, computed.norm, *computed.gradient())]
    return Reading(torch.stack([value.to(computed.norm.device) for value in found])).get()
