"""Checks the fault table itself: a row that no test has seen hold, or whose tests fail, does not count."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.rows import ELSEWHERE, NOT_APPLICABLE, ROWS
from tests.faults.run import elsewhere, outcomes, table

OWN = "tests/faults/test_kill.py"


def reports() -> list[dict[str, object]]:
    return [{"row": f"{row} a fault", "outcome": "holds", "test": f"{OWN}::test_it"} for row in ROWS]


def test_a_row_holds_if_a_test_has_reported_it() -> None:
    lines, holding = table(reports(), set())
    assert holding == len(ROWS) - len(NOT_APPLICABLE) and all("a fault holds" in line for line in lines)


@pytest.mark.parametrize("row", ["1", "10"])
def test_a_row_without_a_report_is_missing(row: str) -> None:
    lines, holding = table([found for found in reports() if found["row"] != f"{row} a fault"], set())
    (missing,) = [line for line in lines if "MISSING" in line]
    assert missing.split()[0] == row and holding == len(ROWS) - 1


def test_a_row_whose_tests_fail_does_not_hold() -> None:
    lines, holding = table(reports(), {OWN})
    assert holding == 0 and all(f"FAILED: see {OWN}" in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "words"), [((1.25, 3), "2 times, seconds 1.25 to 3"), ((9, 1, 2), "3 times, seconds 1 to 9, median 2")]
)
def test_the_figures_of_several_reports_are_a_range(seconds: tuple[float, ...], words: str) -> None:
    found = [{"row": "1", "outcome": "holds", "seconds": s, "test": OWN} for s in seconds]
    assert table(found, set())[0][0].endswith(f"holds ({words})")


def test_outcomes_are_read_from_what_pytest_writes(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_one(x): pass\n"
        "@pytest.mark.skip\n"
        "def test_two(): pass\n"
    )
    (tmp_path / "tests/test_bad.py").write_text("def test_three(): assert False\n")
    (tmp_path / "tests/test_worse.py").write_text(
        "import pytest\n@pytest.fixture\ndef f(): assert False\ndef test_four(f): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "--junitxml=out.xml"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    passed, failed = outcomes(tmp_path / "out.xml")
    assert passed == ["tests/test_some.py::test_one[1]", "tests/test_some.py::test_one[2]"]
    assert failed == {"tests/test_bad.py", "tests/test_worse.py"}


def test_rows_of_other_folders_hold_by_their_tests() -> None:
    row, (first, *_) = next(iter(ELSEWHERE.items()))
    assert [found["row"] for found in elsewhere([f"{first}[some]", "tests/moe/test_other.py::test_it"])] == [row]
    assert elsewhere([]) == []
