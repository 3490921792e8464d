"""Experiment trackers that show a run's metrics: TensorBoard, Weights & Biases, and MLflow.

Their packages are imported when a run uses them. Each run keeps the names under which trackers know it in
``trackers.json``, so that a resumed run goes on where it was.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .files import write_atomically

#: uint8 [height, width, 3]
Picture = NDArray[np.uint8]

TRACKERS_FILE = "trackers.json"
#: name of the project (W&B) and of the experiment (MLflow), unless the environment names another one
PROJECT = "equimoe"


class Tracker(Protocol):
    """Where metrics go. ``run_dir`` is the run's folder; ``resume_step`` is the step after which the run goes on."""

    #: module that must be installed, and what to install
    needs: tuple[str, str]

    def __init__(self, run_dir: Path, resume_step: int | None) -> None: ...

    def describe(self, options: Mapping[str, Any], text: str) -> None:
        """Record the configuration: its fields by dotted name, and all of it as readable text."""

    def log(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Picture]) -> None:
        """Record numbers and pictures of a step by name."""

    def close(self) -> None:
        """Finish writing."""


class TensorBoard:
    """Event files in ``run_dir/tensorboard``."""

    needs = ("tensorboard", "tensorboard")

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run wrote for this and later steps
        purge = 0 if resume_step is None else resume_step + 1
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        self._step = purge

    def describe(self, options: Mapping[str, Any], text: str) -> None:
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), self._step)

    def log(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Picture]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, recorded offline in ``run_dir/wandb`` without credentials or with WANDB_MODE=offline.

    Steps are the field "step" and not W&B's own, which cannot go back when a run resumes from an earlier checkpoint.
    """

    needs = ("wandb", "'equimoe[trackers]'")

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        import wandb

        self._image = wandb.Image
        mode: Any = os.environ.get("WANDB_MODE")
        if mode is None and not wandb.login(prompt=False):
            mode = "offline"
        known = None if resume_step is None else _known(run_dir, "wandb")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_dir.resolve().name),
            dir=str(run_dir),
            id=known,
            resume=None if known is None else "allow",
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        _remember(run_dir, "wandb", self._run.id)

    def describe(self, options: Mapping[str, Any], text: str) -> None:
        self._run.config.update(dict(options), allow_val_change=True)

    def log(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Picture]) -> None:
        images = {name: self._image(picture) for name, picture in pictures.items()}
        self._run.log({"step": step, **scalars, **images})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in ``run_dir/mlflow.db``."""

    needs = ("mlflow", "'equimoe[trackers]'")

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # what is logged goes where the user says, only
        import mlflow

        folder = run_dir.resolve()
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if uri is None:
            uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlartifacts").as_uri()
        self._metric, self._param = mlflow.entities.Metric, mlflow.entities.Param
        self._client: Any = mlflow.MlflowClient(uri)
        known = None if resume_step is None else _known(run_dir, "mlflow")
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name, artifacts) if found is None else found.experiment_id
            known = self._client.create_run(experiment, run_name=folder.name).info.run_id
            _remember(run_dir, "mlflow", known)
        else:
            self._client.update_run(known, "RUNNING")
        self._id, self._new = known, resume_step is None

    def describe(self, options: Mapping[str, Any], text: str) -> None:
        self._client.log_text(self._id, text, "config.yaml")
        if self._new:  # a parameter cannot change
            pairs = [self._param(_plain(name), str(value)) for name, value in options.items()]
            for start in range(0, len(pairs), 100):  # the most that a server takes at once
                self._client.log_batch(self._id, params=pairs[start : start + 100])

    def log(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Picture]) -> None:
        now = round(time.time() * 1000)
        rows = [self._metric(_plain(name), value, now, step) for name, value in scalars.items()]
        for start in range(0, len(rows), 1000):
            self._client.log_batch(self._id, metrics=rows[start : start + 1000])
        for name, picture in pictures.items():
            self._client.log_image(self._id, picture, key=_plain(name), step=step, timestamp=now)

    def close(self) -> None:
        self._client.set_terminated(self._id)


#: names that ``log.trackers`` takes
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def tracker_names(text: str | None) -> tuple[str, ...]:
    """Return the trackers that ``text`` names, separated by commas. Raises ValueError for an unknown one."""
    names = tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    unknown = next((name for name in names if name not in TRACKERS), None)
    if unknown is not None or (text is not None and not names):
        raise ValueError(f"log.trackers={text}: use some of {', '.join(TRACKERS)}, separated by commas, or none")
    return names


def check_installed(names: tuple[str, ...]) -> None:
    """Raise ValueError if the package of a tracker is not installed."""
    for name in names:
        module, package = TRACKERS[name].needs
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"log.trackers={name}: package {module} is not installed; pip install {package}, or leave {name} out"
            )


def _plain(name: str) -> str:
    """Return a name that MLflow takes for metrics, parameters and pictures."""
    return re.sub(r"[^\w\-. /]|(?<=\.)\.|^/|/$|//", "_", name)


def _known(run_dir: Path, tracker: str) -> str | None:
    """Return the name under which a tracker knows the run, or None."""
    try:
        found = json.loads((run_dir / TRACKERS_FILE).read_text())
        return str(found[tracker])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(run_dir: Path, tracker: str, name: str) -> None:
    others = {other: known for other in TRACKERS if (known := _known(run_dir, other)) is not None}
    write_atomically(run_dir / TRACKERS_FILE, json.dumps(others | {tracker: name}).encode() + b"\n")
