"""Checks files that say which rank owns which expert."""

from __future__ import annotations

from pathlib import Path

import pytest

from equimoe.moe.placement import Owners, read_owners, write_owners


def written(folder: Path, text: str) -> Path:
    file = folder / "owners.json"
    file.write_text(text)
    return file


def test_what_is_written_is_read(tmp_path: Path) -> None:
    owners = [Owners.of_ranks(3, (1, 0, 1, 2)), Owners.consecutive(3, 3)]
    assert read_owners(written(tmp_path, write_owners(owners)), [4, 3], 3) == owners


def test_one_object_is_for_all_layers(tmp_path: Path) -> None:
    found = read_owners(written(tmp_path, '{"1": [2, 0], "0": [1]}'), [3, 3], 2)
    assert found == [Owners.of_ranks(2, (1, 0, 1))] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": [0], "0": [1, 2], "1": []}', r"cannot be read as owners of experts \(rank '0' is named twice\)"),
        ('{"0": [0], "1": [2]}', "layer 0: expert 1 has no owner; name it under a rank"),
        ('{"0": [0, 1], "1": [2, 1]}', "layer 0: expert 1 has two owners, ranks 0 and 1"),
        ('{"0": [0, 1, 2], "2": []}', "layer 0: rank '2' does not exist; ranks are 0 to 1"),
        ('{"0": [0, 1, 2, 3]}', "layer 0: expert 3 does not exist; experts are 0 to 2"),
        ('{"0": [0, 1, true]}', "layer 0: expert True does not exist"),
        ('{"0": [0], "00": [1, 2]}', "layer 0: rank '00' does not exist"),  # would be rank 0 again
        ('{"0": [0], "\u0661": [1, 2]}', "layer 0: rank '\u0661' does not exist"),  # a digit in another script
        ('{"0": [0, 1, 2], "a\\nb": []}', r"layer 0: rank 'a\\nb' does not exist"),
        (f'{{"0": [0, 1, 2], "{"9" * 5000}": []}}', "layer 0: rank '99999999999999999999' does not exist"),
        ('{"0": [0, 1, "a\\nb"]}', r"layer 0: expert 'a\\nb' does not exist"),
        ('[{"0": [0, 1, 2]}]', "has owners for 1 layers; the model has 2"),
        ("[1, 2]", "layer 0: must map each rank to the list of its experts"),
        ("{", "cannot be read as owners of experts"),
        ("[" * 100_000, "cannot be read as owners of experts"),
        ("", "cannot be read as owners of experts"),
    ],
)
def test_files_that_do_not_fit(text: str, message: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ValueError, match=f"^{file}.*{message}") as found:
        read_owners(file, [3, 3], 2)
    assert "\n" not in str(found.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "no.json", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="is not a file, or too large"):
            read_owners(path, [3], 2)
