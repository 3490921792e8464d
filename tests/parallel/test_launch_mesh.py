"""Checks the command that shows process groups."""

from __future__ import annotations

import pytest

from equimoe.launch.mesh import main


def test_groups_and_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--world", "64", "--tp", "2", "--cp", "2", "--pp", "2", "--ep", "8"])
    lines = capsys.readouterr().out.splitlines()
    at = {line.split()[0]: i for i, line in enumerate(lines) if line and line[0] != " "}
    assert lines[0] == "dense:   pp 2 * dp_replicate 1 * dp_shard 8 * cp 2 * tp 2"
    assert lines[1] == "experts: pp 2 * edp 4 * ep 8 * etp 1"
    assert lines[at["ep"]].split()[1:4] == ["8", "8", "all"] and lines[at["ep"] + 1].split() == list("01234567")
    assert lines[at["pp"]].split()[1:4] == ["2", "32", "none"] and lines[at["pp"] + 1].split() == ["0", "32"]
    assert lines[at["edp"] + 2].split() == ["1", "9", "17", "25"] and "etp" not in at


def test_part_of_the_groups_within_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--world", "12", "--tp", "3", "--node", "4", "--all"])
    lines = capsys.readouterr().out.splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("tp"))
    assert "2 of 4" in lines[row] and lines[row + 4].split() == ["9", "10", "11"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            "--world 64 --tp 3",
            "error: parallel.tp=3: must divide the number of processes, which is 64; "
            "make the number of processes a multiple of 3, or change the degrees",
        ),
        ("--world 0", "error: --world=0: must be at least 1"),
        ("--world 8 --ep 0", "error: parallel.ep=0: must be at least 1, or -1 for the rest"),
    ],
)
def test_degrees_that_do_not_fit(arguments: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 64 and capsys.readouterr().err == f"{text}\n"
