"""Checks that unusual optimizer steps are right, or raise an error that names the remedy."""

from __future__ import annotations

import pytest

from tests.helpers.scenarios import SCENARIOS, outcome


@pytest.mark.parametrize("name", SCENARIOS)
def test_right_or_refused(name: str) -> None:
    kind, error, message = outcome(name)
    wanted = SCENARIOS[name].refused
    assert kind == ("refused" if wanted else "right"), f"{kind}: error {error:.2g} {message}"
    assert wanted in message
