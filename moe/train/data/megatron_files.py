"""Reads the tokenised data of Megatron-LM: a .bin file with ids, and an .idx file with their type and documents."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from .document import Document
from .records import Place
from .token_file import TokenFile

MAGIC = b"MMIDIDX\0\0"
#: magic, version, type of the ids, number of sequences, number of document boundaries
HEADER = struct.Struct("<9sQBQQ")
#: type of the ids -> integer type
TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
#: documents whose places are read at a time
BLOCK = 1 << 16


def megatron(place: Place) -> Iterator[Document]:
    """Yield the documents of a .bin file with an .idx file next to it."""
    index = place.path.with_suffix(".idx")

    def wrong(why: str) -> ValueError:
        return ValueError(f"data.path={str(index)!r}: {why}; make both files again with Megatron's preprocessing")

    try:
        with index.open("rb") as file:
            raw, size, held = file.read(HEADER.size), index.stat().st_size, place.path.stat().st_size
            if len(raw) < HEADER.size or not raw.startswith(MAGIC):
                raise wrong("is not an index of Megatron")
            _, version, code, sequences, boundaries = HEADER.unpack(raw)
            if version != 1 or code not in TYPES:
                raise wrong(f"has version {version} and type {code} of ids, which are unknown")
            # lengths (int32) and byte offsets (int64) of sequences, then the first sequence of each document (int64)
            needed = HEADER.size + 12 * sequences + 8 * boundaries
            if size < needed or boundaries < 1:
                raise wrong(f"has {size} bytes, but {sequences} sequences need {needed}")
            dtype = np.dtype(TYPES[code])
            ids = TokenFile(str(place.path), dtype, 0, held // dtype.itemsize)
            documents = boundaries - 1
            for first in range(0, documents, BLOCK):
                count = min(BLOCK, documents - first)
                file.seek(HEADER.size + 12 * sequences + 8 * first)
                edges = np.frombuffer(file.read(8 * (count + 1)), "<i8")
                low, high = int(edges[0]), int(edges[-1])
                if low < 0 or high > sequences or (np.diff(edges) < 0).any():
                    raise wrong(f"document {first + 1} or one after it has sequences outside 0..{sequences}")
                file.seek(HEADER.size + 4 * low)
                lengths = np.frombuffer(file.read(4 * (high - low)), "<i4").astype(np.int64)
                file.seek(HEADER.size + 4 * sequences + 8 * low)
                starts = np.frombuffer(file.read(8 * (high - low)), "<i8")
                stops = starts + lengths * dtype.itemsize
                if (lengths < 0).any() or (starts < 0).any() or (stops > held).any() or (starts % dtype.itemsize).any():
                    raise wrong(
                        f"document {first + 1} or one after it lies outside {str(place.path)!r} of {held} bytes"
                    )
                for number, (a, b) in enumerate(zip(edges - low, edges[1:] - low, strict=False), first + 1):
                    spans = zip(starts[a:b] // dtype.itemsize, stops[a:b] // dtype.itemsize, strict=True)
                    pieces = [np.asarray(ids[int(start) : int(stop)]) for start, stop in spans]
                    found = np.concatenate([np.empty(0, dtype), *pieces])
                    yield Document(place.domain, f"{place.name}:{number}", ids=found)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"data.path={str(index)!r}: cannot be read ({reason}); make it readable") from None
