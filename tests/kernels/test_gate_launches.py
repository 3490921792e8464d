"""The gate's and the sort's kernels compile once for any number of tokens, and are correct beyond 2^31 elements."""

# T tokens, E experts, K top-k, R routed rows.

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from equimoe.kernels.sort_by_expert import sort_by_expert  # noqa: E402
from equimoe.kernels.sort_by_expert import triton_ops as sort  # noqa: E402
from equimoe.kernels.topk_gate import tiles, topk_gate  # noqa: E402
from equimoe.kernels.topk_gate import triton_ops as gate  # noqa: E402
from equimoe.kernels.topk_gate.types import GateOptions  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, Triton's interpreter runs the kernels
if DEVICE == "cpu":
    from equimoe.kernels import _interpreter as interpreter

    interpreter.correct_interpreter()  # kernels are launched directly here
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="needs memory that is not committed before it is touched")
LIMIT = 1 << 31


class Recorder:
    """Wraps a kernel, and records what Triton would compile each launch for."""

    def __init__(self, kernel: Any, keys: set[tuple]) -> None:
        self.kernel, self.keys = kernel, keys
        known = getattr(kernel, "kwargs", {}).get("do_not_specialize") or getattr(kernel, "do_not_specialize", ())
        self.free = {kernel.arg_names[name] if isinstance(name, int) else name for name in known}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **constants: Any) -> Any:
            key: list[Any] = [self.kernel.__name__, *sorted(constants.items())]
            for name, value in zip(self.kernel.arg_names, args, strict=False):
                if isinstance(value, Tensor):
                    key.append((name, value.dtype))
                else:  # Triton compiles for the value of a number, unless it is exempt
                    key.append((name, type(value) if name in self.free else value))
            self.keys.add(tuple(key))
            return self.kernel[grid](*args, **constants)

        return launch


KERNELS = [(gate, name) for name in ("gate_forward", "gate_reduce", "gate_backward")]
KERNELS += [(sort, name) for name in ("sort_rank", "sort_prefix_blocks", "sort_prefix_experts", "sort_place")]


def test_a_new_number_of_tokens_does_not_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: set[tuple] = set()
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), keys))
    for tokens, sequences in ((1, 1), (2, 2), (16, 1), (66, 2), (130, 1), (48, 16)):
        logits_TE = torch.randn(tokens, 7, device=DEVICE, requires_grad=True)
        found = topk_gate(logits_TE, 2, sequences=sequences, backend="triton")
        (found.weights_TK.sum() + found.prob_sums_BE.sum()).backward()
        sort_by_expert(found.ids_TK, 7, backend="triton")
    assert sorted(key[0] for key in keys) == sorted(name for _, name in KERNELS)


@pytest.mark.parametrize(
    ("backward", "module", "name", "args"),
    [
        (False, gate, "gate_forward", "length chunks scale"),
        (True, gate, "gate_backward", "length chunks scale"),
        (False, gate, "gate_reduce", "chunks"),
        (False, sort, "sort_rank", "rows experts"),
        (False, sort, "sort_prefix_blocks", "blocks bins"),
        (False, sort, "sort_prefix_experts", "bins"),
        (False, sort, "sort_place", "rows experts"),
    ],
)
def test_numbers_are_exempt_from_specialization(backward: bool, module: Any, name: str, args: str) -> None:
    assert Recorder(getattr(module, name), set()).free == set(args.split())


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros that take memory only once they are touched, and are never poisoned."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which older versions of Python lack
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.from_numpy(np.frombuffer(block, np.uint8)).view(dtype).view(shape)


@interpreted
def test_gate_beyond_2_31_elements() -> None:
    """Runs the first chunk of two sequences, the second of which begins after 2^31 logits."""
    experts, k, chunk = 4096, 2, tiles.tile_for(4096).chunk
    length = LIMIT // experts

    def body(rank: int, world: int) -> None:
        method = GateOptions(k, "softmax", 1, 1, True, False, 1.0, 2)
        far = slice(length, length + chunk)
        logits_TE = untouched((length + chunk, experts), torch.float16)
        few_TE = torch.randn(2, chunk, experts).half()
        logits_TE[:chunk], logits_TE[far] = few_TE
        ids_TK, weights_TK = untouched((length + chunk, k), torch.int64), untouched((length + chunk, k), torch.float32)
        counts, sums = torch.zeros(2, experts + 1, dtype=torch.int32), torch.zeros(2, experts + 1)
        constants = tiles.forward_constants(experts, method)
        gate.gate_forward[(2,)](
            logits_TE, None, None, None, ids_TK, weights_TK, counts, sums, length, 1, 1.0, **constants
        )
        leaf_TE = few_TE.flatten(0, 1).requires_grad_()
        want = topk_gate(leaf_TE, k, sequences=2, backend="torch")
        for found, expected in ((ids_TK, want.ids_TK), (weights_TK, want.weights_TK)):
            torch.testing.assert_close(torch.cat((found[:chunk], found[far])), expected)
        assert torch.equal(counts[:, :-1].long(), want.counts_BE)

        dweights_TK = untouched((length + chunk, k), torch.float32)
        dweights_TK[:chunk], dweights_TK[far] = few = torch.randn(2, chunk, k)
        dlogits_TE = untouched((length + chunk, experts), torch.float16)
        zero_BE, constants = torch.zeros(2, experts), tiles.backward_constants(experts, method)
        gate.gate_backward[(2,)](
            logits_TE,
            None,
            ids_TK,
            dweights_TK,
            zero_BE,
            zero_BE[:, 0].clone(),
            dlogits_TE,
            length,
            1,
            1.0,
            **constants,
        )
        want.weights_TK.backward(few.flatten(0, 1))
        torch.testing.assert_close(torch.cat((dlogits_TE[:chunk], dlogits_TE[far])), leaf_TE.grad)

    run_ranks(body, 1)  # in a separate process, because a wrong address crashes it


@interpreted
def test_sort_beyond_2_31_rows() -> None:
    """Runs the first block of rows after 2^31. Its counts and positions lie beyond 2^31, too."""
    experts = 2000
    block = sort.tile_for(experts).block
    first = LIMIT // block  # number of that block
    rows, bins = LIMIT + 100, experts + 1

    def body(rank: int, world: int) -> None:
        def far_program(self: Any, axis: int) -> Any:
            return interpreter.interpreter.TensorHandle(np.array([first], dtype=np.int32), interpreter.tl.int32)

        interpreter.BUILDER.create_get_program_id = far_program
        ids_R, order_R, inverse_R = (untouched((rows,), torch.int64) for _ in range(3))
        ranks_R, counts_XW = untouched((rows,), torch.int32), untouched((first + 1, bins), torch.int64)
        tile = sort.tile_for(experts)
        i_I = torch.arange(100)
        ids_R[LIMIT:] = i_I % 4 - 1  # three experts and dropped rows, in turn
        bin_I = torch.where(i_I % 4 == 0, experts, i_I % 4 - 1)
        sort.sort_rank[(1,)](ids_R, ranks_R, counts_XW, rows, experts, BLOCK=block, BJ=tile.others)
        assert torch.equal(ranks_R[LIMIT:].long(), i_I // 4)
        assert torch.equal(counts_XW[first], torch.bincount(bin_I, minlength=bins))

        counts_XW[first] = 0  # earlier blocks have no such rows
        offsets_W = torch.full((bins,), LIMIT + 75)
        offsets_W[:3] = LIMIT + torch.tensor([0, 25, 50])
        sort.sort_place[(1,)](ids_R, ranks_R, counts_XW, offsets_W, order_R, inverse_R, rows, experts, BLOCK=block)
        position_I = offsets_W[bin_I] + i_I // 4
        assert torch.equal(inverse_R[LIMIT:], torch.where(bin_I == experts, -1, position_I))
        assert torch.equal(order_R[position_I], LIMIT + i_I)

    run_ranks(body, 1)
