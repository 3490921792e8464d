"""Runs Python code in a process of its own, as users do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.command import launch


def python(code: str, cwd: Path, path: Path | None = None) -> list[str]:
    """Run ``code`` in a process that knows nothing of this one; return its lines. ``path``: its PYTHONPATH."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def script(code: str, cwd: Path) -> list[str]:
    """Run ``code`` as a script, in a fork of this process, which has imported torch already; return its lines."""
    ended = launch([], cwd=cwd, main=lambda _: exec(compile(code, "script", "exec"), {"__name__": "__main__"}))
    assert ended.codes == [0], ended
    return ended.out[0].splitlines()
