"""Checks which device a rank uses, with a stand-in for torch.cuda."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from equimoe.launch import env
from equimoe.launch.env import CONFIG, Process, claim, joined


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


def test_ranks_that_see_the_same_gpu_are_refused(gpus: Callable) -> None:
    store = dist.HashStore()
    for rank in range(2):
        gpus(1, uuid=f"GPU-{rank}")
        claim(of(rank, 3).device, of(rank, 3), store)
    with pytest.raises(ValueError, match="^3 processes on a machine that has one GPU for several of them: start"):
        claim(of(2, 3).device, of(2, 3), store)


def test_the_same_gpu_on_another_machine_is_another(gpus: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    for host in ("a", "b"):
        monkeypatch.setattr(env.socket, "gethostname", lambda host=host: host)
        gpus(1)
        claim(of(0, 1).device, of(0, 1), store)


def test_a_rank_ends_with_one_line(
    gpus: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    gpus(1)
    store = dist.HashStore()
    claim(torch.device("cuda", 0), of(1, 2), store)
    monkeypatch.setattr(env, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(env.dist, "PrefixStore", lambda _, inner: inner)
    with pytest.raises(SystemExit) as ended, joined(of(0, 2), timeout_s=5):
        pass
    printed = capsys.readouterr().err
    assert ended.value.code == CONFIG and printed.startswith("error: 2 processes") and printed.count("\n") == 1
