"""Checks the list of defences, and how the tool that switches them off judges what it sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.defences import judge, misfits, run, selected, without
from tests.faults.rows import NOT_APPLICABLE, ROWS
from tests.faults.switched_off import DEFENCES, Defence


def test_every_row_has_a_defence_and_every_one_is_in_the_source() -> None:
    assert {defence.row for defence in DEFENCES} == ROWS.keys() - NOT_APPLICABLE.keys()
    assert misfits(DEFENCES) == []


def test_an_entry_that_does_not_fit_is_named() -> None:
    text, test = misfits([DEFENCES[0]._replace(text="no such text", test="test_kill.py::test_nothing[1]")])
    assert text.startswith("row 1: moe/train/trainer.py has 0 times, instead of once: 'no such text'")
    assert test == "row 1: there is no test tests/faults/test_kill.py::test_nothing[1]"


def test_rows_are_selected_by_number_and_by_word() -> None:
    assert {defence.row for defence in selected(["1", "spike"])} == {"1", "56"}
    assert selected([]) == DEFENCES


@pytest.mark.parametrize(
    ("off", "seen", "how"),
    [
        ("4", True, "fails without its defence: assert 4 == 3"),
        ("5 - 2", False, "STILL PASSES"),
        ("three", False, "BROKEN: pytest ended with 1: NameError: name 'three' is not defined"),
        ("(3", False, "BROKEN: pytest ended with 4: collection failure"),
    ],
)
def test_what_counts_as_seen(tmp_path: Path, off: str, seen: bool, how: str) -> None:
    (tmp_path / "part.py").write_text("def limit():\n    return 3\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_part.py").write_text(
        "import pytest\nimport part\n\n@pytest.mark.parametrize('n', [3, 7])\ndef test_limit(n):\n"
        "    assert part.limit() == min(n, 3)\n"
    )
    defence = Defence("1", "part.py", "tests/test_part.py::test_limit", "3", off)
    with without(defence, tmp_path):
        found = judge(defence, *run(tmp_path, [defence.node], 60, "-x"))
    assert found[0] == seen and found[1].startswith(how), found
    if seen:
        code, tests = run(tmp_path, [defence.node], 60)
        assert code == 0 and {name: ended.why for name, ended in tests.items()} == {
            f"{defence.node}[{n}]": "" for n in (3, 7)
        }


def test_only_a_defence_against_a_hang_is_seen_by_a_hang(tmp_path: Path) -> None:
    (tmp_path / "test_long.py").write_text("import time\ndef test_it(): time.sleep(60)\n")
    code, _ = run(tmp_path, ["test_long.py"], 2)
    assert code is None
    for hang in (True, False):
        assert judge(Defence("1", "", "", "", "", hang), code, {})[0] == hang
