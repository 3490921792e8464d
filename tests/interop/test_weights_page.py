"""The scripts of docs/weights.md run as they stand, and its table names the models that are tested."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from equimoe.moe.interop import ADAPTERS
from tests.helpers.fresh import python

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "weights.md").read_text()
#: title of a section -> its script
SCRIPTS = {
    section.split("\n")[0]: section.split("```python\n")[1].split("```")[0]
    for section in re.split(r"\n##+ ", PAGE)
    if "```python" in section
}
NEEDS_TRANSFORMERS = "Swap the layers of a Hugging Face model"


def test_every_script_is_known() -> None:
    assert SCRIPTS.keys() == {NEEDS_TRANSFORMERS, "Blocks of your own"} and PAGE.count("```python") == len(SCRIPTS)


@pytest.mark.engines
def test_the_script_for_a_model_of_transformers(tmp_path: Path) -> None:
    if not all(importlib.util.find_spec(name) for name in ("transformers", "accelerate")):
        pytest.skip("needs Transformers and Accelerate, which `make engines` installs")
    lines = python(SCRIPTS[NEEDS_TRANSFORMERS], tmp_path, ROOT)
    counts = [int(count) for count in re.findall(r"\d+", lines[-1])]
    assert len(counts) == 8 and sum(counts) == 2 * 4 * 16
    assert sum("'loss'" in line for line in lines) == 5 and (tmp_path / "saved" / "model.safetensors").exists()


def test_the_script_for_blocks_of_ones_own(tmp_path: Path) -> None:
    (line,) = python(SCRIPTS["Blocks of your own"], tmp_path, ROOT)
    assert float(line.removeprefix("difference ")) < 1e-5


def test_the_table_names_every_adapter() -> None:
    (table,) = re.findall(r"\| model \| router .*?\n\n", PAGE, re.DOTALL)
    rows = [re.sub(r"[^a-z0-9,]", "", row.split("|")[1].lower()) for row in table.splitlines()[2:] if row]
    named = {name for row in rows for name in row.split(",")}
    known = {re.sub(r"(sparse)?(moe)?(block|mlp)?$", "", name.lower().replace("moemoe", "moe")) for name in ADAPTERS}
    assert {name.removesuffix("moe") for name in named} == {name.removesuffix("moe") for name in known}
