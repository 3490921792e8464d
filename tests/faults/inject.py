"""Starts ``equimoe.launch.train`` with faults: ``MOE_FAULT=... torchrun ... -m tests.faults.inject OPTIONS``.

``MOE_FAULT`` holds faults separated by ``;``, such as ``kill@rank=1,step=5,phase=dispatch``. The library knows nothing
of this module, which wraps its functions from outside.

Kinds: ``kill``, ``stop``, ``term`` and ``int`` send the signal of that name; ``sleep`` waits; ``raise`` and ``oom``
raise an error; ``nan`` fills one tensor with NaN, ``flip`` flips one bit of it, ``scale`` multiplies it by 30.

Phases: ``start`` (before main), ``setup`` (the model is built), ``data``, ``forward`` (a MoE layer begins),
``dispatch`` (it sends its rows), ``backward`` (it got its output's gradient), ``optim`` (before the update), ``step``
(after it), ``move`` (an expert moves to another owner), ``save:shard`` (a shard is on disk, not flushed),
``save:manifest`` (before the manifest is written), ``save:rename`` (before the folder gets its final name),
``evaluate``. A save belongs to the step in its folder's name.

Fields: ``rank``, ``step`` (counted from 1) and ``phase``, all optional: what is left out matches everything.
``times`` (default 1; 0: no limit) limits how often a fault fires in one run folder, over all restarts. ``seconds`` is
for ``sleep``; ``name`` selects the parameter that ``nan``, ``flip`` and ``scale`` change, by a part of its name, and
``bit`` the bit. ``whom=agent`` sends a signal to the parent process instead. ``saved`` is the step of a checkpoint
that has to be complete before the fault fires; the rank waits for it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from equimoe.launch import train
from equimoe.moe import MoE
from equimoe.moe.dispatch.base import Dispatcher
from equimoe.moe.engines import experts
from equimoe.moe.train.data import Batches
from equimoe.moe.train.trainer import Trainer

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT}
KINDS = (*SIGNALS, "sleep", "raise", "oom", "nan", "flip", "scale")
SAVES = ("save:shard", "save:manifest", "save:rename")
PHASES = ("start", "setup", "data", "forward", "dispatch", "backward", "optim", "step", "move", "evaluate", *SAVES)


@dataclass(frozen=True)
class Fault:
    """One fault; None matches every rank, step or phase."""

    kind: str
    rank: int | None = None
    step: int | None = None
    phase: str | None = None
    times: int = 1
    seconds: float = 3600.0
    name: str = ""
    bit: int = 30
    whom: str = "rank"
    saved: int = 0

    @classmethod
    def parse(cls, text: str) -> Fault:
        kind, _, rest = text.strip().partition("@")
        given = dict(part.split("=", 1) for part in rest.split(",") if part)
        types = {"rank": int, "step": int, "times": int, "bit": int, "saved": int, "seconds": float}
        fault = cls(kind, **{name: types.get(name, str)(value) for name, value in given.items()})
        if kind not in KINDS or fault.phase not in (None, *PHASES) or fault.whom not in ("rank", "agent"):
            raise ValueError(f"MOE_FAULT={text!r}: no such kind or phase; use {KINDS} and {PHASES}")
        return fault


class Injector:
    """Fires the faults of this rank. ``folder`` remembers over restarts how often each one has fired."""

    def __init__(self, faults: list[Fault], rank: int, folder: Path) -> None:
        self.faults, self.folder = list(enumerate(faults)), folder
        self.faults = [(i, fault) for i, fault in self.faults if fault.rank in (None, rank)]
        self.rank, self.step = rank, 0
        self.trainer: Trainer | None = None

    def reach(self, phase: str, step: int | None = None, tensor: Tensor | None = None) -> None:
        """Fire what is planned for this phase. ``tensor`` is what the phase works on, for faults of values."""
        step = self.step if step is None else step
        for number, fault in self.faults:
            if fault.step in (None, step) and fault.phase in (None, phase) and self._claims(number, fault):
                self._fire(fault, phase, tensor)

    def _claims(self, number: int, fault: Fault) -> bool:
        if not fault.times:
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        for count in range(fault.times):
            try:
                os.close(os.open(self.folder / f"{number}-{self.rank}-{count}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return True
        return False

    def _fire(self, fault: Fault, phase: str, tensor: Tensor | None) -> None:
        while fault.saved and not self._complete(fault.saved):
            time.sleep(0.02)
        if fault.kind in SIGNALS:
            os.kill(os.getppid() if fault.whom == "agent" else os.getpid(), SIGNALS[fault.kind])
            # another thread may be the one that is stopped or killed first
            time.sleep(0.2 if fault.whom == "agent" or fault.kind in ("term", "int") else 1.0)
        elif fault.kind == "sleep":
            time.sleep(fault.seconds)
        elif fault.kind == "raise":
            raise ValueError(f"injected on rank {self.rank} in phase {phase}")
        elif fault.kind == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")
        else:
            self._change(fault, tensor)

    def _complete(self, step: int) -> bool:
        """Return whether a checkpoint has its final name. A save runs in the background, on disks that may be busy."""
        return (self.folder.with_suffix("") / "checkpoints" / f"step-{step:08d}").exists()

    @torch.no_grad()
    def _change(self, fault: Fault, tensor: Tensor | None) -> None:
        if tensor is None or fault.name:
            assert self.trainer is not None, "there is no model yet"
            parameters = self.trainer.engine.parameters.items()  # type: ignore[attr-defined]
            tensor = next(p for name, p in parameters if fault.name in name)
            tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if fault.kind == "nan":
            tensor.fill_(float("nan"))
        elif fault.kind == "scale":
            tensor.mul_(30)
        else:
            tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << fault.bit if fault.bit < 31 else -(1 << 31))


def install(injector: Injector) -> None:
    """Wrap the library's functions, so that they tell ``injector`` about every phase."""
    wrap = _wrapper(injector)
    wrap(Trainer, "__init__", before=lambda trainer, *_, **__: injector.reach("setup"), after=_remember(injector))
    wrap(Trainer, "train_step", before=_count(injector), after=lambda *_: injector.reach("step"))
    wrap(experts, "_moved", before=lambda *_: injector.reach("move"))
    wrap(Trainer, "evaluate", before=lambda *_: injector.reach("evaluate"))
    wrap(Batches, "read", before=lambda *_, **__: injector.reach("data"))
    wrap(MoE, "forward", before=_forward(injector), after=_watch_gradient(injector))
    for dispatcher in _subclasses(Dispatcher):
        if "send" in vars(dispatcher):
            wrap(dispatcher, "send", before=lambda _, x_TD, *__: x_TD.requires_grad and injector.reach("dispatch"))
    register_optimizer_step_pre_hook(_before_update(injector))
    sys.addaudithook(_watch_files(injector))


def _wrapper(injector: Injector) -> Callable[..., None]:
    def wrap(owner: Any, name: str, before: Any = None, after: Any = None) -> None:
        real = getattr(owner, name)

        @wraps(real)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(self, *args, **kwargs)
            result = real(self, *args, **kwargs)
            if after is not None:
                after(self, result)
            return result

        setattr(owner, name, wrapped)

    return wrap


def _subclasses(cls: type) -> list[type]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_subclasses(sub))]


def _remember(injector: Injector) -> Callable[..., None]:
    def after(trainer: Trainer, _: Any) -> None:
        injector.trainer = trainer

    return after


def _count(injector: Injector) -> Callable[..., None]:
    def before(trainer: Trainer, *_: Any, **__: Any) -> None:
        injector.step = trainer.step + 1

    return before


def _forward(injector: Injector) -> Callable[..., None]:
    def before(layer: MoE, x: Tensor, *_: Any, **__: Any) -> None:
        if layer.training:
            injector.reach("forward", tensor=x.detach())

    return before


def _watch_gradient(injector: Injector) -> Callable[..., None]:
    def after(layer: MoE, y: Tensor) -> None:
        if layer.training and y.requires_grad:
            y.register_hook(lambda grad: injector.reach("backward", tensor=grad))

    return after


def _before_update(injector: Injector) -> Callable[..., None]:
    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        first = gradients[0] if gradients else None
        injector.reach("optim", tensor=first.to_local() if hasattr(first, "to_local") else first)

    return hook


def _watch_files(injector: Injector) -> Callable[..., None]:
    """Python reports every file that is opened or renamed, whichever function does it."""
    folder = re.compile(r"step-(\d{8})[^/]*")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename") or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = Path(os.fspath(arguments[0]))
        if event == "os.rename":
            found = folder.fullmatch(path.name)
            if found and re.fullmatch(r"step-\d{8}", Path(os.fspath(arguments[1])).name):
                injector.reach("save:rename", int(found[1]))
        elif (found := folder.fullmatch(path.parent.name)) and found[0] != f"step-{found[1]}":
            if path.suffix == ".safetensors":
                injector.reach("save:shard", int(found[1]))
            elif path.name.startswith("manifest.json"):
                injector.reach("save:manifest", int(found[1]))

    return hook


@contextmanager
def injected(faults: str, run_dir: Path) -> Iterator[None]:
    """Install faults in a forked rank; a ``within`` of ``tests.helpers.command.launch``. They stay installed."""
    parsed = [Fault.parse(text) for text in faults.split(";") if text.strip()]
    install(Injector(parsed, int(os.environ["RANK"]), Path(f"{run_dir}.faults")))
    yield


def main() -> None:
    """Install the faults of ``MOE_FAULT``, and run the training command with the arguments of this one.

    It writes no report, which takes seconds.
    """
    faults = [Fault.parse(text) for text in os.environ.get("MOE_FAULT", "").split(";") if text.strip()]
    run_dir = next((b for a, b in zip(sys.argv, sys.argv[1:], strict=False) if a == "--run-dir"), "runs/faults")
    injector = Injector(faults, int(os.environ.get("RANK", 0)), Path(f"{run_dir}.faults"))
    install(injector)
    injector.reach("start", 0)
    with mock.patch("equimoe.launch.conclusion._report", return_value="none"):
        train.main(sys.argv[1:])


if __name__ == "__main__":
    main()
