"""The scripts of docs/weights.md run as they stand, and its table names the models that are tested."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from equimoe.launch.upcycle import METHODS
from equimoe.moe.interop import ADAPTERS
from equimoe.moe.interop.families import FAMILIES
from tests.helpers.fresh import python, script
from tests.helpers.small import write_texts

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "weights.md").read_text()
#: title of a section -> its script
SCRIPTS = {
    section.split("\n")[0]: section.split("```python\n")[1].split("```")[0]
    for section in re.split(r"\n##+ ", PAGE)
    if "```python" in section
}
TRAINER, PARALLEL, OWN = "Swap the layers of a Hugging Face model", "Expert parallelism", "Blocks of your own"
GROW = "Grow and join experts"
BACK = "Train a Hugging Face model here, and go back"


def test_every_script_is_known() -> None:
    assert SCRIPTS.keys() == {TRAINER, PARALLEL, OWN, BACK} and PAGE.count("```python") == len(SCRIPTS)


def need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, which `make engines` installs")


@pytest.mark.engines
def test_the_script_for_a_model_of_transformers(tmp_path: Path) -> None:
    need("transformers", "accelerate")
    lines = python(SCRIPTS[TRAINER], tmp_path, ROOT)
    counts = [int(count) for count in re.findall(r"\d+", lines[-1])]
    assert len(counts) == 8 and sum(counts) == 2 * 4 * 16
    assert sum("'loss'" in line for line in lines) == 5 and (tmp_path / "saved" / "model.safetensors").exists()


@pytest.mark.engines
def test_the_script_for_expert_parallelism(tmp_path: Path) -> None:
    need("transformers")
    (tmp_path / "train.py").write_text(SCRIPTS[PARALLEL])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"loss \d\.\d{4}", done.stdout)) == 10
    assert (tmp_path / "saved" / "model.safetensors").exists()


def test_the_script_for_blocks_of_ones_own(tmp_path: Path) -> None:
    (line,) = script(SCRIPTS[OWN], tmp_path)
    assert float(line.removeprefix("difference ")) < 1e-5


def run(commands: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(["bash", "-ec", commands], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(section: str) -> list[str]:
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)


@pytest.mark.engines
@pytest.mark.timeout(400)
def test_the_commands_that_train_and_go_back(tmp_path: Path) -> None:
    need("transformers")
    python(SCRIPTS[BACK], tmp_path, ROOT)
    (block,) = commands(BACK)
    out = run(block, tmp_path)
    assert "step 5" in out and out.splitlines()[-1] == "mixtral"
    assert (tmp_path / "trained" / "generation_config.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_commands_that_grow_and_join(tmp_path: Path) -> None:
    """With fewer steps and shorter sequences."""
    (tmp_path / "texts").mkdir()
    made = write_texts(tmp_path / "made")
    for number, domain in enumerate(("code", "prose")):
        (made / f"domain{number}").rename(tmp_path / "texts" / domain)
    short = "--steps 2 --data.seq_len 16 --log.eval_sequences 1"
    out = "".join(run(block.replace("--steps 20", short), tmp_path) for block in commands(GROW))
    found = re.findall(r"wrote (\w+)/step-00000000: (.*?);", out)
    assert found == [
        ("grown", "8 experts of width 512, 2 per token, in 4 of 4 blocks"),
        ("joined", "2 experts of width 512, 2 per token, in 4 of 4 blocks"),
        ("averaged", "4 dense blocks"),
    ]
    assert (tmp_path / "moe" / "checkpoints" / "step-00000002").exists()


def test_the_table_of_methods_names_them_all() -> None:
    (table,) = re.findall(r"\| method \| makes of .*?\n\n", PAGE, re.DOTALL)
    assert re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE) == list(METHODS)


def test_the_table_of_conversions_names_every_family() -> None:
    (table,) = re.findall(r"\| model \| not supported .*?\n\n", PAGE, re.DOTALL)
    rows = [row.split("|")[1].lower().replace("-", "_").split(",") for row in table.splitlines()[2:] if row]
    assert {name.strip() for row in rows for name in row} == FAMILIES.keys()


def test_the_table_names_every_adapter() -> None:
    (table,) = re.findall(r"\| model \| router .*?\n\n", PAGE, re.DOTALL)
    rows = [re.sub(r"[^a-z0-9,]", "", row.split("|")[1].lower()) for row in table.splitlines()[2:] if row]
    named = {name for row in rows for name in row.split(",")}
    known = {re.sub(r"(sparse)?(moe)?(block|mlp)?$", "", name.lower().replace("moemoe", "moe")) for name in ADAPTERS}
    assert {name.removesuffix("moe") for name in named} == {name.removesuffix("moe") for name in known}
