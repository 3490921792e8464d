"""Scores texts: the loss of every token.  B windows, S tokens of each, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..collectives import LOCAL, Axis
from ..model import Decoder
from ..model.documents import document_numbers, document_starts


@dataclass(frozen=True)
class Window:
    """A part of a text that the model reads at once. By default, every token but the first is scored."""

    #: number of the text
    text: int
    ids: Sequence[int]
    #: number of tokens after the first that are only read, not scored
    read_only: int = 0
    #: for each token after the first, whether it is scored; None: all are
    scored: Sequence[bool] | None = None


def windows(text: int, ids: Sequence[int], length: int, scored: Sequence[bool] | None = None) -> Iterator[Window]:
    """Cut a text into windows of which the model reads ``length`` tokens; each token but the first is scored once.

    ``scored`` leaves out some of these tokens, such as the prompts of instruction data.
    """
    for start in range(0, len(ids) - 1, length):
        of_window = None if scored is None else scored[start : start + length]
        yield Window(text, ids[start : start + length + 1], scored=of_window)


@torch.no_grad()
def score(
    model: Decoder, several: Sequence[Window], *, end: int | None = None, batch: int = 8, dp: Axis = LOCAL
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield, for each window of this rank, its number, the loss of each scored token in nats (fp64 [S], on the CPU),
    and whether the model finds that token the most likely one (bool [S]).

    With ``end``, tokens after that id do not attend to those up to it, as in training with separate documents. Every
    rank of ``dp`` must call this with the same windows; they share them, ``batch`` at a time on each rank, those
    of similar lengths together.
    """
    order = sorted(range(len(several)), key=lambda n: -len(several[n].ids))
    device = next(model.parameters()).device
    for first in range(0, len(order), batch * dp.size):
        mine = order[first + dp.rank * batch : first + (dp.rank + 1) * batch]
        rows = [several[n].ids for n in mine] or [[0, 0]]  # without windows, take part in the others' exchanges
        longest = max(map(len, rows)) - 1
        ids_BT = torch.tensor([[*map(int, row)] + [0] * (longest + 1 - len(row)) for row in rows], device=device)
        lengths_B1 = torch.tensor([[len(row) - 1 if mine else 0] for row in rows], device=device)
        mask_BS = torch.arange(longest, device=device) < lengths_B1
        starts_BS = None if end is None else document_starts(document_numbers(ids_BT[:, :-1], end))
        logits_BSV = whole(model(ids_BT[:, :-1], mask_BS, starts_BS))
        losses_BS = F.cross_entropy(logits_BSV.float().mT, ids_BT[:, 1:], reduction="none").double().cpu()
        best_BS = (logits_BSV.argmax(-1) == ids_BT[:, 1:]).cpu()
        for row, n in enumerate(mine):
            window = several[n]
            scored_S = torch.arange(longest) < len(window.ids) - 1
            scored_S[: window.read_only] = False
            if window.scored is not None:
                scored_S[: len(window.scored)] &= torch.tensor(window.scored)
            yield n, losses_BS[row, scored_S], best_BS[row, scored_S]


def whole(logits: Tensor) -> Tensor:
    """Return the logits of the whole vocabulary, which tensor parallelism splits over the ranks."""
    gather = getattr(logits, "full_tensor", None)
    return logits if gather is None else gather()
