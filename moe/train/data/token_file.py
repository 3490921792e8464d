"""Ids in a file that is read when they are needed, with every read checked."""

from __future__ import annotations

import os
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray


class DataError(ValueError):
    """The training data cannot be read, or are not what they were when the run started."""


def neighbours(places: NDArray[Any]) -> list[tuple[int, int]]:
    """Return where each run of consecutive places starts and stops, so that it can be read at once."""
    runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]


class _Opened:
    """An open file, which stays readable if somebody deletes or replaces it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class TokenFile:
    """Ids in a file, like an array: a slice is another TokenFile, and ``np.asarray`` reads the ids.

    The file is read, not memory-mapped: a mapped file that is truncated, or on a disk that fails, kills the process
    with SIGBUS. Here both raise DataError. ``below`` limits the ids: those that were fine at the start but are not any
    more raise DataError too, instead of indexing outside the embedding.
    """

    ndim = 1

    def __init__(self, path: str, dtype: np.dtype[Any], offset: int, length: int) -> None:
        self.dtype, self._length = dtype, length
        #: position of the first id in the file, in ids; where the ids start, in bytes
        self._first, self.offset = 0, offset
        self._file = _Opened(path)
        #: the file's size that all its ids need; exclusive limit of the ids, None: not checked
        self._size, self._limit = offset + length * dtype.itemsize, cast(int | None, None)

    def below(self, limit: int) -> TokenFile:
        """Return the same ids, of which every read checks that they are in ``[0, limit)``."""
        return self._part(0, self._length, limit)

    def _part(self, start: int, stop: int, limit: int | None) -> TokenFile:
        part = object.__new__(TokenFile)
        part.__dict__ |= self.__dict__
        part._first, part._length, part._limit = self._first + start, max(stop - start, 0), limit
        return part

    @property
    def place(self) -> dict[str, Any]:
        """Where the ids are, as arguments of :meth:`at`."""
        return {
            "path": self._file.path,
            "dtype": self.dtype.str,
            "offset": self.offset,
            "size": self._size,
            "first": self._first,
            "length": self._length,
            "limit": self._limit,
        }

    @classmethod
    def at(cls, place: dict[str, Any]) -> TokenFile:
        """Open the ids of another process's file, from its :attr:`place`."""
        dtype = np.dtype(place["dtype"])
        whole = cls(place["path"], dtype, place["offset"], (place["size"] - place["offset"]) // dtype.itemsize)
        return whole._part(place["first"], place["first"] + place["length"], place["limit"])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            start, stop, step = place.indices(self._length)
            return self._part(start, stop, self._limit) if step == 1 else self._read()[place]
        places = np.asarray(place)
        if places.ndim == 0:
            return self._read()[place] if place < 0 else self[int(place) : int(place) + 1]._read()[0]
        parts = [self[start:stop]._read() for start, stop in neighbours(places)]
        return np.concatenate([np.empty(0, self.dtype), *parts])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self._read() if dtype is None else self._read().astype(dtype)

    def astype(self, dtype: Any, copy: bool = True) -> NDArray[Any]:
        return self._read().astype(dtype, copy=False)

    def _read(self) -> NDArray[Any]:
        ids = np.empty(self._length, self.dtype)
        view, at = ids.view(np.uint8).data, 0
        try:
            # on every rank, not only on those whose ids are gone
            size = os.fstat(self._file.descriptor).st_size
            while at < len(view) and size >= self._size:
                where = self.offset + self._first * self.dtype.itemsize + at
                count = os.preadv(self._file.descriptor, [view[at:]], where)
                if not count:
                    size = where
                at += count
        except OSError as error:
            raise self._error(f"cannot be read any more ({error.strerror or error})") from None
        if size < self._size:
            raise self._error(f"has shrunk from {self._size} to {size} bytes since the run started")
        if self._length and self._limit is not None and (int(ids.max()) >= self._limit or int(ids.min()) < 0):
            bad = int(np.argmax((ids >= self._limit) | (ids < 0)))
            raise self._error(
                f"id {int(ids[bad])} at position {self._first + bad} is outside [0, {self._limit}); somebody has "
                "changed the file since the run started"
            )
        return ids

    def _error(self, problem: str) -> DataError:
        return DataError(f"data.path={self._file.path!r}: {problem}; restore the file and resume")
