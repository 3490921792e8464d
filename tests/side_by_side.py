"""Runs the whole suite as two pytest processes at once, which keeps both cores of a small machine busy.

From the root of the repository: ``python tests/side_by_side.py -m "not slow"``; both get the arguments. The first runs
the folders whose ranks wait for each other much of the time, and the library's tests. The second, mostly kernels, keeps
one core busy, of which the ranks of the first take some; so it has less to do.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

FOLDERS = ["tests/devices", "tests/parallel", "tests/moe"]
#: name -> which tests; the second leaves out what the first names, so every test runs once
HALVES = {
    "library and training": FOLDERS,
    "kernels and all else": ["tests", *(f"--ignore={folder}" for folder in FOLDERS)],
}


def main(arguments: list[str]) -> int:
    """Show the first half's output while it runs and then the second's; return the first exit code that is not 0."""
    shown, kept = ([sys.executable, "-m", "pytest", *which, *arguments] for which in HALVES.values())
    with tempfile.TemporaryFile() as output:
        with subprocess.Popen(kept, stdout=output, stderr=subprocess.STDOUT) as other:
            codes = [subprocess.run(shown, check=False).returncode, other.wait()]
        output.seek(0)
        sys.stdout.buffer.write(output.read())
    for name, code in zip(HALVES, codes, strict=True):
        print(f"{name}: {f'FAILED with exit code {code}' if code else 'passed'}")
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
