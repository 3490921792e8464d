"""Writes the figures of the fault table."""

from __future__ import annotations

import json
import os
from typing import Any


def report(row: str, outcome: str, **figures: Any) -> None:
    """Append one JSON line to the file that EQUIMOE_FAULTS_TABLE names, if it names one.

    ``row`` is the fault's number and name in the table, ``outcome`` what happened, such as "holds".
    """
    file = os.environ.get("EQUIMOE_FAULTS_TABLE")
    if file:
        line = json.dumps({"row": row, "outcome": outcome, **figures}) + "\n"
        with open(file, "ab", buffering=0) as table:
            table.write(line.encode())  # at once, because several processes append
