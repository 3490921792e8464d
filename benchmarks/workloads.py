"""What the benchmarks run: sizes, inputs, and the facts to keep beside every figure."""

# T tokens, D hidden, F expert width, E experts, K top-k.

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from checkout import ROOT


@dataclass(frozen=True)
class LayerSize:
    """One Mixture-of-Experts layer and the tokens it is given."""

    T: int = 4096
    H: int = 512
    F: int = 1024
    E: int = 16
    K: int = 2

    @property
    def flops(self) -> int:
        """Of the experts' matrix products, forward and backward: three products of each weight, 2 per multiply-add."""
        return 3 * 2 * self.T * self.K * 3 * self.H * self.F

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        helps = {"T": "tokens", "H": "hidden size", "F": "expert width", "E": "experts", "K": "experts per token"}
        for name, default in asdict(LayerSize()).items():
            parser.add_argument(f"-{name}", type=int, default=default, help=f"{helps[name]} (default %(default)s)")

    @staticmethod
    def from_arguments(args: argparse.Namespace) -> LayerSize:
        return LayerSize(args.T, args.H, args.F, args.E, args.K)


def environment(packages: tuple[str, ...]) -> dict[str, object]:
    """Hardware, versions and commit."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", *packages)},
        "commit": commit_of(ROOT),
    }


def version(package: str) -> str | None:
    """The installed version, None where it is not installed."""
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
    """The checkout's commit, with "+changes" where files differ from it; None outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+changes" if git("status", "--porcelain") else "")
