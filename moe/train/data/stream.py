"""Ids from several places, joined to one array that is read when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .token_file import TokenFile, neighbours


class Stream:
    """Arrays and token files one after another, like one array: a slice is another Stream, and ``np.asarray`` reads."""

    ndim = 1

    def __init__(self, pieces: Sequence[Tokens], dtype: Any) -> None:
        self.pieces = [piece for piece in pieces if len(piece)]
        self.dtype = np.dtype(dtype)
        #: where each piece starts, followed by the length of all
        self._starts = np.cumsum([0, *map(len, self.pieces)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            return self._part(start, max(stop, start)) if step == 1 else self._read()[place]
        places = np.asarray(place)
        if places.ndim == 0:
            at = range(len(self))[int(places)]
            return self._part(at, at + 1)._read()[0]
        parts = [self._part(start, stop)._read() for start, stop in neighbours(places)]
        return np.concatenate([np.empty(0, self.dtype), *parts])

    def _part(self, start: int, stop: int) -> Stream:
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        while first < len(self.pieces) and start < stop:
            piece, offset = self.pieces[first], int(self._starts[first])
            pieces.append(piece[start - offset : stop - offset])
            start, first = offset + len(piece), first + 1
        return Stream(pieces, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self._read() if dtype is None else self._read().astype(dtype)

    def astype(self, dtype: Any, copy: bool = True) -> NDArray[Any]:
        return self._read().astype(dtype, copy=False)

    def _read(self) -> NDArray[Any]:
        read = np.empty(len(self), self.dtype)
        for piece, start, stop in zip(self.pieces, self._starts, self._starts[1:], strict=False):
            read[start:stop] = np.asarray(piece)
        return read


#: ids in memory or in files, shape ``(T,)``
Tokens = np.ndarray | TokenFile | Stream


def constant(value: int, length: int, dtype: Any) -> np.ndarray:
    """Return ``length`` times the same value, in the memory of one."""
    return np.broadcast_to(np.array(value, dtype), (length,))


def described(tokens: Tokens | None) -> list[dict[str, Any]] | None:
    """Describe where ids are, for another process: an argument of :func:`joined`.

    Returns None for no ids. Raises ValueError if they are only in memory.
    """
    if tokens is None:
        return None
    found = []
    for piece in tokens.pieces if isinstance(tokens, Stream) else [tokens]:
        if isinstance(piece, TokenFile):
            found.append(piece.place)
        elif isinstance(piece, np.ndarray) and (not len(piece) or piece.strides == (0,)):
            found.append({"value": int(piece[0]) if len(piece) else 0, "length": len(piece), "dtype": piece.dtype.str})
        else:
            raise ValueError("the ids are only in this process")
    return found


def joined(pieces: list[dict[str, Any]] | None) -> Stream | None:
    """Open ids that :func:`described` described."""
    if pieces is None:
        return None
    opened = [
        TokenFile.at(piece) if "path" in piece else constant(piece["value"], piece["length"], piece["dtype"])
        for piece in pieces
    ]
    return Stream(opened, np.result_type(*(piece.dtype for piece in opened)) if opened else np.uint16)
