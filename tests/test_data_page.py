"""Everything that docs/data.md shows runs as it stands, and its tables name what can be read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from equimoe.moe.train.data.formats import COMPRESSED, READERS
from tests.helpers.fresh import script
from tests.moe.test_data_tokenizer import bpe

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
#: a smaller run than that of the page
SMALL = (
    "--steps 2 --data.seq_len 16 --data.global_batch 4 --data.micro_batch 4 --log.eval_sequences 1 "
    "--log.trackers none --model.num_layers 1"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data that the page's commands name."""
    place = tmp_path_factory.mktemp("page")
    for domain in ("web", "code"):
        (place / "my_folder" / domain).mkdir(parents=True)
        for i in range(20):
            (place / "my_folder" / domain / f"{i}.txt").write_text(f"{domain} {i} " + "the quick brown fox " * 20)
    (place / "my_folder" / "notes.json").write_text("{}")
    (record,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    rows = [json.loads(line) for line in record.splitlines()]
    varied = [json.loads(json.dumps(row).replace("2 + 2", f"{i} + {i}")) for i in range(40) for row in rows]
    (place / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *varied]))
    (place / "my_tokenizer").mkdir()
    pytest.importorskip("tokenizers")
    bpe(place / "my_tokenizer" / "tokenizer.json")
    return place


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_command_runs(folder: Path, number: int) -> None:
    if "--data.cache" in BLOCKS[number]:  # this is about long text
        np.random.default_rng(0).integers(0, 256, 34_000_000, np.uint16).tofile(
            folder / "my_folder" / "web" / "long.bin"
        )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}
    block = BLOCKS[number].replace("--steps 20", SMALL)
    done = subprocess.run(["bash", "-ec", block], cwd=folder, env=env, capture_output=True, text=True)
    (folder / "my_folder" / "web" / "long.bin").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    if "my_folder" in block and "launch.train" in block:
        assert "note: left out, JSON, whose records are read only if the file is named itself: notes.json" in out
    if "--data.mixture" in block:
        assert "web: 7" in out and "code: 3" in out
    if "--data.cache tokens" in block:
        assert out.count("tokenising into tokens/") == 1 and out.count("tokens: tokens/") == 2
    if "--check" in block:
        assert "my_tokens is written" in out and "my_tokens is complete and undamaged" in out


def test_the_commands_are_parsed() -> None:
    """Also in the fast tests: every option of the page exists."""
    from equimoe.launch.options import parse

    for block in BLOCKS:
        for line in block.splitlines():
            if "equimoe.launch.train" in line:
                parse(line.split()[3:])


@pytest.mark.slow
def test_the_scripts_run(tmp_path: Path) -> None:
    engine, batches = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (line,) = script(engine, tmp_path)
    assert line.startswith("torch.Size([4, 32]) ") and float(line.split()[-1]) > 0
    lines = script(batches, tmp_path)
    assert len(lines) == 3 and all(line.startswith("torch.Size([8, 16]) ") for line in lines)
    assert all(60 < int(line.split()[-1]) < 8 * 16 for line in lines)


def test_the_table_names_every_format() -> None:
    (table,) = re.findall(r"\| files \| .*?\n\n", PAGE, re.DOTALL)
    assert all(f"`{suffix}`" in table for suffix in READERS)
    assert all(f"`.jsonl{suffix}`" in PAGE for suffix in COMPRESSED)
