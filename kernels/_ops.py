"""Ops that torch's compiler and modes see as one, and that eager code runs without torch's dispatcher.

The dispatcher takes 10 us of the host's time for an op, and 40 us together with its backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

#: types of tensors whose ops nothing but autograd has to see
_PLAIN = (Tensor, nn.Parameter)


class Op:
    """``torch.ops.equimoe.<name>``, called as a function of positional arguments."""

    def __init__(
        self, name: str, run: Callable[..., Any], mutates_args: Iterable[str] = (), schema: str | None = None
    ) -> None:
        self.name, self._run = name, run
        self._op = torch.library.custom_op(f"equimoe::{name}", run, mutates_args=mutates_args, schema=schema)
        self._function: type[Function] | None = None
        places = list(inspect.signature(run).parameters)
        self._mutates = [places.index(argument) for argument in mutates_args]
        self.register_fake = self._op.register_fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Make the op differentiable. The arguments are those of ``CustomOpDef.register_autograd``."""
        self._op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self._run(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self._run.__name__, (Function,), methods)

    def __call__(self, *args: Any) -> Any:
        if _is_seen(args):
            return self._op(*args)
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            # without a backward, the dispatcher's result raises when it is differentiated
            return self._op(*args) if self._function is None else self._function.apply(*args)
        output = self._run(*args)
        for place in self._mutates:  # as the dispatcher counts it
            if args[place] is not None:
                torch.autograd.graph.increment_version(args[place])
        return output


def op(name: str, mutates_args: Iterable[str] = (), schema: str | None = None) -> Callable[[Callable[..., Any]], Op]:
    """Make a function an :class:`Op`. The arguments are those of ``torch.library.custom_op``."""
    return lambda run: Op(name, run, mutates_args, schema)


def _is_seen(args: tuple[Any, ...]) -> bool:
    """Return whether the compiler, a mode, a transform or a tensor's type has to see the op, or memory is missing."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._are_functorch_transforms_active():
        return True
    return any(isinstance(arg, Tensor) and (type(arg) not in _PLAIN or arg.is_meta) for arg in args)
