"""Records everything besides measurements: hardware, versions, commit, load; and writes result files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkout import ROOT
from equimoe.launch.text import counted

#: the names of our contestants in results: the experts with given routing, and the whole layer with its router
OURS, LAYER = "equimoe", "equimoe with router"


def facts(*packages: str) -> dict[str, Any]:
    """Return hardware, the versions of torch and ``packages``, commit and date."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", *packages)},
        "commit": commit_of(ROOT),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }


def facts_line() -> str:
    """Return the most important facts in one line."""
    found = facts()
    machine = f"{found['cpu']}, {counted(found['cores'], 'core')}"
    software = f"Python {found['python']}, torch {found['versions']['torch']}"
    return f"{machine}, {software}, commit {found['commit']}, {found['date']}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit_of(root: Path) -> str | None:
    """Return the checkout's commit, with "+changes" if files differ from it, or None outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+changes" if git("status", "--porcelain") else "")


def load_averages() -> list[float]:
    """Return the machine's load averages, which show whether other jobs disturbed the measurement."""
    return [round(value, 2) for value in os.getloadavg()]


def spent(begin: float, load_before: list[float]) -> dict[str, Any]:
    """Return the cost of a run that began at ``begin`` (:func:`time.perf_counter`), and the load before and after."""
    cpu = sum(os.times()[:4])  # of this process and of the children that it has waited for
    seconds = {"seconds": round(time.perf_counter() - begin, 1), "cpu_seconds": round(cpu, 1)}
    return {**seconds, "load_before": load_before, "load_after": load_averages()}


def as_lines(result: dict[str, Any]) -> list[str]:
    """Return facts and settings as Markdown, one per line."""
    versions = ", ".join(f"{name} {number or 'absent'}" for name, number in result["facts"]["versions"].items())
    lines = [f"{key}: {value}  " for key, value in {**result["facts"], "versions": versions}.items()]
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    lines += [f"command: {result['command']}  ", f"settings: {settings}  "]
    lines.append(f"seconds: {result['seconds']}; CPU seconds: {result['cpu_seconds']}  ")
    lines.append(f"load average before: {result['load_before']}, after: {result['load_after']}  ")
    return lines


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def slug(name: str) -> str:
    """Return ``name`` as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def rounded(value: Any) -> Any:
    """Round all floats in nested dicts and lists to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


def write(result: dict[str, Any], text: str, out: Path, name: str) -> list[Path]:
    """Write the result as ``name``_<cpu>.json and its text as .md into the folder ``out``."""
    path = out / f"{name}_{slug(str(result['facts']['cpu']))}.json"
    path.write_text(json.dumps(rounded(result), separators=(",", ":")) + "\n")
    path.with_suffix(".md").write_text(text)
    return [path, path.with_suffix(".md")]
