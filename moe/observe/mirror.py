"""Copies a run's records to its trackers, without ever delaying or ending the run."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..config import dotted
from .pictures import pictures_of
from .printable import printable
from .trackers import TRACKERS, Picture, Tracker

Record = dict[str, Any]

#: records that may wait for a tracker, and seconds that it gets to write the rest at the end of a run
WAITING, LAST_S = 1000, 30.0
_NOT_DRAWN = {"kind", "step", "tokens", "elapsed_s", "domain_loss", "layers", "nonfinite"}


class Mirror:
    """Copies records to the trackers ``names``, each in a thread of its own.

    A tracker that fails, or does not keep up, is said once and gets no more records.
    """

    def __init__(self, run_dir: Path, names: Sequence[str], resume_step: int | None) -> None:
        self._feeds: list[_Feed] = []
        for name in names:
            try:
                self._feeds.append(_Feed(name, TRACKERS[name](run_dir, resume_step)))
            except Exception as error:  # of somebody else's package: no list of its errors would be complete
                _warn(name, f"cannot start ({_reason(error)})")

    def write(self, record: Record) -> None:
        """Copy a record."""
        self._feeds = [feed for feed in self._feeds if feed.take(record)]

    def close(self) -> None:
        """Wait until the trackers have written everything, LAST_S seconds at most."""
        feeds, self._feeds = self._feeds, []
        for feed in feeds:
            feed.close()


class _Feed:
    """A tracker, its thread, and the records that wait for it."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self._tracker, self._problem = name, tracker, ""
        self._waiting: queue.Queue[Record | None] = queue.Queue(WAITING)
        #: of the last ``train`` record, drawn together with the next evaluation
        self._trained: Record | None = None
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def take(self, record: Record) -> bool:
        """Queue a record; return False, after a warning, if the tracker has failed."""
        if not self._problem:
            try:
                self._waiting.put_nowait(record)
                return True
            except queue.Full:
                self._problem = "does not keep up with the run"
        _warn(self.name, self._problem)
        return False

    def close(self) -> None:
        try:
            self._waiting.put(None, timeout=LAST_S)
            self._thread.join(LAST_S)
        except queue.Full:
            pass
        if self._problem or self._thread.is_alive():
            _warn(self.name, self._problem or f"has not written everything within {LAST_S:.0f} s")

    def _run(self) -> None:
        try:
            while (record := self._waiting.get()) is not None:
                self._copy(record)
            self._tracker.close()
        except Exception as error:
            self._problem = f"failed ({_reason(error)})"

    def _copy(self, record: Record) -> None:
        if record["kind"] == "run":
            config = record.get("config") or {}
            text = yaml.safe_dump(config, sort_keys=False)
            self._tracker.describe(dict(dotted(config)), text)
        elif record["kind"] in ("train", "eval"):
            pictures: dict[str, Picture] = {}
            if record["kind"] == "train":
                self._trained = record
            else:
                drawn = [record] if self._trained is None else [self._trained, record]
                pictures = {name: picture for each in drawn for name, picture in pictures_of(each)}
            values = {printable(name): float(value) for name, value in scalars_of(record) if value is not None}
            self._tracker.log(record["step"], values, pictures)


def scalars_of(record: Record) -> Iterator[tuple[str, float | None]]:
    """Yield the names and numbers of a ``train`` or ``eval`` record."""
    if record["kind"] == "train":
        values = {name: value for name, value in record.items() if name not in _NOT_DRAWN}
        yield from _flat("train", values)
        yield from ((f"train_domain/{name}", loss) for name, loss in (record.get("domain_loss") or {}).items())
        for index, layer in enumerate(record.get("layers") or []):
            yield from _flat(f"layer_{index}", {name: value for name, value in layer.items() if name != "counts"})
    if record["kind"] == "eval":
        yield "heldout/loss", record.get("loss")
        yield from ((f"heldout_domain/{name}", entry["loss"]) for name, entry in (record.get("domains") or {}).items())
        for index, bits in enumerate(record.get("divergence") or []):
            yield f"heldout_layer_{index}/divergence", bits
        for field in ("score_sum", "max_frequency"):
            for domain, layers in (record.get(field) or {}).items():
                yield from ((f"heldout_layer_{i}/{field}/{domain}", value) for i, value in enumerate(layers))


def _flat(tag: str, values: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{tag}/{name}", value)
        elif value is None or isinstance(value, (int, float)):
            yield f"{tag}/{name}", value


def _reason(error: Exception) -> str:
    return printable((getattr(error, "strerror", None) or str(error) or type(error).__name__).split("\n")[0][:200])


def _warn(name: str, problem: str) -> None:
    message = f"log.trackers={name}: {problem}; training continues without it"
    warnings.warn(message, RuntimeWarning, stacklevel=4)
