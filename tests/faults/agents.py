"""Two torchruns on this machine, each of which stands for a node, and a supervisor that replaces those that fail."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from equimoe.launch.env import AGENT_SETTINGS
from equimoe.moe.observe.metrics import read_records
from tests.helpers.fork import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_environment(**more: str) -> dict[str, str]:
    """Return this environment without variables of ranks or schedulers."""
    place = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in place and not k.startswith(("TORCHELASTIC", "SLURM"))}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more


@dataclass
class Job:
    """A run on several nodes. ``rendezvous`` is torchrun's backend: "c10d" or "static"."""

    run_dir: Path
    options: list[str]
    rendezvous: str = "c10d"
    nodes: int = 2
    #: ranks of each node
    processes: int = 1
    restarts: int = 3
    replacements: int = 3
    #: of each node; c10d rendezvous gives the first ranks to the lowest one
    addresses: tuple[str, ...] = ("127.0.0.1", "127.0.0.2")
    faults: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def command(self, node: int) -> list[str]:
        start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(self.nodes)]
        start += ["--nproc-per-node", str(self.processes), "--max-restarts", str(self.restarts)]
        if self.rendezvous == "static":
            start += ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(self.port)]
        else:
            start += ["--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"127.0.0.1:{self.port}"]
            start += ["--rdzv-conf", f"is_host={node == 0},join_timeout=120", "--local-addr", self.addresses[node]]
        return [*start, "-m", "tests.faults.inject", *self.options, "--run-dir", str(self.run_dir)]

    def start(self, node: int) -> None:
        log = open(self.run_dir.with_name(f"{self.run_dir.name}.node{node}.log"), "ab")  # noqa: SIM115
        environment = clean_environment(MOE_FAULT=self.faults, **AGENT_SETTINGS, **self.environment)
        self.running[node] = subprocess.Popen(self.command(node), env=environment, stdout=log, stderr=log, cwd=ROOT)
        log.close()

    def supervise(self, limit_s: float) -> bool:
        """Start all nodes, and replace those that fail; return whether the run ended well."""
        deadline, left = time.monotonic() + limit_s * PATIENCE, self.replacements
        for node in range(self.nodes):
            self.start(node)
        try:
            while time.monotonic() < deadline:
                ended = {node: process.poll() for node, process in self.running.items()}
                if all(code == 0 for code in ended.values()):
                    return True
                for node, code in ended.items():
                    if code not in (None, 0):
                        if not left:
                            return False
                        left -= 1
                        time.sleep(1.0)
                        self.start(node)
                time.sleep(0.1)
            return False
        finally:
            for process in self.running.values():
                with contextlib.suppress(OSError):
                    process.send_signal(signal.SIGKILL)
                process.wait()

    def logs(self) -> str:
        """Return what the nodes have printed."""
        files = sorted(self.run_dir.parent.glob(f"{self.run_dir.name}.node*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files)

    def seconds_lost(self) -> float:
        """Return the seconds from the fault to the next record."""
        fault = min(marker.stat().st_mtime for marker in Path(f"{self.run_dir}.faults").iterdir())
        records = list(read_records(self.run_dir / "metrics.jsonl"))
        last = max(i for i, record in enumerate(records) if record["kind"] == "run")
        first = next(record["elapsed_s"] for record in records[last:] if record["kind"] == "train")
        end = next(record["elapsed_s"] for record in reversed(records) if record["kind"] == "train")
        return (self.run_dir / "metrics.jsonl").stat().st_mtime - (end - first) - fault


def losses(run_dir: Path) -> dict[int, float]:
    """Return the training loss of every step that a run has recorded."""
    return {r["step"]: r["loss"] for r in read_records(run_dir / "metrics.jsonl") if r["kind"] == "train"}
