"""Runs the whole suite as seven pytest processes at once, which keeps both cores of a small machine busy.

From the root of the repository: ``python tests/side_by_side.py -m "not slow"``; all get the arguments. Ranks wait for
each other much of the time, and then the other processes have the cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack

#: how many times as long as usual a test may take if others run beside it: nothing hangs because a machine is busy
PATIENCE = 3

#: name -> which tests; a part leaves out what the parts before it name, so every test runs once
TESTS = {
    "parity": [f"tests/parallel/test_{name}.py" for name in ("parity", "balance_matrix", "dryrun")],
    "parallelism": ["tests/parallel"],
    "kernels": ["tests/kernels", "tests/devices"],
    "library and training": ["tests/moe"],
    "commands": ["tests/test_dockerfile.py", "tests/test_gpu_benchmark.py", "tests/interop/test_weights_page.py"],
    "pages": [f"tests/test_{name}.py" for name in ("documents", "watching_page", "data_page")],
    "all else": ["tests"],
}
#: name -> arguments of pytest
PARTS: dict[str, list[str]] = {}
for _name, _tests in TESTS.items():
    _named = [path for earlier in PARTS for path in TESTS[earlier]]
    PARTS[_name] = [*_tests, *(f"--ignore={path}" for path in _named)]


def main(arguments: list[str]) -> int:
    """Run the parts with ``arguments``; return the first exit code that is not 0."""
    return run({name: [*which, *arguments] for name, which in PARTS.items()})


def run(parts: dict[str, list[str]]) -> int:
    """Run pytest once for each part, all at once, with the part's arguments; return the first exit code that is not 0.

    The first part's output is shown while it runs, and that of the others afterwards.
    """
    environment = {**os.environ, "EQUIMOE_TEST_PATIENCE": str(PATIENCE)}
    shown, *kept = ([sys.executable, "-m", "pytest", *arguments] for arguments in parts.values())
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in kept]
        others = [
            stack.enter_context(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
            for command, output in zip(kept, outputs, strict=True)
        ]
        codes = [subprocess.run(shown, check=False, env=environment).returncode, *(other.wait() for other in others)]
        for output in outputs:
            output.seek(0)
            sys.stdout.buffer.write(output.read())
    for name, code in zip(parts, codes, strict=True):
        print(f"{name}: {f'FAILED with exit code {code}' if code else 'passed'}", flush=True)
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
