"""Stands in for TransformerEngine's modules, which need a GPU, so that Megatron-Core's specs with them run on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor, nn

from . import megatron_models


class Norm(megatron_models.Norm):
    """The norm of the local specs as a module of TransformerEngine."""


class NormLinear(ColumnParallelLinear):
    """A norm and a linear layer in one module, as in TransformerEngine."""

    def __init__(self, *args: Any, config: Any, **how: Any) -> None:
        super().__init__(*args, config=config, **how)
        self.layer_norm_weight = nn.Parameter(torch.ones(args[0]))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, *args: Any, **how: Any) -> Any:
        scale = (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt().to(x.dtype)
        return super().forward(x * scale * self.layer_norm_weight, *args, **how)


for kind in (Norm, NormLinear):
    kind.__module__ = transformer_engine.__name__


class Provider(LocalSpecProvider):
    """What TransformerEngine's provider of modules says about norms; the rest is Megatron-Core's own."""

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return Norm


@contextmanager
def stand_ins() -> Iterator[None]:
    """Context in which Megatron-Core builds specs with the stand-ins."""
    with (
        mock.patch.object(gpt_layer_specs, "TESpecProvider", Provider, create=True),
        mock.patch.object(transformer_engine, "TENorm", Norm),
    ):
        yield
