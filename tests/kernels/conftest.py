"""Memory that was never written is NaN in all of these tests, the pool's included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.kernels.paths import PATHS, on


@pytest.fixture(autouse=True)
def poison_everywhere(poison: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """``poison``, and the same for torch.frombuffer, through which pooled memory becomes a tensor."""
    real = torch.frombuffer

    def frombuffer(*args: Any, **kwargs: Any) -> torch.Tensor:
        return poison(real(*args, **kwargs))

    monkeypatch.setattr(torch, "frombuffer", frombuffer)


@pytest.fixture(params=PATHS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend to ask for, on each path in turn; tests with backends of their own parametrise it."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with on(request.param) as name:
        yield name
