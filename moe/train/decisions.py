"""Routing replay: record which experts every token was sent to, then train or score again with the same decisions.

T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..collectives import Axis
from ..layer import MoE
from ..types import Decision, Routing
from .data import DataError

#: the decisions of each layer, by its name or number, for all tokens of a rank, in the order of its forwards
Decisions = dict[Any, Decision]


@contextmanager
def recorded_routing(layers: Mapping[Any, MoE]) -> Iterator[Decisions]:
    """Context that records the routing decisions of ``layers``; what it yields is filled at the end.

    It records training and evaluation, but neither recomputation nor counting passes. Choices that a capacity drops are
    recorded as dropped.
    """
    _check(layers)
    found: Decisions = {}
    parts: dict[Any, list[Decision]] = {name: [] for name in layers}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(_decided(layer, parts[name].append))
        yield found
    for name, decisions in parts.items():
        if decisions:
            found[name] = Decision(*(torch.cat(ids) for ids in zip(*decisions, strict=True)))


@contextmanager
def replayed_routing(layers: Mapping[Any, MoE], decisions: Mapping[Any, Decision]) -> Iterator[None]:
    """Context in which ``layers`` send tokens to the experts of recorded ``decisions``, in the order of their forwards.

    Gate weights, balance losses and all gradients are those of the present weights. Batches may be cut into other
    micro-batches. Raises ValueError if a forward has more tokens than are left, or if some are left at the end.
    """
    _check(layers)
    queues = {name: _Queue(name, decisions.get(name)) for name in layers}
    handles = [
        layer.router.register_forward_pre_hook(queues[name].give, with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for queue in queues.values():
        queue.check_empty()


def _check(layers: Mapping[Any, MoE]) -> None:
    for name, layer in layers.items():
        if layer.config.router.gate == "slots":
            raise ValueError(f"MoE layer {name}: router.gate='slots' mixes all tokens, and has no decisions to replay")


class _Queue:
    """Hands out a layer's decisions. Training, counting passes and evaluation each get all of them."""

    def __init__(self, name: Any, decisions: Decision | None) -> None:
        if decisions is None:
            raise ValueError(f"decisions: none were recorded for MoE layer {name}; record and replay the same layers")
        self.name, self.decisions = name, decisions
        self.taken: dict[tuple[bool, bool], int] = {}

    def give(
        self, router: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of a router: add the decision to its arguments, unless it recomputes another forward."""
        defaults: list[Any] = [None, None, 1, None]  # hidden states, mask, sequences, decision
        given = [*args, *defaults[len(args) :]]
        if given[3] is None:
            given[3] = self._next(router.training, len(args[0]), args[0].device)
        return tuple(given), kwargs

    def _next(self, training: bool, tokens: int, device: torch.device) -> Decision:
        if torch._C._current_graph_task_id() != -1:
            raise ValueError(
                f"MoE layer {self.name}: recomputed without its decision, as by torch.utils.checkpoint with several "
                "micro-batches; use equimoe.moe.recompute to replay routing"
            )
        kind = training, torch.is_grad_enabled()
        first, whole = self.taken.get(kind, 0), len(self.decisions.chosen_TK)
        if first + tokens > whole:
            raise ValueError(
                f"MoE layer {self.name}: decisions for {whole} tokens were recorded, and {first + tokens} are routed; "
                "replay the batches that were recorded, on as many ranks"
            )
        self.taken[kind] = first + tokens
        return Decision(*(ids_TK[first : first + tokens].to(device, torch.int64) for ids_TK in self.decisions))

    def check_empty(self) -> None:
        whole = len(self.decisions.chosen_TK)
        for taken in self.taken.values():
            if taken != whole:
                raise ValueError(
                    f"MoE layer {self.name}: decisions for {whole} tokens were recorded, and only {taken} were routed; "
                    "replay the batches that were recorded, on as many ranks"
                )


@contextmanager
def _decided(layer: MoE, see: Callable[[Decision], None]) -> Iterator[None]:
    """Context that calls ``see`` with the final decision of each forward that makes one."""
    decides = False

    def before(router: Any, args: tuple[Any, ...]) -> None:
        nonlocal decides
        counts_ahead = router.training and not torch.is_grad_enabled()
        decides = not counts_ahead and (len(args) < 4 or args[3] is None) and torch._C._current_graph_task_id() == -1

    local, sent = layer.local, layer.local.sent

    def seen(routing: Routing) -> Routing:
        if decides:
            see(Decision(*(ids_TK.detach().to(torch.int32) for ids_TK in routing.decision)))
        return sent(routing)

    handle = layer.router.register_forward_pre_hook(before, prepend=True)  # before a replay gives a decision
    local.sent = seen
    try:
        yield
    finally:
        handle.remove()
        del local.sent  # the class's own again


class RecordError(OSError):
    """Decisions cannot be stored. Raised on the rank that has them."""


class RoutingFiles:
    """Stores a rank's decisions of every step in a folder, without pickle.

    ``tokens`` has the ranks that hold different tokens of the same layers, ``stage`` the number of this rank's pipeline
    stage. A replay needs as many of both; how experts are split does not matter.
    """

    def __init__(self, folder: str, option: str, tokens: Axis, stage: int) -> None:
        self.folder, self.option = Path(folder).expanduser(), option
        self.name = f"tokens-{tokens.rank}-of-{tokens.size}.stage-{stage}.npz"

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}" / self.name

    def check(self) -> None:
        """Raise ValueError if the folder has no decisions for this rank."""
        if not any(self.folder.glob(f"step-*/{self.name}")):
            raise ValueError(
                f"{self.option}={self.folder}: has no {self.name} for any step; give the folder of recorded decisions, "
                "and replay with the sizes of parallel.* that recorded them"
            )

    def write(self, step: int, sequences: list[int], decisions: Decisions) -> None:
        """Store the decisions of a step on these sequences of the training data. Raises RecordError if it cannot."""
        path = self.path(step)
        parts = {
            f"{number}.{field}": ids_TK.cpu().numpy()
            for number, decision in decisions.items()
            for field, ids_TK in decision._asdict().items()
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(".partial").open("wb") as file:
                np.savez_compressed(file, sequences=np.array(sequences), **parts)
            path.with_suffix(".partial").replace(path)
        except OSError as error:
            why = f"cannot be written ({error.strerror or error})"
            remedy = "make room there or choose another folder, and resume"
            raise RecordError(f"{self.option}={self.folder}: {why}; {remedy}") from None

    def read(self, step: int, sequences: list[int]) -> Decisions:
        """Return what :meth:`write` has stored. Raises DataError if it was of other sequences, or cannot be read."""
        path = self.path(step)
        try:
            if not path.is_file():  # opening a pipe may never end
                raise ValueError("is not a file" if path.exists() else "does not exist")
            with np.load(path, allow_pickle=False) as file:
                found = {name: torch.from_numpy(file[name]) for name in file.files}
            stored = found.pop("sequences").tolist()
            numbers = sorted({int(name.partition(".")[0]) for name in found})
            fields = Decision._fields
            decisions = {n: Decision(*(found[f"{n}.{field}"] for field in fields)) for n in numbers}
        except Exception as error:  # numpy, zipfile and zlib raise errors of many kinds for a damaged file
            raise DataError(
                f"{self.option}={self.folder}: the decisions of step {step + 1} cannot be read from {path} ({error}); "
                "replay with the sizes of parallel.* that recorded them"
            ) from None
        if stored != sequences:
            raise DataError(
                f"{self.option}={self.folder}: step {step + 1} was recorded on other sequences; use the same data.*, "
                "seed and steps"
            )
        return decisions

    @contextmanager
    def replayed(self, layers: Mapping[Any, MoE], step: int, sequences: list[int]) -> Iterator[None]:
        """Context of a step in which ``layers`` replay what is stored. Raises DataError if that does not fit them."""
        decisions = self.read(step, sequences)
        try:
            with replayed_routing(layers, decisions):
                yield
        except ValueError as error:
            raise DataError(f"{self.option}={self.folder}: does not fit this run: {error}") from error
