"""Runs the tests with other packages as four pytest processes at once: ``make engines``.

Arguments may select tests, which then run in one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.side_by_side import run  # noqa: E402

FOLDERS = ["tests/engines", "tests/interop"]
MEGATRON, DEEPSPEED = (
    sorted(str(path) for path in Path("tests/engines").glob(f"test_{name}*.py")) for name in ("megatron", "deepspeed")
)
#: name -> which tests
PARTS = {
    "Megatron-Core": MEGATRON,
    "DeepSpeed": DEEPSPEED,
    "others": [FOLDERS[0], *(f"--ignore={file}" for file in (*MEGATRON, *DEEPSPEED))],
    "Transformers": FOLDERS[1:],
}


def main(arguments: list[str]) -> int:
    """Run pytest with ``arguments``; return its exit code."""
    parts = {"selection": FOLDERS} if arguments else PARTS
    return run({name: [*which, "-m", "engines", *arguments] for name, which in parts.items()})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
