"""Wire formats: how rows are encoded when they are sent."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """A wire format: encodes rows [S, ...] as a payload [S, ...], and decodes it."""

    def encode(self, rows: Tensor) -> Tensor: ...

    def decode(self, payload: Tensor, dtype: torch.dtype) -> Tensor: ...


class Plain:
    """Sends rows unchanged."""

    def encode(self, rows: Tensor) -> Tensor:
        return rows

    def decode(self, payload: Tensor, dtype: torch.dtype) -> Tensor:
        return payload


class Wire(NamedTuple):
    """The wire formats of rows and of their gradients."""

    forward: Codec = Plain()
    backward: Codec = Plain()


PLAIN = Wire()
