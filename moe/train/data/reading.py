"""The program of a process that reads sequences ahead of the training step: ``python .../reading.py``.

It reads what is asked for on its input and writes it to its output, and ends when its input does, which is when the
training process ends, however that happens. It imports neither torch nor the rest of the package, so it starts at once
and takes little memory.

The first line of the input describes the streams, as JSON. After it, a request has the number of sequences and their
length, then a domain and a start for each sequence, all as int64. An answer has its kind and its size, then the ids as
uint32 and the loss masks as uint8, or a message.
"""

from __future__ import annotations

import json
import signal
import struct
import sys
import types
from contextlib import suppress
from importlib import import_module
from typing import IO, Any

#: of requests and answers
HEADER = struct.Struct("<qq")
#: kinds of answers
IDS, IDS_AND_MASKS, ERROR = 0, 1, 2


def main(requests: IO[bytes], answers: IO[bytes], stream: Any) -> None:
    """Answer all requests. ``stream`` is the module of that name."""
    import numpy as np

    described = json.loads(requests.readline())
    ids, masks = ([stream.joined(pieces) for pieces in described[name]] for name in ("ids", "masks"))
    while header := requests.read(HEADER.size):
        count, size = HEADER.unpack(header)
        places = np.frombuffer(requests.read(16 * count), np.int64).reshape(count, 2).tolist()
        try:
            read = np.stack([np.asarray(ids[d][s : s + size]).astype(np.uint32) for d, s in places]).tobytes()
            kind = IDS
            if any(mask is not None for mask in masks):
                one = np.ones(size, np.uint8)
                rows = [one if masks[d] is None else np.asarray(masks[d][s : s + size]) for d, s in places]
                kind, read = IDS_AND_MASKS, read + np.stack(rows).tobytes()
        except (ValueError, OSError) as error:
            kind, read = ERROR, str(error).encode(errors="replace")
        answers.write(HEADER.pack(kind, len(read)) + read)
        answers.flush()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the training process decides when it ends
    here = sys.path.pop(0)  # the modules of this folder are not those of other packages with the same names
    package = types.ModuleType("reading")
    package.__path__ = [here]  # its modules, without what the package itself imports
    sys.modules["reading"] = package
    with suppress(BrokenPipeError):
        main(sys.stdin.buffer, sys.stdout.buffer, import_module("reading.stream"))
