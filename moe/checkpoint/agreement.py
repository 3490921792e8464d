"""Lets all ranks agree on the folder of the checkpoints, and on the one to resume from."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .manifest import REMEDY, CheckpointError, damage, parse_manifest, printable
from .ranks import gather, rank
from .store import candidates

#: how long a rank waits until it sees what another one has written; network file systems may take seconds
_VISIBLE_S = 10.0
_SHARE = "put the run's folder (--run-dir) on storage that all machines share"


class ViewError(ValueError):
    """Raised if ranks see different contents of the same folder."""


@dataclass(frozen=True)
class Choice:
    """A checkpoint to resume from: its folder and manifest, and why newer ones were passed over."""

    path: Path
    manifest: dict[str, Any]
    passed_over: list[str]


def choose(root: Path) -> Choice | None:
    """Return the newest valid checkpoint in the folder ``root``, the same on all ranks; None if there is none at all.

    Every rank must call this. Every file is verified once on every machine. Raises CheckpointError if no checkpoint is
    valid, and ViewError if the ranks see different ones.
    """
    here = _place(root)
    own, why = [], ""
    try:
        own = [path.name for path in candidates(root)]
    except CheckpointError as error:
        why = str(error)
    if reasons := [reason for reason in gather(why) if reason]:
        raise CheckpointError(reasons[0])
    places = gather((*here, own))
    for other, (*place, names) in enumerate(places):
        if names != places[0][-1]:
            odd = max(set(names) ^ set(places[0][-1]))
            sees = f"rank {other} on {place[0]} {'sees' if odd in names else 'does not see'} {odd}, unlike rank 0"
            raise ViewError(f"{root}: {sees}; {_SHARE}")
    peers = [other for other, (*place, _) in enumerate(places) if tuple(place) == here]
    passed_over: list[str] = []
    for name in reversed(places[0][-1]):
        manifest, why = _parsed(root / name)
        views = gather((manifest.get("digest"), why))
        for other, view in enumerate(views):
            if view[0] != views[0][0]:
                raise ViewError(f"{root / name}: rank {other} sees another manifest than rank 0 ({view[1]}); {_SHARE}")
        if not why:
            why = _damaged(root / name, manifest, places, peers)
        if not why:
            return Choice(root / name, manifest, passed_over)
        passed_over.append(why.removesuffix(f"; {REMEDY}"))
    if passed_over:
        raise CheckpointError(f"no checkpoint in {root} is valid: {_listed(passed_over)}; {REMEDY}")
    return None


def describe(choice: Choice) -> str:
    """Say in one line what was passed over, and why; empty if the newest one is valid."""
    if not choice.passed_over:
        return ""
    return f"resuming from {choice.path.name}, because newer ones are not valid: {_listed(choice.passed_over)}"


def probe(root: Path) -> None:
    """Check that all ranks can write in the folder ``root``, and that it is the same folder. Creates it if missing.

    Every rank must call this. Raises OSError on every rank.
    """
    names = [f"probe-{token}" for token in gather(secrets.token_hex(8))]
    mine, first, why = root / names[rank()], root / names[0], ""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(mine, "xb", buffering=0) as stream:
            stream.write(names[rank()].encode())
            os.fsync(stream.fileno())
    except OSError as error:
        why = f"cannot be written: {error.strerror}"
    reports = gather((why, socket.gethostname()))
    if not any(why for why, _ in reports):
        seen = _appears(first, names[0].encode())
        text = "" if seen else f"is another folder than rank 0 on {reports[0][1]} sees"
        reports = gather((text, socket.gethostname()))
    with contextlib.suppress(OSError):
        mine.unlink(missing_ok=True)
    for other, (why, host) in enumerate(reports):
        if why:
            who = f" for rank {other} on {host}" if len(reports) > 1 else ""
            remedy = "choose another --run-dir" if "cannot" in why else _SHARE
            raise OSError(f"run_dir={str(root.parent)!r}: {why}{who}; {remedy}")


def _place(root: Path) -> tuple[str, int, int]:
    """Identify a folder and the machine that sees it: ranks with equal places share the work of verifying."""
    try:
        found = root.stat()
    except OSError:
        return socket.gethostname(), 0, 0
    return socket.gethostname(), found.st_dev, found.st_ino


def _parsed(path: Path) -> tuple[dict[str, Any], str]:
    try:
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a link, and not a folder of this run; {REMEDY}")
        return parse_manifest(path), ""
    except CheckpointError as error:
        return {}, str(error)


def _damaged(path: Path, manifest: dict[str, Any], places: list[Any], peers: list[int]) -> str:
    """Return what is wrong with a checkpoint's files, if anything. The ranks of a machine share the work."""
    names = sorted(manifest["files"])
    own = damage(path, manifest, names[peers.index(rank()) :: len(peers)])
    seen: dict[Any, dict[str, str]] = {}
    for (*place, _), found in zip(places, gather(own), strict=True):
        seen.setdefault(tuple(place), {}).update(found)
    views = list(seen.values())
    for view in views:
        if odd := sorted(view.keys() ^ views[0].keys()):
            raise ViewError(f"{path}: {odd[0]} is damaged for some machines only; {_SHARE}")
    return views[0][min(views[0])] if views[0] else ""


def _listed(reasons: list[str]) -> str:
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return "; ".join(map(printable, reasons[:3])) + more


def _appears(file: Path, content: bytes) -> bool:
    until = time.monotonic() + _VISIBLE_S
    while True:
        with contextlib.suppress(OSError):
            os.listdir(file.parent)  # lets a network file system look again
            if file.read_bytes() == content:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
