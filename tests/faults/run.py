"""Runs all tests of faults, and prints the fault table: ``make faults``.

The last line is ``N of N rows hold``. A row holds if tests have reported it, and no test of their files has failed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.faults.rows import ELSEWHERE, NOT_APPLICABLE, ROWS  # noqa: E402
from tests.side_by_side import run  # noqa: E402

#: name -> files of tests that take long; more parts than a small machine has cores, because ranks that end often wait
LONG = {
    "jobs on nodes": ["tests/faults/test_nodes.py"],
    "other jobs": [f"tests/faults/test_{name}.py" for name in ("cluster", "kill", "resume")],
    "soak and meshes": [f"tests/faults/test_{name}.py" for name in ("soak", "reshard")],
    "ends of runs": [f"tests/faults/test_{name}.py" for name in ("processes", "endings", "start")],
}
OTHERS = sorted({function for functions in ELSEWHERE.values() for function in functions})
PARTS = LONG | {
    "all else": ["tests/faults", *(f"--ignore={file}" for files in LONG.values() for file in files), *OTHERS]
}


def outcomes(file: Path) -> tuple[list[str], set[str]]:
    """Return the tests that passed, and the files with a test that failed, of a report in JUnit's format."""
    passed, failed = [], set()
    for case in ElementTree.parse(file).iter("testcase"):
        path = case.attrib["classname"].replace(".", "/") + ".py"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(path)
        elif case.find("skipped") is None:
            passed.append(f"{path}::{case.attrib['name']}")
    return passed, failed


def elsewhere(passed: list[str]) -> list[dict[str, Any]]:
    """Return a report for every row that tests of other folders hold."""
    found = []
    for row, functions in ELSEWHERE.items():
        tests = [test for test in passed if test.startswith(functions)]
        found += [{"row": row, "outcome": "a test of another folder passed", "test": test} for test in tests]
    return found


def table(reports: list[dict[str, Any]], failed: set[str]) -> tuple[list[str], int]:
    """Return the lines of the table, and how many rows hold."""
    lines, holding = [], 0
    for row, title in ROWS.items():
        found = [report for report in reports if row in _numbers(report["row"])]
        if row in NOT_APPLICABLE:
            state = f"does not apply: {NOT_APPLICABLE[row]}"
        elif not found:
            state = "MISSING: no test has reported it"
        elif broken := sorted({report["test"].split("::")[0] for report in found} & failed):
            state = f"FAILED: see {', '.join(broken)}"
        else:
            holding += 1
            state = _words(found)
        lines.append(f"{row:>3}  {title}\n     {state}")
    return lines, holding


def _numbers(row: str) -> list[str]:
    """Return the numbers at the start of a report's row, such as "1 2 a rank is killed"."""
    return list(takewhile(str.isdigit, row.split()))


def _words(reports: list[dict[str, Any]]) -> str:
    """Say what several reports of a row say, each outcome once, with range and median of its figures."""
    outcomes: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        what = " ".join([*report["row"].split()[len(_numbers(report["row"])) :], report["outcome"]])
        outcomes.setdefault(what, []).append(report)
    return "; ".join(what + _figures(found) for what, found in outcomes.items())


def _figures(reports: list[dict[str, Any]]) -> str:
    parts = [f"{len(reports)} times"] if len(reports) > 1 else []
    for name in dict.fromkeys(name for report in reports for name in report):
        values = [report[name] for report in reports if report.get(name) is not None]
        label = name.replace("_", " ")
        if name in ("row", "outcome", "test") or not values:
            continue
        if all(isinstance(value, (int, float)) for value in values):
            low, high, middle = (f"{value:.3g}" for value in (min(values), max(values), median(values)))
            more = f", median {middle}" if len(values) > 2 else ""
            parts.append(f"{label} {low}" + (f" to {high}{more}" if high != low else ""))
        elif len(reports) == 1:
            parts.append(f"{label} {values[0]}")
    return f" ({', '.join(parts)})" if parts else ""


def main(arguments: list[str]) -> int:
    """Run pytest on all tests of faults; return its exit code, or 1 if a row does not hold.

    ``arguments`` may select tests, which then run in one process. The table shows what these have reported.
    """
    os.chdir(ROOT)
    passed: list[str] = []
    failed: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        reports = Path(folder, "table.jsonl")
        reports.touch()
        os.environ["EQUIMOE_FAULTS_TABLE"] = str(reports)
        parts = {"selection": ["tests/faults", *OTHERS]} if arguments else PARTS
        files = {name: Path(folder, f"{number}.xml") for number, name in enumerate(parts)}
        options = ["-q", "-m", "faults or not slow", *arguments]
        code = run({name: [*which, f"--junitxml={files[name]}", *options] for name, which in parts.items()})
        for file in filter(Path.exists, files.values()):
            more_passed, more_failed = outcomes(file)
            passed, failed = passed + more_passed, failed | more_failed
        seen = [json.loads(line) for line in reports.read_text().splitlines()] + elsewhere(passed)
    lines, holding = table(seen, failed)
    applicable = len(ROWS.keys() - NOT_APPLICABLE.keys())
    print("\n" + "\n".join(lines) + f"\n\n{holding} of {applicable} rows hold")
    return code or int(holding < applicable)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
