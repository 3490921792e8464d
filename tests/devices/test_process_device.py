"""Checks which device a rank uses, with a stand-in for torch.cuda."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from equimoe.launch import joining
from equimoe.launch.env import CONFIG, DISAGREEMENT, Process


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes torch see ``count`` GPUs, the first of them with ``uuid``."""

    def see(count: int, uuid: str = "GPU-0") -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))

    return see


def of(local_rank: int, local_world: int) -> Process:
    return Process(rank=local_rank, world=local_world, local_rank=local_rank, local_world=local_world)


@pytest.mark.parametrize(
    ("visible", "local_rank", "local_world", "device"),
    [
        (0, 1, 2, "cpu"),
        (1, 0, 1, "cuda:0"),
        (8, 0, 1, "cuda:0"),
        (8, 5, 8, "cuda:5"),
        (4, 1, 2, "cuda:1"),
        (1, 3, 4, "cuda:0"),  # a scheduler may show each rank only its own GPU
        (1, 3, 1, "cuda:0"),  # and may not say how many ranks it has started on this machine
    ],
)
def test_a_rank_takes_its_own_gpu(visible: int, local_rank: int, local_world: int, device: str, gpus: Callable) -> None:
    gpus(visible)
    assert of(local_rank, local_world).device == torch.device(device)


@pytest.mark.parametrize(("visible", "local_rank", "local_world"), [(4, 0, 8), (4, 7, 8), (2, 3, 1)])
def test_fewer_gpus_than_ranks_are_refused(visible: int, local_rank: int, local_world: int, gpus: Callable) -> None:
    gpus(visible)
    with pytest.raises(
        ValueError, match=f"^{local_world} processes on a machine that sees {visible} GPUs: start .*CPU"
    ):
        _ = of(local_rank, local_world).device


def introduced(rank: int, world: int, host: str, monkeypatch: pytest.MonkeyPatch) -> joining.Introduction:
    monkeypatch.setattr(joining.socket, "gethostname", lambda: host)
    return joining.introduce(of(rank, world), {})


def test_ranks_that_see_the_same_gpu_are_refused(gpus: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for rank, uuid in enumerate(("GPU-0", "GPU-1", "GPU-1")):
        gpus(1, uuid=uuid)
        found[rank] = introduced(rank, 3, "a", monkeypatch)
    assert joining._refusal({rank: found[rank] for rank in range(2)}, 2, 0.0) is None
    refusal = joining._refusal(found, 3, 0.0)
    assert refusal is not None and refusal.code == CONFIG
    assert refusal.message.startswith("3 processes on a machine that has one GPU for several of them: start")


def test_the_same_gpu_on_another_machine_is_another(gpus: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(1)
    found = {rank: introduced(rank, 2, host, monkeypatch) for rank, host in enumerate("ab")}
    assert joining._refusal(found, 2, 0.0) is None


def test_a_machine_without_gpus_among_others_is_refused(gpus: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for rank, count in enumerate((1, 0)):
        gpus(count)
        found[rank] = introduced(rank, 2, "ab"[rank], monkeypatch)
    refusal = joining._refusal(found, 2, 0.0)
    assert refusal is not None and refusal.code == DISAGREEMENT
    assert refusal.message.startswith("device: rank 0 has cuda, rank 1 has cpu; give all ranks the same")
