"""Large CPU buffers come from a pool, and no two live tensors share one."""

from __future__ import annotations

import io
import os
import signal
import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from equimoe.kernels.cpu import memory

pytestmark = pytest.mark.skipif(memory._pool is None, reason="no anonymous memory mappings here")
LIKE = torch.zeros(1)
MIB = 1 << 18  # floats


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> memory._Pool:
    fresh = memory._Pool()
    monkeypatch.setattr(memory, "_pool", fresh)
    return fresh


def test_shape_dtype_and_device() -> None:
    for shape in ((3, 5), (0, 7), (1024, 1024), (3, 1 << 19)):
        buffer = memory.empty(*shape, like=LIKE.bfloat16())
        assert buffer.shape == shape and buffer.dtype == torch.bfloat16 and buffer.is_contiguous()
    assert memory.empty(2, 1 << 20, like=LIKE.double()).dtype == torch.float64
    assert memory.empty(4 * MIB, like=torch.zeros(1, device="meta")).device.type == "meta"
    with torch.device("meta"):
        assert memory.empty(4 * MIB, like=LIKE).device.type == "cpu", "not the default device"
    with FakeTensorMode():
        assert isinstance(memory.empty(4 * MIB, like=torch.zeros(1)), FakeTensor), "takes up no memory"


def test_a_block_is_lent_again_only_when_every_view_is_gone() -> None:
    first = memory.empty(4 * MIB, like=LIKE)
    address, view = first.data_ptr(), first[MIB:].view(3, MIB)
    del first
    second = memory.empty(4 * MIB, like=LIKE)
    assert second.data_ptr() != address, "a view is alive"
    view.fill_(1.0)
    second.fill_(2.0)
    assert (view == 1.0).all()
    del view
    assert memory.empty(4 * MIB, like=LIKE).data_ptr() == address


def test_a_graph_keeps_its_block() -> None:
    weight = memory.empty(MIB, like=LIKE).fill_(3.0)
    x = torch.ones(MIB, requires_grad=True)
    y = (x * weight).sum()
    address = weight.data_ptr()
    del weight
    assert memory.empty(MIB, like=LIKE).fill_(0.0).data_ptr() != address
    y.backward()
    assert (x.grad == 3.0).all()


def test_sizes_that_differ_a_little_share_and_others_do_not() -> None:
    address = memory.empty(40 * MIB, like=LIKE).data_ptr()
    assert memory.empty(39 * MIB, like=LIKE).data_ptr() == address
    assert memory.empty(8 * MIB, like=LIKE).data_ptr() != address, "would waste four fifths"


def test_unused_blocks_are_given_up(pool: memory._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PATIENCE", 5)
    memory.empty(64 * MIB, like=LIKE)
    for _ in range(8):
        memory.empty(2 * MIB, like=LIKE)
    assert [len(block) for _, block in pool._free] == []
    assert sum(len(block) for block in pool._returned) < 64 * MIB


def test_a_forked_child_has_its_own_pool(pool: memory._Pool) -> None:
    kept = memory.empty(MIB, like=LIKE).fill_(5.0)
    with pool._lock:  # as if another thread were inside
        child = os.fork()
        if child == 0:
            os._exit(0 if (memory.empty(MIB, like=LIKE).fill_(6.0) == 6.0).all() else 1)
    deadline = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0) and (kept == 5.0).all()


def test_a_pooled_tensor_can_be_saved() -> None:
    buffer, file = memory.empty(3 * MIB, like=LIKE).fill_(7.0), io.BytesIO()
    torch.save(buffer, file)
    assert file.tell() < 4 * 3 * MIB + 10_000, "without the block's rounding"
