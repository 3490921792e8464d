"""Readers of data files: one function for each format, chosen by the end of the file's name."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...config import require
from .document import Document
from .megatron_files import megatron
from .records import Place, Reader, columns, document_of, kind_of
from .token_file import TokenFile

#: suffixes of compressed files; the one before says what is in them
COMPRESSED = (".gz", ".zst")
#: rows of a table that are decoded at a time
ROWS = 256
#: ids that are looked at to tell 16-bit ids from wider ones
LOOKED_AT = 1 << 16


class NotTextError(ValueError):
    """The file is not UTF-8 text."""


def unreadable(path: Path | str, error: OSError) -> ValueError:
    """Return the error of a file or folder that cannot be read."""
    reason = error.strerror or str(error)
    return ValueError(f"data.path={str(path)!r}: cannot be read ({reason}); make it readable or move it away")


def needs(path: Path, package: str) -> ValueError:
    """Return the error of a file whose format needs a package that is not installed."""
    return ValueError(f"data.path={str(path)!r}: needs the package {package}; run 'pip install equimoe[data]'")


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, which may be compressed, for reading; errors name it."""
    suffix = path.suffix.lower()
    damaged: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error)
    try:
        if suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield file  # type: ignore[misc]
        elif suffix == ".zst":
            try:
                import zstandard
            except ImportError:
                raise needs(path, "zstandard") from None
            damaged += (zstandard.ZstdError,)
            with path.open("rb") as raw:
                yield _Frames(raw, zstandard.ZstdDecompressor())  # type: ignore[misc]
        else:
            with path.open("rb") as file:
                yield file
    except damaged as error:
        message = f"cannot be decompressed ({' '.join(str(error).split())}); it is damaged or incomplete: copy it again"
        raise ValueError(f"data.path={str(path)!r}: {message}") from None
    except OSError as error:
        raise unreadable(path, error) from None


class _Frames:
    """The bytes and the lines of a file of one or several Zstandard frames."""

    def __init__(self, raw: IO[bytes], decompressor: Any) -> None:
        self._raw, self._decompressor = raw, decompressor

    def read(self) -> bytes:
        return b"".join(self._blocks())

    def _blocks(self) -> Iterator[bytes]:
        frame = None
        while block := self._raw.read(1 << 16):
            while block:
                frame = frame or self._decompressor.decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("it ends within a frame")

    def __iter__(self) -> Iterator[bytes]:
        rest = b""
        for block in self._blocks():
            *lines, last = (rest + block).split(b"\n") if b"\n" in block else [rest + block]
            yield from (line + b"\n" for line in lines)
            rest = last
        if rest:
            yield rest


def text(place: Place) -> Iterator[Document]:
    """Yield the text of a file. Raises NotTextError if it is not UTF-8."""
    with opened(place.path) as file:
        raw = file.read()
    if (at := raw.find(b"\0")) >= 0:
        raise NotTextError(f"NUL byte at {at}")
    try:
        yield Document(place.domain, place.name, raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise NotTextError(f"byte 0x{raw[error.start]:02x} at {error.start} is not UTF-8") from None


def lines(place: Place) -> Iterator[Document]:
    """Yield one document for each line with a JSON object."""
    with opened(place.path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                record = _json(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, place, number)
                yield document_of(record, place, number, record)


def _json(line: bytes, place: Place, number: int) -> dict[str, Any]:
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        message = f"byte 0x{line[error.start]:02x} at {error.start} of the line is not UTF-8; convert the file to UTF-8"
        raise ValueError(f"data.path={place.at(number)}: {message}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        message = f"is not JSON ({reason}); write one JSON object per line"
        raise ValueError(f"data.path={place.at(number)}: {message}") from None
    if not isinstance(record, dict):
        message = f"is {kind_of(record)}; write one JSON object per line"
        raise ValueError(f"data.path={place.at(number)}: {message}")
    return record


def json_file(place: Place) -> Iterator[Document]:
    """Yield the documents of a JSON list of objects, or of lines with one object each."""
    with opened(place.path) as file:
        raw = file.read().removeprefix(b"\xef\xbb\xbf")
    if not raw.lstrip().startswith(b"["):
        yield from lines(place)
        return
    try:
        records = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        message = f"is not a JSON list of objects ({reason}); write one JSON object per line"
        raise ValueError(f"data.path={str(place.path)!r}: {message}") from None
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"data.path={place.at(number)}: is {kind_of(record)}; write objects")
        yield document_of(record, place, number, record)


def parquet(place: Place) -> Iterator[Document]:
    """Yield one document for each row."""
    try:
        import pyarrow
        from pyarrow import parquet as files
    except ImportError:
        raise needs(place.path, "pyarrow") from None
    number = 0
    try:
        with files.ParquetFile(place.path, memory_map=False, pre_buffer=False) as file:
            names = file.schema_arrow.names
            for batch in file.iter_batches(ROWS, columns=columns(place, names), use_threads=False):
                for record in _rows(batch, place):
                    number += 1
                    yield document_of(record, place, number, names)
    except (pyarrow.ArrowException, OSError) as error:
        raise _not_a_table(place, "Parquet", number, error) from None


def arrow(place: Place) -> Iterator[Document]:
    """Yield one document for each row of an Arrow file or stream."""
    try:
        import pyarrow
    except ImportError:
        raise needs(place.path, "pyarrow") from None
    number = 0
    try:
        with pyarrow.OSFile(str(place.path), "rb") as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
            names = reader.schema.names
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                wanted = batch.select(columns(place, names))
                for start in range(0, len(wanted), ROWS):
                    for record in _rows(wanted.slice(start, ROWS), place):
                        number += 1
                        yield document_of(record, place, number, names)
    except (pyarrow.ArrowException, OSError) as error:
        raise _not_a_table(place, "Arrow", number, error) from None


def _rows(batch: Any, place: Place) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"data.path={str(place.path)!r}: holds text that is not UTF-8 ({error.reason})") from None


def _not_a_table(place: Place, kind: str, number: int, error: Exception) -> ValueError:
    where = f" after row {number}" if number else ""
    reason = " ".join(str(error).split())[:200]
    message = f"cannot be read as {kind}{where} ({reason}); it is damaged, or has another format than its name says"
    return ValueError(f"data.path={str(place.path)!r}: {message}")


def saved_dataset(place: Place) -> Iterator[Document]:
    """Yield one document for each row of a folder that ``Dataset.save_to_disk`` has written."""
    try:
        import datasets
    except ImportError:
        raise needs(place.path, "datasets") from None
    try:
        found = datasets.load_from_disk(str(place.path), keep_in_memory=False)
        names = list(found.column_names)
        found = found.select_columns(columns(place, names))
    except Exception as error:  # it raises almost anything for a damaged folder
        reason = " ".join(str(error).split())[:200]
        message = f"cannot be read as a dataset ({type(error).__name__}: {reason}); save it again with save_to_disk"
        raise ValueError(f"data.path={str(place.path)!r}: {message}") from None
    for number, record in enumerate(found, 1):
        yield document_of(record, place, number, names)


def flat(place: Place) -> Iterator[Document]:
    """Yield a flat token file, little-endian ids without a header, as it is; or the documents of Megatron's."""
    if place.path.with_suffix(".idx").exists() and place.path.suffix.lower() == ".bin":
        yield from megatron(place)
        return
    dtype = np.dtype(place.config.token_dtype).newbyteorder("<")
    try:
        size = place.path.stat().st_size
        remedy = f"its size, {size}, is not a multiple of that of {dtype}; set data.token_dtype to the file's"
        require(size % dtype.itemsize == 0, "data.path", str(place.path), remedy)
        ids = TokenFile(str(place.path), dtype, 0, size // dtype.itemsize)
    except OSError as error:
        raise unreadable(place.path, error) from None
    _check_width(np.asarray(ids[:LOOKED_AT]), place)
    yield Document(place.domain, place.name, tokens=ids)


def _check_width(ids: np.ndarray, place: Place) -> None:
    """Refuse ids of which every second one is 0: they are halves of wider ones."""
    if len(ids) < 16 or ids[1::2].any() or not ids[::2].any() or ids.dtype.itemsize == 8:
        return
    wider = "int64" if ids.dtype.itemsize == 4 or not ids[2::4].any() else "uint32"
    raise ValueError(
        f"data.path={str(place.path)!r}: every second id is 0 as {ids.dtype}, so its ids are wider; "
        f"set data.token_dtype={wider}"
    )


def npy(place: Place) -> Iterator[Document]:
    """Yield a one-dimensional integer ``.npy`` file, whose header says its type."""
    path = place.path
    try:
        ids: Any = np.load(path, mmap_mode="r", allow_pickle=False)  # only for the header
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, EOFError, OverflowError, MemoryError, SyntaxError, RecursionError) as error:
        message = f"is not a plain .npy array ({' '.join(str(error).split())}); save it with np.save"
        raise ValueError(f"data.path={str(path)!r}: {message}") from None
    ok = ids.ndim == 1 and ids.dtype.kind in "iu"
    remedy = f"holds {ids.dtype} of shape {ids.shape}; save a one-dimensional integer array"
    require(ok, "data.path", str(path), remedy)
    yield Document(place.domain, place.name, tokens=TokenFile(str(path), ids.dtype, ids.offset, len(ids)))


#: end of a file's name -> its reader; all other files are text
READERS: dict[str, Reader] = {
    ".jsonl": lines,
    ".ndjson": lines,
    ".json": json_file,
    ".parquet": parquet,
    ".arrow": arrow,
    ".feather": arrow,
    ".bin": flat,
    ".tokens": flat,
    ".npy": npy,
}
#: files with ids
TOKENS = (".bin", ".tokens", ".npy")
#: what a row or an entry of a format is called
UNITS = {".json": "entry", ".parquet": "row", ".arrow": "row", ".feather": "row", ".bin": "document"}


def suffix_of(path: Path) -> str:
    """Return the end of a file's name that says what it holds, in lower case: ".jsonl" for "a.jsonl.gz"."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix
