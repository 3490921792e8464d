"""What stands beside every figure of a result file, and the file itself."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from workloads import environment


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def told(result: dict[str, Any]) -> list[str]:
    """Facts and settings, one a line."""
    facts = {**result["facts"], "versions": ", ".join(f"{k} {v}" for k, v in result["facts"]["versions"].items())}
    lines = [f"{key}: {value}  " for key, value in facts.items()]
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    lines += [f"command: {result['command']}  ", f"settings: {settings}  "]
    lines.append(f"seconds: {result['seconds']}, of computation on all cores {result['cpu_seconds']}  ")
    lines.append(f"load average before: {result['load_before']}, after: {result['load_after']}  ")
    return lines


def facts() -> dict[str, Any]:
    """Hardware, versions, commit, date."""
    found = environment(("numpy",))
    return {**found, "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}


def load_averages() -> list[float]:
    """For judging whether anything else ran."""
    return [round(value, 2) for value in os.getloadavg()]


def spent(begin: float, load_before: list[float]) -> dict[str, Any]:
    """What a run took that began at ``begin`` by :func:`time.perf_counter`, and the load around it."""
    cpu = sum(os.times()[:4])  # of this process and those that it has waited for
    seconds = {"seconds": round(time.perf_counter() - begin, 1), "cpu_seconds": round(cpu, 1)}
    return {**seconds, "load_before": load_before, "load_after": load_averages()}


def write(result: dict[str, Any], text: str, out: Path, name: str) -> list[Path]:
    """``name``_<cpu>.json and .md in the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", str(result["facts"]["cpu"]).lower()).strip("-")
    path = out / f"{name}_{slug}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    return [path, path.with_suffix(".md")]
