"""Every command and every script of docs/watching.md runs as it stands, with a smaller model.

tests/engines/test_trackers_offline.py runs the one that needs further packages.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from equimoe.moe.observe.metrics import read_records
from tests.helpers.fresh import script

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "watching.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TRAIN, WRITE, WATCH, SECOND, COMPARE, TRACK, PROFILE = COMMANDS
COUNT, READ, OWN = SCRIPTS

#: what makes a run short: options after those of the page
SHORT = "--model.num_layers 1 --moe.hidden_size 48 --data.seq_len 64 --log.eval_sequences 16"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def start(command: str, cwd: Path) -> subprocess.Popen[str]:
    words = shlex.split(command)
    given = dict(word.split("=", 1) for word in words[: words.index("python")])
    env = os.environ | given | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(cwd)}
    argv = [sys.executable, *words[words.index("python") + 1 :]]
    argv += SHORT.split() if "equimoe.launch.train" in argv else []
    return subprocess.Popen(argv, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(command: str, cwd: Path) -> str:
    process = start(command, cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the page's first run, and what the run printed."""
    folder = tmp_path_factory.mktemp("watching")
    return folder, run(TRAIN, folder)


def test_the_progress_line_is_as_shown(first: tuple[Path, str]) -> None:
    shown = next(line.strip() for line in PAGE.splitlines() if line.startswith("     30/30"))
    printed = next(line.strip() for line in first[1].splitlines() if line.strip().startswith("30/30"))
    # a slow machine shows GFLOP/s
    assert re.sub(r"[\d.]+k?", "#", printed.replace("GFLOP", "TFLOP")) == re.sub(r"[\d.]+k?", "#", shown)
    assert max(len(line) for line in first[1].splitlines() if re.match(r" *\d+/30 ", line)) <= 100


def test_the_report_and_its_live_page(first: tuple[Path, str]) -> None:
    folder, _ = first
    assert run(WRITE, folder) == "report: runs/first/report.html\n"
    server = start(f"{WATCH} --port 0", folder)
    assert server.stdout is not None
    try:
        address = server.stdout.readline().split()[1]
        text = urllib.request.urlopen(address, timeout=60).read().decode()
        assert "step 30 of 30" in text and 'id="speed"' in text and 'id="divergence"' in text
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)


def test_the_comparison(first: tuple[Path, str]) -> None:
    folder, _ = first
    run(SECOND, folder)
    assert run(COMPARE, folder) == "report: comparison.html\n"
    text = (folder / "comparison.html").read_text()
    assert "<td>optim.lr</td><td>0.003</td><td>0.001</td>" in text


def test_the_scripts(first: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = first
    assert script(COUNT, folder)[-1] == "250 GFLOP per token, forward and backward"
    lines = script(READ, folder)
    assert len(lines) == 3 + 3 and sum("held out:" in line for line in lines) == 3
    printed = script(OWN, folder)
    assert printed[-5].startswith("learning rate 0.003")
    assert [line.split()[0] for line in printed[-4:] if line] == ["2", "4", "4"]


def test_the_profile(first: tuple[Path, str]) -> None:
    folder, _ = first
    assert "profile: runs/profiled/profile/steps-10-12.trace.json.gz" in run(PROFILE, folder)
    assert (folder / "runs/profiled/profile/steps-10-12.trace.json.gz").stat().st_size > 10_000


def test_every_field_of_the_page_is_recorded(first: tuple[Path, str]) -> None:
    last = [record for record in read_records(first[0] / "runs/first/metrics.jsonl") if record["kind"] == "train"][-1]
    for name in ("loss", "grad_norm", "tokens_per_s", "tokens_per_s_per_device", "tflops_per_device", "memory_bytes"):
        assert last[name] > 0
    assert "mfu" not in last, "a CPU has no known peak"
