"""Real runs with W&B, MLflow and TensorBoard, without a network, read back through their own libraries."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from equimoe.moe.observe.metrics import MetricsWriter, read_records
from tests.helpers import small
from tests.helpers.command import Ended, launch
from tests.helpers.runs import made_up_run
from tests.moe.test_trackers import events_of
from tests.test_watching_page import TRACK, run

wandb = pytest.importorskip("wandb")
mlflow = pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy")

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

#: a domain's name that no tracker takes as it stands
AWKWARD = "C++ & <more> 100%"
BLOCK = 32768


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield W&B's own records of an offline run: a log in LevelDB's format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:  # no header fits into the rest of a block
            place += BLOCK - place % BLOCK
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_rows(run_dir: Path) -> tuple[set[str], list[dict[str, Any]], dict[str, Any]]:
    """Return the ids, the rows and the configuration of all offline parts of a run."""
    ids, rows, config = set(), [], {}
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in items.items()})
            for item in record.config.update:
                config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return ids, rows, config


def client_of(run_dir: Path) -> Any:
    return mlflow.MlflowClient(f"sqlite:///{run_dir.resolve() / 'mlflow.db'}")


def mlflow_runs(run_dir: Path) -> list[Any]:
    client = client_of(run_dir)
    return list(client.search_runs([client.get_experiment_by_name("equimoe").experiment_id]))


def train(folder: Path, *options: str) -> Ended:
    argv = ["--data.path", str(folder / "texts"), "--run-dir", str(folder / "my run"), "--log.every", "1"]
    argv += ["--log.trackers", "tensorboard,wandb,mlflow", "--model.num_layers", "2", "--model.num_heads", "2"]
    argv += ["--moe.hidden_size", "16", "--moe.intermediate_size", "12", "--data.seq_len", "16"]
    argv += ["--data.heldout_fraction", "0.1", "--log.eval_sequences", "2", *options]
    ended = launch(argv, timeout=120)
    assert ended.codes == [0] and "log.trackers" not in "".join(ended.err), ended
    return ended


def test_a_run_and_its_resume_are_one_run_in_every_tracker(tmp_path: Path) -> None:
    small.write_texts(tmp_path / "texts")
    (tmp_path / "texts" / "domain0").rename(tmp_path / "texts" / AWKWARD)
    train(tmp_path, "--steps", "3")
    train(tmp_path, "--steps", "5", "--resume")
    run_dir = tmp_path / "my run"
    records = [record for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == "train"]
    losses = {record["step"]: record["loss"] for record in records}
    assert list(losses) == [1, 2, 3, 4, 5]

    ids, rows, config = wandb_rows(run_dir)
    assert len(ids) == 1
    assert {row["step"]: row["train/loss"] for row in rows if "train/loss" in row} == losses
    assert [row["step"] for row in rows if "heldout/loss" in row] == [3, 5]
    assert config["data.seq_len"] == 16 and config["steps"] == 5
    pictures = [row for row in rows if "load.path" in row]
    assert [picture["load._type"] for picture in pictures] == ["image-file"] * 2
    parts = sorted(run_dir.glob("wandb/offline-run-*/files"))
    image = Image.open(parts[0] / pictures[0]["load.path"])
    assert image.size == (pictures[0]["load.width"], pictures[0]["load.height"])
    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 50

    (run,) = mlflow_runs(run_dir)
    client, number = client_of(run_dir), run.info.run_id
    assert run.info.status == "FINISHED" and run.info.run_name == "my run"
    assert {m.step: m.value for m in client.get_metric_history(number, "train/loss")} == pytest.approx(losses)
    assert run.data.params["data.seq_len"] == "16"
    assert "train_domain/C__ _ _more_ 100_" in run.data.metrics
    assert "steps: 5\n" in mlflow.artifacts.load_text(f"{run.info.artifact_uri}/config.yaml")
    images = [Path(file.path).name for file in client.list_artifacts(number, "images")]
    for name in ("load", "routing"):
        assert sum(file.startswith(f"{name}+step+5+") and file.endswith(".png") for file in images) == 1
    assert not (tmp_path / "mlruns").exists()

    events = events_of(run_dir)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_a_new_run_in_an_old_folder_is_another_run(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsWriter(tmp_path, ["wandb", "mlflow"]) as writer:
            for record in made_up_run(steps=10, eval_every=10):
                writer.write(record)
    assert len(wandb_rows(tmp_path)[0]) == len(mlflow_runs(tmp_path)) == 2


def test_a_server_that_is_gone_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(RuntimeWarning, match="^log.trackers=mlflow: cannot start .*training continues") as caught:
        writer = MetricsWriter(tmp_path, ["mlflow"])
        writer.write(made_up_run(steps=5)[2])
    assert len([w for w in caught if "log.trackers" in str(w.message)]) == 1
    assert len(read_records(writer.path)) == 1


def test_the_command_of_the_page(tmp_path: Path) -> None:
    run(TRACK, tmp_path)
    folder = tmp_path / "runs" / "tracked"
    assert list(folder.glob("wandb/offline-run-*")) and (folder / "mlflow.db").exists()
    assert list((folder / "mlartifacts").rglob("*.png")) and list((folder / "tensorboard").iterdir())
