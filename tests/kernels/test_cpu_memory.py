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
    weight = memory.empty(4 * MIB, like=LIKE).fill_(3.0)
    x = torch.ones(4 * MIB, requires_grad=True)
    y = (x * weight).sum()
    address = weight.data_ptr()
    del weight
    assert memory.empty(4 * MIB, like=LIKE).fill_(0.0).data_ptr() != address
    y.backward()
    assert (x.grad == 3.0).all()


def test_sizes_that_differ_a_little_share_and_others_do_not() -> None:
    address = memory.empty(40 * MIB, like=LIKE).data_ptr()
    assert memory.empty(39 * MIB, like=LIKE).data_ptr() == address
    assert memory.empty(8 * MIB, like=LIKE).data_ptr() != address, "would waste four fifths"


def held(pool: memory._Pool) -> int:
    """Bytes of the blocks that nobody uses."""
    return sum(map(len, (*pool._free, *pool._returned)))


def test_unused_blocks_are_given_up(pool: memory._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PATIENCE", 5)
    memory.empty(64 * MIB, like=LIKE)
    for _ in range(12):
        memory.empty(2 * MIB, like=LIKE)
    assert held(pool) < 64 << 20


def test_free_blocks_take_no_more_than_was_ever_lent(pool: memory._Pool) -> None:
    for size in (4, 16, 64, 128, 2, 8, 32):  # MiB; few fit into another's block
        buffers = [memory.empty(size * MIB, like=LIKE) for _ in range(2)]
        assert sum(map(len, pool._free)) + pool._lent <= pool._peak
        del buffers
    assert pool._peak <= 2 * (130 << 20) + (64 << 20)


def test_no_memory_left_gives_the_free_blocks_up(pool: memory._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.empty(64 * MIB, like=LIKE)
    real, failures = memory._map, [OSError(12, "Cannot allocate memory")]

    def full(size: int) -> object:
        if failures:
            raise failures.pop()
        assert held(pool) == 0
        return real(size)

    monkeypatch.setattr(memory, "_map", full)
    assert (memory.empty(4 * MIB, like=LIKE).fill_(1.0) == 1.0).all()
    failures += [OSError(12, "Cannot allocate memory")] * 2
    assert (memory.empty(128 * MIB, like=LIKE).fill_(1.0) == 1.0).all(), "PyTorch's own memory"


def test_a_kernel_without_huge_pages(pool: memory._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", -1, raising=False)
    assert (memory.empty(4 * MIB, like=LIKE).fill_(1.0) == 1.0).all()
    assert held(pool) >= 4 << 20, "from the pool, though in small pages"


def test_a_forked_child_has_its_own_pool(pool: memory._Pool) -> None:
    kept = memory.empty(4 * MIB, like=LIKE).fill_(5.0)
    with pool._lock:  # as if another thread were inside
        child = os.fork()
        if child == 0:
            os._exit(0 if (memory.empty(4 * MIB, like=LIKE).fill_(6.0) == 6.0).all() else 1)
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
