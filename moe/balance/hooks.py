"""Hooks into torch: calls before and after every optimizer step, and bookkeeping that torch.compile must not trace."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch

#: returns what torch calls for every new Python frame; None if it is not within compiled code
_compiler_of_frames = torch._C._dynamo.eval_frame.get_eval_frame_callback

#: what the error of ``fullgraph=True`` says
_UNKNOWN_STEP = (
    "MoE: the layer cannot find out in a graph where the steps of its training begin and end; drive them, "
    "step = Step.of(model) and with step.micro_batch(), call model.eval(), or leave out fullgraph=True"
)

P = ParamSpec("P")
R = TypeVar("R")


def register_while_alive(register: Callable[..., Any], method: Callable[[torch.optim.Optimizer], None]) -> None:
    """Register an optimizer hook that calls ``method`` as long as its object exists."""
    reference = weakref.WeakMethod(method)

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        call = reference()
        if call is not None:
            call(optimizer)

    weakref.finalize(method.__self__, register(hook).remove)  # type: ignore[attr-defined]


def break_graph(why: str) -> None:
    """Make torch.compile break the graph that it traces; under ``fullgraph=True`` it raises an error that says why."""
    torch._dynamo.graph_break(msg=why)


def untraced(traced: Callable[..., R] | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make torch.compile break the graph around a method of a balancer, and run it as plain Python.

    What it does depends on the step and not only on its arguments, and it may create process groups. ``traced`` is
    compiled in its place, unless that returns NotImplemented.
    """
    return partial(_untraced, traced)


def _untraced(traced: Callable[..., R] | None, method: Callable[P, R]) -> Callable[P, R]:
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # all methods share the code of call: if it were compiled too, it would soon reach the limit of recompilations
        torch._dynamo.eval_frame.skip_code(call.__code__)  # type: ignore[attr-defined]
        return method(*args, **kwargs)

    outside = torch._disable_dynamo(run)  # unlike torch.compiler.disable, it does not import the compiler yet

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            result = NotImplemented if traced is None else traced(*args, **kwargs)
            if result is not NotImplemented:
                return result
            break_graph(_UNKNOWN_STEP)
            return outside(*args, **kwargs)
        # outside of compiled code, there is no compiler that could look into the method
        return method(*args, **kwargs) if _compiler_of_frames() is None else outside(*args, **kwargs)

    return call
