"""Generates text with a key/value cache, also with experts over several ranks.

B sequences, S positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..collectives import LOCAL, Axis, sum_over
from ..experts import MergedLinear
from ..model import Attention, Decoder
from ..model.past import Past, Positions
from .sample import Sampling, choose
from .score import whole

#: called with the number of a prompt and its next token
OnToken = Callable[[int, int], None]


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop: Collection[int] = (),
    end: int | None = None,
    dp: Axis = LOCAL,
    batch: int = 8,
    on_token: OnToken = lambda prompt, token: None,
) -> dict[int, list[int]]:
    """Continue prompts, which are lists of token ids; return the new tokens of this rank's prompts by number.

    Every rank of ``dp`` must call this with the same prompts; they share them, ``batch`` at a time on each rank. A text
    ends after a token of ``stop``, which is part of the result, or after ``sampling.max_tokens``. With ``end``, tokens
    after that id do not attend to those up to it, as in training with separate documents. Raises ValueError for a
    prompt that is empty, has ids outside of the vocabulary, or leaves no room for its continuation.
    """
    _check(model, prompts, sampling)
    own = range(dp.rank, len(prompts), dp.size)
    most = -(-len(prompts) // dp.size)  # of one rank; those with less take part in the others' exchanges
    texts: dict[int, list[int]] = {}
    was_training = model.training
    model.eval()
    try:
        for first in range(0, most, batch):
            several = _Batch(model, {n: prompts[n] for n in own[first : first + batch]}, sampling, stop, end)
            while _any(several.unfinished, dp):
                several.step(on_token)
            texts |= several.texts
    finally:
        model.train(was_training)
    return texts


def _check(model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    room, vocabulary = seq_len(model), vocabulary_of(model)
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number}: is empty; give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(
                f"prompt {number}: has ids outside of the model's {vocabulary} tokens; check the tokenizer"
            )
        if len(prompt) + sampling.max_tokens > room:
            raise ValueError(
                f"prompt {number}: has {len(prompt)} tokens, and with max_tokens={sampling.max_tokens} more than the "
                f"{room} positions of the model; shorten one of them, or build the model with a larger seq_len"
            )


def seq_len(model: Decoder) -> int:
    """Return the number of positions that a decoder has."""
    return next(module.seq_len for module in model.modules() if isinstance(module, Attention))


def vocabulary_of(model: Decoder) -> int:
    """Return the number of tokens that a decoder knows."""
    assert isinstance(model.embedding, nn.Embedding)
    return model.embedding.num_embeddings


def _any(here: bool, dp: Axis) -> bool:
    return bool(sum_over(torch.tensor(float(here)), dp).get()) if dp.size > 1 else here


class _Batch:
    """Some prompts of this rank, which are continued together."""

    def __init__(
        self,
        model: Decoder,
        prompts: dict[int, Sequence[int]],
        sampling: Sampling,
        stop: Collection[int],
        end: int | None,
    ) -> None:
        if any(isinstance(module, MergedLinear) for module in model.modules()):
            raise ValueError(
                "model: merged linear experts read whole sequences, and have no cache to generate text with"
            )
        self.model, self.sampling, self.stop, self.end = model, sampling, stop, end
        self.numbers = list(prompts)
        self.texts: dict[int, list[int]] = {number: [] for number in prompts}
        self.generators = [torch.Generator().manual_seed(_mixed(sampling.seed, number)) for number in prompts]
        #: tokens that the model has not seen yet, of each row
        self.new = [list(prompt) for prompt in prompts.values()] or [[0]]
        self.seen = [0] * len(self.new)
        self.finished = [False] * len(prompts) or [True]
        #: position at which each row's current document starts
        self.document = [0] * len(self.new)
        room = max((len(prompt) for prompt in prompts.values()), default=1) + sampling.max_tokens
        self.now = Positions(torch.empty(0), 0)
        self.pasts = {m: Past(room, self.now) for m in model.modules() if isinstance(m, Attention)}

    @property
    def unfinished(self) -> bool:
        return not all(self.finished)

    def step(self, on_token: OnToken) -> None:
        """Let the model see the new tokens, and choose the next one of every row."""
        logits_BV = self._logits()
        for row, number in enumerate(self.numbers):
            if self.finished[row]:
                continue
            token = choose(logits_BV[row], self.sampling, self.generators[row])
            self.texts[number].append(token)
            on_token(number, token)
            self.finished[row] = token in self.stop or len(self.texts[number]) == self.sampling.max_tokens
            self.seen[row] += len(self.new[row])
            self.new[row] = [token]

    def _logits(self) -> Tensor:
        """Return the logits [B, V] after each row's last token."""
        device = next(self.model.parameters()).device
        longest = max(map(len, self.new))
        ids_BS = torch.tensor([row + [0] * (longest - len(row)) for row in self.new], device=device)
        lengths_B1 = torch.tensor([[len(row)] for row in self.new], device=device)
        begins_B1 = torch.tensor([[seen] for seen in self.seen], device=device)
        finished_B1 = torch.tensor([[finished] for finished in self.finished], device=device)
        offsets_S = torch.arange(longest, device=device)
        # padding gets later positions, which the row's own tokens overwrite before they can be seen
        self.now.positions_BS = begins_B1 + offsets_S
        self.now.reach = max(self.seen) + longest
        self.now.starts_BS = None if self.end is None else self._starts(ids_BS)
        mask_BS = (offsets_S < lengths_B1) & ~finished_B1
        with _remembering(self.pasts):
            x_BSD = self.model.hidden(ids_BS, mask_BS)
        last_BD = x_BSD[torch.arange(len(self.new), device=device), lengths_B1[:, 0] - 1]
        return whole(self.model.logits(last_BD))

    def _starts(self, ids_BS: Tensor) -> Tensor:
        """Return the position at which each new position's document starts [B, S]."""
        after_BS = (self.now.positions_BS + 1) * (ids_BS == self.end)
        before_B1 = torch.tensor(self.document, device=ids_BS.device)[:, None]
        starts_BT = torch.cat((before_B1, after_BS), 1).cummax(1).values
        for row, ids in enumerate(self.new):
            self.document[row] = int(starts_BT[row, len(ids)])
        # a finished row repeats its last token, which may be the end
        return starts_BT[:, :-1].minimum(self.now.positions_BS)


@contextmanager
def _remembering(pasts: dict[Attention, Past]) -> Iterator[None]:
    """Within the block, let attention use its past."""
    for attention, past in pasts.items():
        attention.past = past
    try:
        yield
    finally:
        for attention in pasts:
            attention.past = None


def _mixed(seed: int, number: int) -> int:
    """Return a seed for one prompt. Multiplying by an odd number spreads consecutive numbers."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9) % (1 << 63)
