"""Keeps a command going, whatever its output is connected to."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Output:
    """A text stream that cannot fail, except that nobody reads it any more (BrokenPipeError).

    Characters that its encoding lacks are written as escapes. After an error, such as a full disk, output is discarded;
    with ``unread``, also if nobody reads it.
    """

    unread = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except (OSError, ValueError) as problem:  # ValueError: the stream is closed
            self._discard(problem)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as problem:
            self._discard(problem)

    def _discard(self, problem: OSError | ValueError) -> None:
        """Connect the stream to nothing, so that what it still holds does not fail when Python exits."""
        if isinstance(problem, BrokenPipeError) and not self.unread:
            raise problem
        if not self._stream.closed:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within the block, failing writes to stdout and stderr do not raise."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_lasting(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def outlast_readers() -> None:
    """Go on quietly if nobody reads stdout or stderr any more. Called within the block of :func:`lasting_output`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Output):
            stream.unread = True


def _lasting(stream: Any) -> Any:
    if stream is None:  # the shell has closed it; without a file in its place, the next one would get its number
        return open(os.devnull, "w")
    return stream if isinstance(stream, _Output) else _Output(stream)
