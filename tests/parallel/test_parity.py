"""Every composition of parallelisms equals one process that holds the whole batch."""

from __future__ import annotations

import pytest

from tests.helpers.compositions import COMPOSITIONS
from tests.helpers.parity import Composition, compare


@pytest.mark.parametrize("of", COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_equals_one_process(of: Composition) -> None:
    """Loss and norm of three steps, every gradient of the first, every parameter after the last."""
    found = compare(of)
    assert max(found.values()) < of.limit, found
