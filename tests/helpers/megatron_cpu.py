"""Lets Megatron-Core run on a machine without a GPU: device queries only, no numbers change.

Megatron-Core asks for CUDA devices in places where any device would do. Inside :func:`megatron_on_cpu`,

- ``device="cuda"`` and ``torch.cuda.current_device()`` mean the CPU, and ``tensor.cuda()`` returns the tensor;
- ``tensor.type()`` of a CPU tensor has the name of the same CUDA type, by which its optimizers sort parameters;
- the random state of the CUDA device is that of the CPU, and autocast for CUDA in its linear layers is that for the
  CPU;
- functions that Megatron-Core compiles run as they are;
- choosing a device, waiting for it and emptying its cache do nothing;
- names that Megatron-Core misses if TransformerEngine is not installed exist: ``te_general_gemm`` is None, as it tests
  for, ``FP8GlobalStateManager`` says that FP8 is off, and its contexts for FP8 do nothing.

On a GPU, it does nothing.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Context in which Megatron-Core's models, optimizers and schedules run on a CPU."""
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.tensor_parallel import layers, random
    from megatron.core.transformer.moe import moe_utils

    mode, run_backward = _CudaIsCpu(), torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def backward(*args: Any, **kwargs: Any) -> Any:
        with mode:  # a mode is off while it handles a call, here that of Tensor.backward, which may recompute
            return run_backward(*args, **kwargs)

    replaced: dict[tuple[Any, str], Any] = {
        (torch.cuda, "current_device"): lambda: torch.device("cpu"),
        (torch.cuda, "set_device"): lambda *_: None,
        (torch.cuda, "synchronize"): lambda *_: None,
        (torch.cuda, "empty_cache"): lambda: None,
        (torch.cuda, "get_rng_state"): lambda *_: torch.get_rng_state(),
        (torch.cuda, "manual_seed"): torch.manual_seed,
        (random, "_set_cuda_rng_state"): lambda state, *_, **__: torch.set_rng_state(state),
        (random, "_get_cuda_rng_state"): lambda *_, **__: torch.get_rng_state(),
        (torch.autograd, "_engine_run_backward"): backward,
        (moe_utils, "te_general_gemm"): None,
        (random, "FP8GlobalStateManager"): SimpleNamespace(is_fp8_enabled=lambda: False),
        (random, "activation_recompute_forward"): lambda **_: nullcontext(),
        (random, "fp8_autocast"): lambda **_: nullcontext(),
    }
    for kind in (layers.LinearWithFrozenWeight, layers.LinearWithGradAccumulationAndAsyncCommunication):
        for name, autocast in (("forward", torch.amp.custom_fwd), ("backward", torch.amp.custom_bwd)):
            replaced[kind, name] = staticmethod(autocast(getattr(kind, name).__wrapped__, device_type="cpu"))
    patches = [mock.patch.object(where, name, value, create=True) for (where, name), value in replaced.items()]
    for patch in patches:
        patch.start()
    try:
        with torch.compiler.set_stance("force_eager"), mode:
            yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def save(state: dict[str, Any], path: Path) -> None:
    """Save a sharded state. Megatron-Core would start a process by "spawn", which takes seconds."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    fork = multiprocessing.get_context("fork")
    with mock.patch.object(filesystem_async.mp, "get_context", lambda _: fork):
        dist_checkpointing.save(state, str(path))
