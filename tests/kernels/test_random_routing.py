"""Random strides, dtypes and ids for the routing ops: values and gradients against fp64, on every path.

T tokens, E experts, K choices, S source rows, D hidden, R = S*K routed rows.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from equimoe.kernels.permute import combine, permute  # noqa: E402
from equimoe.kernels.sort_by_expert import sort_by_expert  # noqa: E402
from equimoe.kernels.topk_gate import topk_gate  # noqa: E402
from tests.kernels.paths import PATHS, on, relative_error  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, Triton's interpreter runs the kernels
DTYPES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter uses numpy, which warns


def strided(pick: random.Random, t: Tensor) -> Tensor:
    """Return the same values with other strides: unchanged, transposed, as columns of a table, or at an offset."""
    kind = pick.choice(["contiguous", "transposed", "columns", "offset"])
    if kind == "transposed":
        return t.movedim(-1, 0).contiguous().movedim(0, -1)
    if kind == "columns":
        return torch.stack((t, torch.full_like(t, -5)), -1)[..., 0]
    if kind == "offset":
        return torch.cat((t.new_full((3,), -5), t.reshape(-1)))[3:].view(t.shape)
    return t


def random_ids(pick: random.Random, sources: int, choices: int, experts: int) -> Tensor:
    """Return ids with dropped choices, with the same expert twice, and with experts without rows."""
    few = pick.randint(1, experts)
    ids_SK = torch.randint(experts - few, experts, (sources, choices), device=DEVICE)
    if pick.random() < 0.3:
        ids_SK[:, 1:] = ids_SK[:, :1]
    return ids_SK.masked_fill(torch.rand(sources, choices, device=DEVICE) < pick.choice([0.0, 0.4, 1.0]), -1)


@pytest.mark.parametrize("seed", range(10))
def test_sort_permute_and_combine(seed: int) -> None:
    pick = random.Random(seed)
    sources, choices, experts, hidden = pick.randint(1, 12), pick.randint(1, 4), pick.randint(1, 6), pick.randint(1, 40)
    ids_SK = strided(pick, random_ids(pick, sources, choices, experts))
    orders = {}
    for path in PATHS:
        with on(path) as backend:
            orders[path] = sort_by_expert(ids_SK, experts, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(orders[path], orders["reference"], strict=True)), path
    order, dtype = orders["torch"], pick.choice(list(DTYPES))
    rows, kept = sources * choices, int(order.offsets_E[-1])
    num_rows, given = pick.randint(0, rows), pick.randint(kept, rows)
    x_SD, dy_SD = (torch.randn(sources, hidden, device=DEVICE).to(dtype) for _ in range(2))
    rows_RD, g_RD = (torch.randn(n, hidden, device=DEVICE).to(dtype) for n in (given, num_rows))
    layouts = [strided(pick, t) for t in (x_SD, rows_RD, g_RD, dy_SD)]

    def run(backend: str, tensors: list[Tensor]) -> list[Tensor]:
        x, r, g, dy = tensors
        x, r = x.detach().requires_grad_(), r.detach().requires_grad_()
        permuted, combined = permute(x, order, num_rows, backend=backend), combine(r, order, backend=backend)
        return [permuted, combined, *torch.autograd.grad((permuted, combined), (x, r), (g, dy))]

    expected = run("reference", [t.double() for t in layouts])
    for path in PATHS:
        with on(path) as backend:
            found = run(backend, layouts)
        for got, want in zip(found, expected, strict=True):
            assert got.dtype == dtype and relative_error(got, want) < DTYPES[dtype], path


@pytest.mark.parametrize("seed", range(14))
def test_topk_gate(seed: int) -> None:
    pick = random.Random(seed)
    groups, sequences = pick.choice([1, 1, 2, 3]), pick.choice([1, 2])
    experts, tokens = groups * pick.randint(1, 9), sequences * pick.randint(1, 6)
    kept_groups = pick.randint(1, groups)
    k = pick.randint(1, min(kept_groups * experts // groups, 5))
    how = {"score": pick.choice(["softmax", "sigmoid"]), "groups": groups, "kept_groups": kept_groups}
    how |= {"normalize": pick.random() < 0.7, "softmax_after_topk": pick.random() < 0.2}
    how |= {"scale": pick.choice([1.0, 2.5]), "sequences": sequences}
    dtype = pick.choice([t for t in DTYPES if t != torch.float64])
    level_T1 = torch.tensor(pick.choices([0.0, -30, -60, -95, -300], k=tokens), device=DEVICE)[:, None]
    spread = pick.choice([1.0, 30.0])  # wide gaps underflow in a softmax
    logits_TE = strided(pick, (level_T1 + spread * torch.randn(tokens, experts, device=DEVICE)).to(dtype))
    if pick.random() < 0.5:
        how["mask_T"] = strided(pick, torch.rand(tokens, device=DEVICE) < 0.7)
    if pick.random() < 0.5:
        bias_E = torch.randn(experts, device=DEVICE)
        bias_E[torch.rand(experts, device=DEVICE) < 0.3] = -float("inf")
        how["bias_E"] = strided(pick, bias_E)
    if pick.random() < 0.3:
        how["ids_TK"] = strided(pick, torch.randint(0, experts, (tokens, k), device=DEVICE))
    shapes = ((tokens, k), (sequences, experts), ())
    dout = [torch.randn(shape, device=DEVICE) * size for shape, size in zip(shapes, (1, 1, 1e-3), strict=True)]

    def run(backend: str, logits: Tensor, **changes: Tensor) -> tuple[Tensor, ...]:
        leaf = logits.detach().requires_grad_()
        gate = topk_gate(leaf, k, backend=backend, **how | changes)
        outputs = (gate.weights_TK, gate.prob_sums_BE, gate.z_sum)
        grads = [d.to(y.dtype) for d, y in zip(dout, outputs, strict=True)]
        return gate.ids_TK, gate.counts_BE, gate.tokens_B, *outputs, *torch.autograd.grad(outputs, leaf, grads)

    first = None
    for path in PATHS:
        with on(path) as backend:
            ids_TK, *found = run(backend, logits_TE)
        first = ids_TK if first is None else first
        assert torch.equal(ids_TK, first), path
        assert "ids_TK" in how or bool((ids_TK.sort(1).values.diff(dim=1) > 0).all()), "a token chose an expert twice"
        _, *expected = run("reference", logits_TE.double(), ids_TK=ids_TK)
        for got, want in zip(found, expected, strict=True):
            if got.dtype == torch.int64:
                assert torch.equal(got, want), path
                continue
            assert relative_error(got, want) < (DTYPES[dtype] if got.dtype == dtype != torch.float32 else 1e-4), path
