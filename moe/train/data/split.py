"""Splits the documents of a domain into training and held-out tokens, without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .stream import Stream, Tokens, constant
from .token_file import TokenFile


@dataclass
class Shelf:
    """The tokens of one domain: documents in the order of their digests, and flat token files."""

    #: the ids of all documents, with an end-of-document id after each
    ids: Tokens
    #: uint8, as long as ``ids``: 1 for an id that is trained on; None: all are
    mask: Tokens | None
    #: ids of each document, without the one that ends it
    lengths: np.ndarray
    #: files of ids without document boundaries, in the order of their digests
    flat: list[TokenFile] = field(default_factory=list)

    def documents(self) -> list[tuple[Tokens, Tokens | None]]:
        """Return the ids and the loss mask of each document, and each flat file."""
        ends = np.cumsum(self.lengths + 1)
        places = [slice(end - length - 1, end - 1) for length, end in zip(self.lengths, ends, strict=True)]
        masks = [None if self.mask is None else self.mask[place] for place in places]
        return [*zip([self.ids[place] for place in places], masks, strict=True), *((file, None) for file in self.flat)]


@dataclass
class Streams:
    """The tokens of one domain after the split, and their loss masks; None: every id is trained on."""

    train: Tokens
    heldout: Tokens
    train_mask: Tokens | None = None
    heldout_mask: Tokens | None = None


def split(shelf: Shelf, fraction: float, separator: int, dtype: np.dtype) -> Streams:
    """Hold out ``fraction`` of the domain's tokens, or up to 1.5 times that.

    Whole documents are held out first, in the order of their digests, as far as they fit. If they do not suffice, the
    rest is taken from the ends of the other documents, in proportion to their lengths. Each flat file is cut by itself.
    The ids ``separator`` stand between documents.
    """
    kept: list[tuple[Tokens, int, int]] = []
    held: list[tuple[Tokens, int, int]] = []
    for source, lengths in ((shelf.ids, shelf.lengths), *((f, np.array([len(f)])) for f in shelf.flat)):
        for into, (starts, stops) in zip((kept, held), _divided(lengths, fraction), strict=True):
            into += [(source, int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]
    streams = Streams(*(_join([s[a:b] for s, a, b in runs], separator, dtype) for runs in (kept, held)))
    if shelf.mask is not None:
        streams.train_mask, streams.heldout_mask = (
            _join([_mask(shelf, s, a, b) for s, a, b in runs], 1, np.dtype(np.uint8)) for runs in (kept, held)
        )
    return streams


def _mask(shelf: Shelf, source: Tokens, start: int, stop: int) -> Tokens:
    if source is shelf.ids and shelf.mask is not None:
        return shelf.mask[start:stop]
    return constant(1, stop - start, np.uint8)


Runs = tuple[np.ndarray, np.ndarray]


def _divided(lengths: np.ndarray, fraction: float) -> tuple[Runs, Runs]:
    """Return where the runs of training ids and of held-out ids start and stop, in ids with one separator after each.

    Neighbours form one run, with the separator between them.
    """
    lengths = lengths.astype(np.int64)
    starts = np.cumsum(lengths + 1) - lengths - 1
    whole, tails = _heldout(lengths, fraction)
    stops = starts + lengths
    kept = _runs(starts[~whole], (stops - tails)[~whole])
    held = _runs(np.where(whole, starts, stops - tails), stops)
    return kept, held


def _runs(starts: np.ndarray, stops: np.ndarray) -> Runs:
    some = starts < stops
    starts, stops = starts[some], stops[some]
    apart = np.flatnonzero(starts[1:] != stops[:-1] + 1)
    return starts[np.r_[0, apart + 1]] if len(starts) else starts, stops[np.r_[apart, -1]] if len(stops) else stops


def _heldout(lengths: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return which documents are held out as a whole, and how many ids at the end of each of the others."""
    whole, tails = np.zeros(len(lengths), bool), np.zeros(len(lengths), np.int64)
    total, taken = int(lengths.sum()), 0
    # evaluation needs at least two tokens
    target = max(fraction * total, min(2, total // 2))
    # never hold out the longest document as a whole: it may be most of the domain
    longest = int(lengths.argmax()) if len(lengths) else 0
    for i, length in enumerate(lengths):
        if taken >= target:
            break
        if i != longest and taken + length <= 1.5 * target:
            whole[i] = True
            taken += int(length)
    missing, others, seen = max(int(target) - taken, 0), total - taken, 0
    for place in np.flatnonzero(~whole) if missing else ():
        # round the running sum instead of each part, so that the parts add up exactly
        own = int(lengths[place])
        tails[place] = missing * (seen + own) // others - missing * seen // others
        seen += own
    return whole, tails


def _join(pieces: Sequence[Tokens], separator: int, dtype: np.dtype) -> Tokens:
    """Join pieces to one stream with ``separator`` between them. A single one of uint16 or uint32 stays as it is."""
    if not pieces:
        return np.empty(0, dtype)
    if len(pieces) == 1 and pieces[0].dtype in (dtype, np.uint16, np.uint32):
        return pieces[0]
    between = constant(separator, 1, dtype)
    joined = Stream([part for piece in pieces for part in (between, piece)][1:], dtype)
    return np.asarray(joined) if all(isinstance(piece, np.ndarray) for piece in pieces) else joined
