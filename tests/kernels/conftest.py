"""Uninitialised memory is NaN in all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.paths import PATHS, on


@pytest.fixture(autouse=True)
def _poison_everywhere(poison: object) -> None:
    pass


@pytest.fixture(params=PATHS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on every path, and gives it the backend to pass. A test may parametrise ``backend`` itself."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with on(request.param) as name:
        yield name
