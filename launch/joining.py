"""Brings the ranks of a run together, before they form a process group.

Every rank introduces itself in torch's store, with its options, its versions, and an error if it has one. Rank 0 waits
for all of them and answers each: with the name of this attempt, or with one line that says why the run cannot start.

A rank that torchrun has restarted introduces itself again, under a new token. So it does not matter what an earlier
attempt left in the store, how often each node's torchrun has restarted its ranks, or whether one was replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from .env import CONFIG, DISAGREEMENT, HANG, Process, recorded_exit, start_time, stop, too_many

T = TypeVar("T")

#: seconds between looks at the store
POLL_S = 0.02
#: seconds in which ranks may still join after one has reported an error
ERROR_GRACE_S = 20.0
#: seconds for which ranks wait until one of them has printed why all end
PRINT_S = 10.0


@dataclass(frozen=True)
class Refusal:
    """Why a run cannot start: an exit code, a line, and the rank that prints it."""

    code: int
    message: str
    printer: int = 0
    #: the name under which all ranks have got it from rank 0; empty if they have not
    name: str = ""


@dataclass(frozen=True)
class Introduction:
    """What a rank tells rank 0 when it joins."""

    #: name -> value; these must be the same on all ranks
    facts: dict[str, str]
    host: str = ""
    pid: int = 0
    #: the torchrun that started this rank
    agent: str = ""
    restarts: int = 0
    gpu: str | None = None
    code: int = 0
    error: str = ""


@dataclass(frozen=True)
class Meeting:
    """What all ranks know about each other once they have joined."""

    #: for each rank, (host, process id)
    places: tuple[tuple[str, int], ...]
    #: the torchruns of all nodes
    agents: tuple[str, ...]
    #: whether a torchrun has restarted its ranks
    restarted: bool
    #: the store that all ranks share, and a second connection to it for threads; None for a single process
    store: dist.Store | None = None
    second: dist.Store | None = None
    #: the rank whose process holds the store; None if that is a torchrun
    holder: int | None = None


def introduce(process: Process, facts: dict[str, str], refused: tuple[int, str] | None = None) -> Introduction:
    """Describe this rank; ``refused`` is the exit code and the message of an error that it has found."""
    code, error = (0, "") if refused is None else refused
    gpu = None
    try:
        device = process.device
        facts = facts | {"device": device.type, "processes per node": str(process.local_world)}
        if device.type == "cuda":
            torch.cuda.set_device(device)
            gpu = f"{socket.gethostname()}/{getattr(torch.cuda.get_device_properties(device), 'uuid', process.rank)}"
    except ValueError as problem:
        code, error = code or CONFIG, error or str(problem)
    agent = f"{socket.gethostname()}/{os.getppid()}/{start_time(os.getppid())}"
    return Introduction(facts, socket.gethostname(), os.getpid(), agent, process.restarts, gpu, code, error)


def alone(own: Introduction) -> Meeting:
    """Return the meeting of a process without others."""
    return Meeting(((own.host, own.pid),), (own.agent,), own.restarts > 0)


@contextmanager
def joined(process: Process, own: Introduction, limit_s: float, timeout_s: float) -> Iterator[Meeting]:
    """Meet all other ranks within ``limit_s``; within the block, the default process group exists.

    ``timeout_s`` is the limit of its collectives. If a rank is missing, has an error or disagrees, all ranks exit.
    """
    store = _open_store(process, limit_s, opens=process.rank == 0 and not _torchrun_holds())
    try:
        found = (_attend if process.rank else _chair)(store, process, own, limit_s)
    except dist.DistError as problem:  # rank 0 has gone, or its machine
        found = Refusal(HANG, f"rank 0 cannot be reached any more: {_first_line(problem)}", process.rank)
    if isinstance(found, Refusal):
        meet = partial(_meet, store, process, found) if found.name else None
        stop(process, found.code, found.message, found.printer, meet)
    own_store = dist.PrefixStore(found["name"], store)
    backend = "gloo" if own.gpu is None else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=own_store, rank=process.rank, world_size=process.world, timeout=timeout)
    try:
        places = tuple((host, pid) for host, pid in found["places"])
        second = dist.PrefixStore(found["name"], _open_store(process, limit_s, opens=False))
        holder = None if _torchrun_holds() else 0
        yield Meeting(places, tuple(found["agents"]), found["restarted"], own_store, second, holder)
    finally:
        dist.destroy_process_group()


def _meet(store: dist.Store, process: Process, refusal: Refusal) -> bool:
    """Wait until the rank that prints this refusal has done so, which it tells the others by calling this.

    Return False if it has gone without having done so, as far as this rank can tell.
    """
    key = f"{refusal.name}/printed"
    try:
        if process.rank == refusal.printer:
            store.set(key, "")
        else:
            store.wait([key], timedelta(seconds=PRINT_S))
        return True
    except RuntimeError:  # a time limit, or rank 0 has gone: it may have left already
        return recorded_exit(process) is not None


def _torchrun_holds() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _open_store(process: Process, limit_s: float, opens: bool) -> dist.TCPStore:
    """Connect to torch's store, or open it. The rank exits if that fails."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=limit_s)
    try:
        if not opens:
            _reach(address, port, limit_s)
        return dist.TCPStore(address, port, is_master=opens, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    except (OSError, RuntimeError, ValueError) as problem:
        if opens:
            busy = "EADDRINUSE" in str(problem) or "in use" in str(problem)
            why = "is used by another process" if busy else f"cannot be opened ({_first_line(problem)})"
            message = f"MASTER_PORT={port}: {why} on {socket.gethostname()}; choose another port (--master-port)"
        else:
            message = (
                f"MASTER_ADDR={address}: rank {process.rank} on {socket.gethostname()} cannot reach port {port} there "
                f"within {limit_s:.0f} s; check the address, and whether rank 0 has started"
            )
        stop(process, HANG, message, printer=process.rank if process.local_rank == 0 else -1)  # once for each node


def _reach(address: str, port: int, limit_s: float) -> None:
    """Wait until the store can be reached; torch would fill the terminal with its attempts."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            socket.create_connection((address, port), timeout=max(deadline - time.monotonic(), 0.1)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _first_line(problem: BaseException) -> str:
    return str(problem).strip().split("\n")[0]


# ---- rank 0


def _chair(store: dist.Store, process: Process, own: Introduction, limit_s: float) -> dict[str, Any] | Refusal:
    """Wait for all ranks, and answer each of them; return the answer."""
    world, name, begun = process.world, f"attempt-{uuid.uuid4().hex}", time.monotonic()
    tokens, ranks = {0: ""}, {0: own}
    answered: dict[int, str] = {}
    refusal: Refusal | None = None
    while True:
        for rank in range(1, world):
            token, seen = _read(store, f"joining/{rank}")
            if seen is not None and token != tokens.get(rank):
                tokens[rank], ranks[rank] = token, seen
        waited = time.monotonic() - begun
        heard = [rank for rank, token in tokens.items() if not rank or store.check([f"{name}/heard/{token}"])]
        if refusal is None:
            refusal = _refusal(ranks, world, waited)
            if refusal is None and waited > limit_s:
                # if all seemed to be there, some introductions are from an earlier attempt
                here = heard if len(ranks) == world else list(ranks)
                refusal = Refusal(HANG, _missing({rank: ranks[rank] for rank in here}, world, limit_s))
            if refusal is not None:  # tell this also those that were welcome before
                name, answered, limit_s = f"{name}/refused", {}, waited + 5.0
                continue
        if refusal is not None or len(ranks) == world:
            answer = json.dumps(_answer(name, ranks, refusal))
            for rank, token in tokens.items():
                if rank and answered.get(rank) != token:
                    store.set(f"answer/{token}", answer)
                    answered[rank] = token
            if len(heard) == len(tokens) or (refusal is not None and waited > limit_s):
                store.set(f"{name}/complete", "")
                return json.loads(answer) if refusal is None else replace(refusal, name=name)
        time.sleep(POLL_S)


def _read(store: dist.Store, key: str) -> tuple[str, Introduction | None]:
    if not store.check([key]):
        return "", None
    token, fields = json.loads(store.get(key))
    return token, Introduction(**fields)


def _answer(name: str, ranks: dict[int, Introduction], refusal: Refusal | None) -> dict[str, Any]:
    if refusal is not None:
        return {"name": name, "refusal": [refusal.code, refusal.message, refusal.printer]}
    seen = [ranks[rank] for rank in sorted(ranks)]
    return {
        "name": name,
        "places": [(rank.host, rank.pid) for rank in seen],
        "agents": sorted({rank.agent for rank in seen}),
        "restarted": any(rank.restarts for rank in seen),
    }


def _refusal(ranks: dict[int, Introduction], world: int, waited: float) -> Refusal | None:
    """Return why the ranks cannot work together, if so: once all have joined, or some time after an error."""
    if len(ranks) < world and waited < ERROR_GRACE_S:
        return None
    failed = [rank for rank, seen in sorted(ranks.items()) if seen.error]
    if failed:
        first = ranks[failed[0]]
        everywhere = len(failed) == len(ranks) and len({seen.error for seen in ranks.values()}) == 1
        return Refusal(first.code, first.error if everywhere else f"rank {failed[0]}: {first.error}", failed[0])
    if len(ranks) < world:
        return None
    gpus: dict[str, int] = {}
    for rank, seen in sorted(ranks.items()):
        if seen.gpu is not None and gpus.setdefault(seen.gpu, rank) != rank:
            processes = sum(other.host == seen.host for other in ranks.values())
            return Refusal(CONFIG, too_many(processes, "has one GPU for several of them"))
    return disagreement({rank: seen.facts for rank, seen in ranks.items()})


def disagreement(facts: dict[int, dict[str, str]]) -> Refusal | None:
    """Name the first fact that differs from rank 0's, with both values and the ranks that have them."""
    names = dict.fromkeys(name for of_rank in facts.values() for name in of_rank)
    found = []
    for name in names:
        by_value: dict[str, list[int]] = {}
        for rank in sorted(facts):
            by_value.setdefault(facts[rank].get(name, "nothing"), []).append(rank)
        if len(by_value) > 1:
            ordered = sorted(by_value.items(), key=lambda entry: -len(entry[1]))[:3]
            found.append(f"{name}: " + ", ".join(f"{_ranks(ranks)} {_verb(ranks)} {value}" for value, ranks in ordered))
    if not found:
        return None
    more = f" (and {len(found) - 3} more differences)" if len(found) > 3 else ""
    return Refusal(DISAGREEMENT, "; ".join(found[:3]) + more + "; give all ranks the same options, code and data")


def _missing(ranks: dict[int, Introduction], world: int, limit_s: float) -> str:
    hosts: dict[str, list[int]] = {}
    for rank, seen in ranks.items():
        hosts.setdefault(seen.host, []).append(rank)
    there = ", ".join(f"{_ranks(joined)} on {host}" for host, joined in sorted(hosts.items()))
    absent = _ranks([rank for rank in range(world) if rank not in ranks])
    return (
        f"{len(ranks)} of {world} ranks joined within {limit_s:.0f} s: {there}; missing: {absent}. Check whether their "
        "torchrun runs, with another --node-rank on every node"
    )


def _ranks(ranks: list[int]) -> str:
    """Format ranks as in "rank 3" and "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"rank{'s' if len(ranks) != 1 else ''} {text}"


def _verb(ranks: list[int]) -> str:
    return "has" if len(ranks) == 1 else "have"


# ---- the other ranks


def _attend(store: dist.Store, process: Process, own: Introduction, limit_s: float) -> dict[str, Any] | Refusal:
    """Introduce this rank, and wait for rank 0's answer."""
    token, begun = uuid.uuid4().hex, time.monotonic()
    store.set(f"joining/{process.rank}", json.dumps([token, vars(own)]))
    while time.monotonic() - begun < limit_s + 5.0:  # rank 0's answer says more than this rank knows
        if store.check([f"answer/{token}"]):
            answer = json.loads(store.get(f"answer/{token}"))
            store.set(f"{answer['name']}/heard/{token}", "")
            if "refusal" in answer:
                return replace(Refusal(*answer["refusal"]), name=answer["name"])
            if store.check([f"{answer['name']}/complete"]):
                return answer
        time.sleep(POLL_S)
    here = [rank for rank in range(1, process.world) if store.check([f"joining/{rank}"])]
    line = f"rank 0 has not joined within {limit_s:.0f} s; {_ranks(here)} {_verb(here)}"
    if own.restarts and _torchrun_holds():  # torchrun then uses the store of the first attempt, wherever rank 0 is now
        line += "; if a node was replaced, start torchrun everywhere with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    return Refusal(HANG, line, min(here))


# ---- facts


def code_version() -> str:
    """Return a hash of this package's source files."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for folder in ("kernels", "launch", "moe"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all ranks."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"code version": code_version(), "torch version": torch.__version__, "Python version": python}


# ---- agreement after the process group exists


def together(
    process: Process,
    code: int,
    work: Callable[[], T],
    what: str = "result",
    fingerprint: Callable[[T], str] = lambda _: "",
    failed_alone: Callable[[int, str], None] = lambda *_: None,
) -> T:
    """Run ``work`` on every rank; return its result if it succeeded everywhere with the same fingerprint.

    A ValueError or OSError on any rank makes all ranks exit with ``code``; the first rank that has one prints it.
    Different fingerprints make them exit with ``DISAGREEMENT``, and a line that begins with ``what``.

    If ``work`` has collectives, a rank in which it fails must not meet the others in another one: it calls
    ``failed_alone`` with the code and the error, which returns if it has failed on all ranks.
    """
    error, result = "", None
    try:
        result = work()
    except (ValueError, OSError) as problem:
        error = " ".join(str(problem).split()) or type(problem).__name__
        failed_alone(code, error)
    mine = (error, "" if error else fingerprint(result))  # type: ignore[arg-type]
    reports = gathered(process, mine)
    failed = [(rank, text) for rank, (text, _) in enumerate(reports) if text]
    if failed:
        rank, text = failed[0]
        everywhere = len(failed) == process.world and len({text for _, text in failed}) == 1
        stop_all(process, code, text if everywhere else f"rank {rank}: {text}", printer=rank)
    refusal = disagreement({rank: {what: seen} for rank, (_, seen) in enumerate(reports)})
    if refusal is not None:
        stop_all(process, refusal.code, refusal.message)
    return result  # type: ignore[return-value]


def stop_all(process: Process, code: int, message: str, printer: int = 0) -> NoReturn:
    """Print one line on rank ``printer`` and exit with ``code``, on every rank at the same point of the program."""
    stop(process, code, message, printer, meet=lambda: all(gathered(process, True)))


def gathered(process: Process, value: T) -> list[T]:
    """Return the values of all ranks, in rank order. Every rank must call this."""
    values: list[T] = [value] * process.world
    if process.world > 1:
        dist.all_gather_object(values, value)
    return values
