"""Records how the rows of the fault table went, for ``make faults``."""

from __future__ import annotations

import json
import os
from typing import Any


def report(row: str, outcome: str, **figures: Any) -> None:
    """Append one line of JSON to the file that ``EQUIMOE_FAULTS_TABLE`` names, if it is set."""
    if path := os.environ.get("EQUIMOE_FAULTS_TABLE"):
        with open(path, "a") as file:
            file.write(json.dumps({"row": row, "outcome": outcome, **figures}) + "\n")
