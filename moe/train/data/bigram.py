"""A bigram model, which predicts each token from the previous one only: the baseline for a language model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from ...config import require
from .corpus import Corpus
from .packing import heldout_starts
from .sources import CHUNK
from .stream import Tokens

#: largest vocabulary for which pairs are counted in a dense table
DENSE_UP_TO = 4096
# the hyperparameters to choose from; the first of each is used if there are no tokens to choose with
#: counts subtracted from each seen pair and given to the back-off (absolute discounting)
DISCOUNTS = (0.5, 0.05, 0.2, 0.35, 0.65, 0.8, 0.95)
#: extra counts that each first token gives to the back-off
STRENGTHS = (0.0, 1.0, 10.0, 100.0, 1000.0, 10000.0)
#: whether the back-off uses Kneser-Ney continuation counts instead of token counts
CONTINUATION = (True, False)
#: most training tokens to which the model is fitted: of a longer text, the beginning of each domain, in proportion
MOST = 1 << 26
#: share of each domain's training tokens, taken from its end, on which the hyperparameters are chosen
TAIL = 0.05

#: a stream, and which of its ids are trained on; None: all
_Masked = tuple[Tokens, Tokens | None]


def bigram_loss(
    corpus: Corpus, vocab_size: int, seq_len: int = 1, sequences_per_domain: int | None = None
) -> dict[str, float]:
    """Return the held-out loss of a bigram model in nats per token: by domain, and ``"all"`` for all tokens.

    The model is fitted to the training tokens of all domains together. It uses absolute discounting with a strength
    (as in a Pitman-Yor process, Teh 2006) and backs off to Kneser-Ney continuation counts or to token counts; the
    hyperparameters are those that do best on the end of the training text.

    Labels that are not trained on, such as the prompts of instruction data, are left out of both. Of a text of more
    than :data:`MOST` tokens, only so many are read.

    The labels are the same as those of :func:`heldout_batches` for the same ``seq_len`` and ``sequences_per_domain``.
    The defaults give every held-out token except the first of each domain. Domains without labels are left out. Raises
    ``ValueError`` if ``vocab_size`` is smaller than the corpus's.
    """
    remedy = f"must be at least {corpus.vocab_size}, the size of the corpus's vocabulary"
    require(vocab_size >= corpus.vocab_size, "vocab_size", vocab_size, remedy)
    head, tail = list[_Masked](), list[_Masked]()
    total = sum(map(len, corpus.train.values()))
    for domain, whole in corpus.train.items():
        stream = whole[: len(whole) * MOST // total] if total > MOST else whole
        cut, mask = len(stream) - int(len(stream) * TAIL), corpus.train_masks.get(domain)
        for part, place in ((head, slice(cut)), (tail, slice(max(cut - 1, 0), len(stream)))):
            part.append((stream[place], None if mask is None else mask[place]))
    head_pairs, tail_pairs = _count(head, vocab_size), _count(tail, vocab_size)
    variant = _choose(head_pairs, tail_pairs, vocab_size)
    model = _Bigram(_merge([head_pairs, tail_pairs]), vocab_size)

    losses: dict[str, float] = {}
    sums = np.zeros(2)
    for domain, stream in corpus.heldout.items():
        starts = heldout_starts(len(stream), seq_len, sequences_per_domain)
        if len(starts):
            label = (starts[:, None] + np.arange(1, seq_len + 1)).ravel()
            label = label[label < len(stream)]
            if domain in corpus.heldout_masks:
                label = label[corpus.heldout_masks[domain][label] != 0]
            if not len(label):
                continue
            keys = _keys(stream[label - 1], stream[label], vocab_size)
            nats = model.nats(keys, model.find(keys), *variant)
            losses[domain] = float(nats.mean())
            sums += nats.sum(), len(nats)
    if losses:
        losses["all"] = float(sums[0] / sums[1])
    return losses


@dataclass
class _Pairs:
    """The pairs that occur, as sorted keys ``first * vocab_size + second``, and the count of each."""

    keys: np.ndarray
    counts: np.ndarray


def _keys(first: np.ndarray, second: np.ndarray, vocab_size: int) -> np.ndarray:
    return first.astype(np.int64) * vocab_size + second


def _chunks(streams: Iterable[_Masked], vocab_size: int) -> Iterator[np.ndarray]:
    """Yield the keys of adjacent pairs in pieces, because a key takes eight bytes, several times a token's."""
    for stream, mask in streams:
        for start in range(0, len(stream) - 1, CHUNK):
            piece = np.asarray(stream[start : start + CHUNK + 1])
            keys = _keys(piece[:-1], piece[1:], vocab_size)
            yield keys if mask is None else keys[np.asarray(mask[start + 1 : start + CHUNK + 1]) != 0]


def _count(streams: Iterable[_Masked], vocab_size: int) -> _Pairs:
    if vocab_size <= DENSE_UP_TO:
        table = np.zeros(vocab_size**2, np.int64)
        for keys in _chunks(streams, vocab_size):
            table += np.bincount(keys, minlength=vocab_size**2)
        occurring = np.flatnonzero(table)
        return _Pairs(occurring, table[occurring])
    total = _Pairs(np.empty(0, np.int64), np.empty(0, np.int64))
    for keys in _chunks(streams, vocab_size):
        total = _merge([total, _Pairs(*np.unique(keys, return_counts=True))])
    return total


def _merge(pairs: list[_Pairs]) -> _Pairs:
    keys = np.concatenate([p.keys for p in pairs])
    counts = np.concatenate([p.counts for p in pairs])
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return _Pairs(keys[first], np.add.reduceat(counts, first) if len(first) else counts)


def _choose(head: _Pairs, tail: _Pairs, vocab_size: int) -> tuple[float, float, bool]:
    """Return the hyperparameters with which a model fitted to ``head`` has the lowest loss on ``tail``."""
    model = _Bigram(head, vocab_size)
    counts = model.find(tail.keys)

    def loss(variant: tuple[float, float, bool]) -> float:
        return float(model.nats(tail.keys, counts, *variant) @ tail.counts)

    return min(product(DISCOUNTS, STRENGTHS, CONTINUATION), key=loss)


class _Bigram:
    """P(b|a) = (max(c(ab) - d, 0) + (s + d * followers(a)) * P(b)) / (c(a) + s), or P(b) if a was never seen.

    c are counts, d the discount, s the strength, and followers(a) the number of different tokens seen after a.
    """

    def __init__(self, pairs: _Pairs, vocab_size: int) -> None:
        self._pairs, self._vocab_size = pairs, vocab_size
        first, second = np.divmod(pairs.keys, vocab_size)
        self._total = np.bincount(first, weights=pairs.counts, minlength=vocab_size)
        self._followers = np.bincount(first, minlength=vocab_size)
        # False: the count of each token; True: the number of different tokens it follows (Kneser-Ney)
        occurrences = {
            False: np.bincount(second, weights=pairs.counts, minlength=vocab_size),
            True: np.bincount(second, minlength=vocab_size),
        }
        # half a count for each id (Jeffreys prior), so that no id has probability 0
        self._single = {kind: (n + 0.5) / (n.sum() + 0.5 * vocab_size) for kind, n in occurrences.items()}

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the count of each of ``keys`` in the training text."""
        if not len(self._pairs.keys):
            return np.zeros(len(keys), np.int64)
        place = np.minimum(np.searchsorted(self._pairs.keys, keys), len(self._pairs.keys) - 1)
        return np.where(self._pairs.keys[place] == keys, self._pairs.counts[place], 0)

    def nats(
        self, keys: np.ndarray, counts: np.ndarray, discount: float, strength: float, continuation: bool
    ) -> np.ndarray:
        """Return -log P(second|first) of each key, given the count of each key."""
        first, second = np.divmod(keys, self._vocab_size)
        # a first token that was never seen gets one pseudo-count, which goes to the back-off
        unseen = self._total == 0
        scale_V = 1 / (self._total + strength + unseen)
        backoff_V = (discount * self._followers + strength + unseen) * scale_V
        kept = np.maximum(counts - discount, 0) * scale_V[first]
        return -np.log(kept + backoff_V[first] * self._single[continuation][second])
