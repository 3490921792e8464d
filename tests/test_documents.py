"""The documents: their examples run, and their links and paths lead somewhere."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.balance.picture import PANELS, PICTURE, RESULTS, draw, last
from equimoe.launch.options import parse
from tests.helpers.fresh import script

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("moe", "kernels", "launch")


def examples(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)


def test_the_loop_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    (loop,) = examples("README.md")
    counts = " ".join(script(loop, tmp_path)).split("]")[0]
    assert sum(map(int, re.findall(r"\d+", counts))) == 8 * 128 * 2


def test_the_routers_of_the_page_run(tmp_path: Path) -> None:
    (every,) = examples("docs/routers.md")
    found = dict(line.split(" [") for line in script(every, tmp_path))
    sums = {name: sum(map(int, re.findall(r"\d+", counts))) for name, counts in found.items()}
    assert (
        len(sums) == 18
        and sums["GShard"] == 2 * 32 * 2
        and sums["DeepSeek-V3"] == 2 * 32 * 4
        and sums["Switch"] == sums["hash"] == sums["SoftMoE"] == 2 * 32
        and sums["expert choice"] == 2 * 32 * 4
    )


def test_the_examples_of_the_training_page_run(tmp_path: Path) -> None:
    experts, replay = examples("docs/training.md")
    of_layer = 8 * 64 + 8 * (16 * 64 + 3 * 128 * 8 + 64 * 8)  # a router, and A and B of 8 experts
    assert script(experts, tmp_path) == [str(2 * of_layer)]
    assert script(replay, tmp_path) == ["True"]


def test_the_op_of_the_kernels_page_runs(tmp_path: Path) -> None:
    op, _ = examples("docs/kernels.md")
    assert script(op, tmp_path) == ["(10, 32) (4, 32, 16)"]


@pytest.mark.slow
def test_the_compiled_layer_of_the_kernels_page_runs(tmp_path: Path) -> None:
    _, layer = examples("docs/kernels.md")
    (line,) = script(layer, tmp_path)
    assert 1.0 <= float(line) <= 8.0


@pytest.mark.slow
def test_the_engine_of_the_page_runs_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(examples("docs/parallel.md")[0])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    norms = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(norms) == 10 and all(0 < norm < 10 for norm in norms)


#: what makes a run short: options after those of the page
SHORT = {
    "train": "--model.num_layers 1 --moe.hidden_size 48 --data.seq_len 32 --log.eval_sequences 1",
    "evaluate": "--limit 2",
}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_commands_of_the_quickstart_run_in_their_order(tmp_path: Path) -> None:
    """With fewer steps and a smaller model; what only prints is tested elsewhere."""
    blocks = re.findall(r"^    (\S.*)$", (ROOT / "docs/quickstart.md").read_text(), re.MULTILINE)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    printed = []
    for line in blocks:
        words = shlex.split(line)
        if {"--help", "--print-config"} & set(words):
            continue
        if words[0] == "make":
            options = shlex.split(dict(word.partition("=")[::2] for word in words[2:]).get("ARGS", ""))
            words = ["-m", "equimoe.launch.train", "--processes", "2", "--run-dir", "runs/quickstart", *options]
        else:
            assert words.pop(0) == ".venv/bin/python"
        kind = words[1].rpartition(".")[2]
        if kind == "train":
            steps = "4" if "--resume" in words else "2"
            words = [word if before != "--steps" else steps for before, word in zip(["", *words], words, strict=False)]
            words += SHORT["train"].split() + ([] if "--steps" in words else ["--steps", steps])
            words += [] if "--data.path" in words else ["--data.builtin_bytes_per_domain", "30000"]
        elif kind == "evaluate":
            words += SHORT["evaluate"].split()
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
        printed.append(done.stdout)
    assert len(printed) == 7 and (tmp_path / "runs/quickstart/checkpoints/step-00000004").exists()
    assert {"config.yaml", "metrics.jsonl", "report.html"} <= set(os.listdir(tmp_path / "runs/quickstart"))


def test_the_picture_of_the_readme_is_that_of_the_results(tmp_path: Path) -> None:
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    runs = json.loads(RESULTS.read_text())["runs"]
    assert ROOT / picture == PICTURE and PICTURE.stat().st_size < 100_000
    draw(runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    by_seed = [b["loss"] - a["loss"] for a, b in zip(*(last(runs, arm) for arm in PANELS), strict=True)]
    assert all(round(difference, 3) in (-0.018, -0.019) for difference in by_seed), by_seed


@pytest.mark.parametrize("target", re.findall(r"`make ([a-z-]+)", (ROOT / "README.md").read_text()))
def test_targets_that_the_readme_names_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_the_balance_page_runs_as_it_stands(tmp_path: Path) -> None:
    watched, driven = examples("docs/balance.md")
    report = ast.literal_eval(script(watched, tmp_path)[-1])
    assert report["balance_sequences"] == 16 and report["estimator_error"] == 0
    assert script(driven, tmp_path)[-1] == "4"


def test_options_of_the_balance_page_exist() -> None:
    (options,) = re.findall(r"`(--moe.balance[^`]+)`", (ROOT / "docs/balance.md").read_text())
    balance = parse(["--recipe", "quickstart", *options.split()]).config.moe.balance
    assert balance.estimator == "exact" and balance.extra.micro == 1e-4


def headings(document: Path) -> list[str]:
    """Return the names by which links reach the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_every_link_of_the_documents_leads_somewhere() -> None:
    documents = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    for document in (*documents, *(ROOT / "docs").glob("*.md")):
        text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)  # code is no link
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if not target.startswith("https://arxiv.org/"):
                path, _, heading = target.partition("#")
                page = document.parent / path if path else document
                assert page.exists() and (not heading or heading in headings(page)), f"{document}: {target}"


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "NOTES.md"]
#: scripts that the reader has
READERS = {"pretrain.py", "pretrain_gpt.py"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=[document.name for document in DOCUMENTS])
def test_every_path_in_a_document_exists(document: Path) -> None:
    """Paths start at the root, in moe/ or next to the document. The name of a file alone may be that of any file."""
    text, places = document.read_text(), (ROOT, ROOT / "moe", document.parent)
    folders = [*FOLDERS, "benchmarks", "tests", "docs", *(path.parent.name for path in (ROOT / "moe").glob("*/*.py"))]
    named = set(re.findall(rf"(?<![\w./-])(?:{'|'.join(folders)})/[\w./-]*\w", text))
    named |= set(re.findall(r"(?<![\w./-])[\w/]+\.(?:py|md)\b", text))
    files = {path.name for folder in (*FOLDERS, "tests", "benchmarks") for path in (ROOT / folder).rglob("*.*")}
    assert not [name for name in named - files - READERS if not any((place / name).exists() for place in places)]


def test_the_map_of_the_code_names_what_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lines = text[text.index("## Map of the code") : text.index("Imports have one direction")].splitlines()
    found: list[str] = []
    for indent, name in re.findall(r"^ {4}((?: {2})?)(\w+/|\w+\.py)", "\n".join(lines), flags=re.MULTILINE):
        top = "" if not indent else next(each for each in reversed(found) if each.count("/") == 1 and each[-1] == "/")
        found.append(top + name)
    assert len(found) > 20 and not [name for name in found if not (ROOT / name).exists()]
