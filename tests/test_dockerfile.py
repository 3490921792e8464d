"""The Dockerfile, without a container: rules of good images, and its commands in an environment of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def instructions() -> list[tuple[str, str]]:
    """Return (instruction, its arguments in one line) of the Dockerfile, in order."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def all_of(kind: str) -> list[str]:
    return [text for name, text in instructions() if name == kind]


def test_the_images_are_named_and_have_a_version() -> None:
    bases = [words.split() for words in all_of("FROM")]
    assert [words[-1] for words in bases] == ["cpu", "cuda", "${DEVICE}"]
    assert all(re.fullmatch(r"python:\$\{PYTHON_VERSION\}-slim", words[0]) for words in bases[:2])
    (version,) = (text.partition("=")[2] for text in all_of("ARG") if text.startswith("PYTHON_VERSION="))
    assert re.fullmatch(r"3\.1[0-3]", version)


def test_it_runs_as_a_user_without_privileges() -> None:
    order = [name for name, _ in instructions()]
    assert all_of("USER") == ["equimoe"] and order.index("USER") > max(i for i, n in enumerate(order) if n == "RUN")
    (added,) = (text for text in all_of("RUN") if "useradd" in text)
    assert "--uid 1000" in added and "sudo" not in str(instructions())
    # the volume belongs to that user, and the working directory can be written to
    assert "chown -R equimoe:equimoe /workspace" in added and all_of("WORKDIR")[-1] == "/workspace"


def test_layers_keep_nothing_that_is_not_needed() -> None:
    for text in all_of("RUN"):
        if "apt-get install" in text:
            assert "--no-install-recommends" in text and "rm -rf /var/lib/apt/lists/*" in text
            assert text.index("apt-get update") < text.index("apt-get install")
    assert any("PIP_NO_CACHE_DIR=1" in text for text in all_of("ENV"))
    assert not all_of("ADD") and not re.search(r"curl|wget|latest", str(instructions()))


def test_a_failure_within_a_pipe_fails_the_build() -> None:
    first = next(i for i, (name, text) in enumerate(instructions()) if name == "RUN" and re.search(r" \| ", text))
    shells = [text for name, text in instructions()[:first] if name == "SHELL"]
    assert shells[-1:] == ['["/bin/bash", "-o", "pipefail", "-c"]']


def test_what_is_copied_exists_and_is_all_that_an_installation_needs() -> None:
    sources = [source for text in all_of("COPY") for source in text.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    assert {"moe", "kernels", "launch", "setup.py", "pyproject.toml", "constraints.txt"} <= set(sources)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_commands_build_a_clean_environment_that_trains(tmp_path: Path) -> None:
    """The RUN commands that install packages, one after another, with only the files that the image gets."""
    app, home = tmp_path / "app", tmp_path / "venv"
    app.mkdir()
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(tmp_path), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "TORCH_ARGS": ""}
    environment["PIP_NO_COMPILE"] = "1"  # what is imported is compiled below, which takes less time
    environment |= {
        name: value for name, value in os.environ.items() if name.lower().endswith(("_proxy", "_index_url"))
    }
    environment["TORCH"] = f"torch=={torch.__version__.split('+')[0]}"
    for name, text in instructions():
        if name == "COPY":
            *sources, target = text.split()
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, app / source if target == "./" else app / target)
        elif name == "RUN" and "pip " in text:
            command = ["bash", "-o", "pipefail", "-c", text]
            done = subprocess.run(command, cwd=app, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    shutil.rmtree(app)  # nothing of it is needed after the installation
    (command,) = all_of("CMD")
    words = [*re.findall(r'"([^"]+)"', command), "--steps", "2", "--log.eval_sequences", "1"]
    words += ["--data.builtin_bytes_per_domain", "100000", "--model.num_layers", "1"]
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    ran = environment | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(words, cwd=workspace, env=ran, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "held-out loss" in done.stdout and (workspace / "runs" / "quickstart" / "report.html").exists()
